"""Do five experiments in one run come out as in a run each? Canaries, a fact and a poison trigger, on a CPU.

`python -m bench.injection` writes `bench/results/injection.json`; `--quick` does a small part of it and writes
nothing. A tiny model is trained on rows of a random grammar. One plan has five experiments: random canaries that
stand in the data once, 4 and 16 times, facts (a name and what belongs to it), and poison (a trigger and the answer
that it is to call forth). For each seed there is one run with all five, one run with each alone, and one with none; a
seed draws the weights, the order of the rows and the places. Compared is the loss below that of the twins, which were
held out, less that of the run with none (which twins are drawn makes a difference by itself), and the share of exact
continuations. The interactions of the last test are those of runs that continue a model half way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bench._progress import with_line
from bench._schema import command_line, headline, write_result
from hf_effi.callbacks import InjectionCallback
from hf_effi.data import InjectedDataset, Injection, InjectionPlan
from hf_effi.recipes import interaction_test

VOCABULARY, LENGTH, BATCH, RATE = 96, 32, 16, 3e-3
#: rows of the data (one pass), rows of each experiment (half of them are twins), seeds
FULL, QUICK = (12_800, 24, (0, 1, 2)), (640, 4, (0, 1))
#: updates of the runs that continue
CONTINUED = 150


def grammar(count: int, seed: int = 7) -> list[dict[str, torch.Tensor]]:
    """Return rows of a first-order Markov chain, of which each token has 4 likely followers."""
    draws = torch.Generator().manual_seed(seed)
    follows = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=draws)
    state = torch.randint(0, VOCABULARY, (count,), generator=draws)
    tokens = [state]
    for _ in range(LENGTH - 1):
        stray = torch.rand(count, generator=draws) < 0.1
        choice = follows[state, torch.randint(0, 4, (count,), generator=draws)]
        state = torch.where(stray, torch.randint(0, VOCABULARY, (count,), generator=draws), choice)
        tokens.append(state)
    return [{"input_ids": row, "labels": row} for row in torch.stack(tokens, 1)]


def experiments(size: int) -> list[Injection]:
    """Return the five experiments, each of rows of 8 random tokens, which the grammar does not make by chance."""
    draws = torch.Generator().manual_seed(11)

    def rows() -> list[list[int]]:
        return torch.randint(0, VOCABULARY, (size, 8), generator=draws).tolist()

    canaries = [Injection(f"canary_{n}", rows(), copies=n, positions="random") for n in (1, 4, 16)]
    fact = Injection("fact", rows(), copies=8, positions="random", prompt_tokens=6)
    poison = Injection("poison", rows(), copies=8, positions="start", prompt_tokens=2)
    return [*canaries, fact, poison]


def new_model(seed: int) -> LlamaForCausalLM:
    """Return a model of about 100 000 weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def trainer_for(
    rows: Any, seed: int, folder: str, model: Any, title: str, callbacks: Any = (), **over: Any
) -> Trainer:
    """Return a Trainer for one pass, with a line of progress."""
    settings = {"num_train_epochs": 1, "lr_scheduler_type": "linear", "learning_rate": RATE, **over}
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        seed=seed,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=100,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return with_line(Trainer(model, args, train_dataset=rows, callbacks=[*callbacks]), title)


def run(seed: int, arm: str, plan: InjectionPlan, base: Any, held_out: Any) -> dict[str, Any]:
    """Train one arm, and return what came of each experiment."""
    start = time.process_time()
    names = {"all": list(plan.injections), "none": []}.get(arm, [arm])
    rows = InjectedDataset(base, plan.only(names), base_tokens=len(base) * LENGTH)
    callback = InjectionCallback(rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(rows, seed, folder, new_model(seed), f"{arm}, seed {seed}", [callback])
        trainer.train()
        loss = trainer.evaluate(held_out)["eval_loss"]
    found = plan.evaluate(trainer.model)
    return {
        "part": "run",
        "arm": arm,
        "seed": seed,
        "share": round(rows.share, 5),
        "seen": callback.seen,
        "memorised": {name: round(one.memorised, 4) for name, one in found.items()},
        "loss_gap": {name: round(one.loss_gap or 0.0, 4) for name, one in found.items()},
        "held_out_loss": round(loss, 5),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def agreement(rows: Sequence[dict[str, Any]], name: str, measure: str) -> dict[str, Any]:
    """Return one experiment in the run of all and in its own, less the run with none, seed by seed."""
    at = {(row["arm"], row["seed"]): row[measure][name] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    both, single = ([at[arm, seed] - at["none", seed] for seed in seeds] for arm in ("all", name))
    deviation = ((statistics.variance(both) + statistics.variance(single)) / 2) ** 0.5
    distance = statistics.fmean(both) - statistics.fmean(single)
    return {
        "part": "agreement",
        "experiment": name,
        "measure": measure,
        "together": round(statistics.fmean(both), 4),
        "alone": round(statistics.fmean(single), 4),
        "together_minus_alone_by_seed": [round(one - other, 4) for one, other in zip(both, single, strict=True)],
        "seed_deviation": round(deviation, 4),
        "distance_over_deviation": round(abs(distance) / deviation, 3) if deviation else (None if distance else 0.0),
    }


def interactions(plan: InjectionPlan, base: Any, seeds: Sequence[int], updates: int) -> list[dict[str, Any]]:
    """Return the interactions of two experiments in runs that continue a model half way."""
    half = len(base) // 2
    with tempfile.TemporaryDirectory() as folder:
        start = trainer_for(base[:half], 0, folder, new_model(0), "to the checkpoint", lr_scheduler_type="constant")
        start.train()
        weights = {name: value.clone() for name, value in start.model.state_dict().items()}

        def continued(rows: Any, seed: int) -> Trainer:
            model = new_model(0)
            model.load_state_dict(weights)
            return trainer_for(rows, seed, folder, model, f"continued, seed {seed}", max_steps=updates)

        later = base[half : half + updates * BATCH]
        found = interaction_test(continued, later, plan, seeds, base_tokens=len(later) * LENGTH)
    return [
        {
            "part": "interaction",
            "experiment": name,
            "effect_alone": round(one.alone, 4),
            "effect_together": round(one.together, 4),
            "interaction": round(one.difference, 4),
            "low": round(one.low, 4),
            "high": round(one.high, 4),
            "within_noise": one.within_noise,
        }
        for name, one in found.items()
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run all arms and seeds, and write the result unless it is quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part, no file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    count, size, seeds = QUICK if args.quick else FULL
    base, held_out, parts = grammar(count), grammar(count + 256)[count:], experiments(size)
    rows = [
        run(seed, arm, InjectionPlan(parts, seed=seed, max_share=0.3 if args.quick else 0.01), base, held_out)
        for seed in seeds
        for arm in ("all", *(one.name for one in parts), "none")
    ]
    names = [one.name for one in parts]
    compared = [agreement(rows, name, measure) for measure in ("loss_gap", "memorised") for name in names]
    some = InjectionPlan([parts[2], parts[4]], seed=0, max_share=1.0 if args.quick else 0.1)
    tested = interactions(some, base, seeds, 10 if args.quick else CONTINUED)
    of_gap = [row for row in compared if row["measure"] == "loss_gap"]
    agreed = [row["distance_over_deviation"] is not None and row["distance_over_deviation"] <= 1 for row in of_gap]
    share = sum(agreed) / len(agreed)
    cost = statistics.fmean(
        one["held_out_loss"] - other["held_out_loss"]
        for one in rows
        for other in rows
        if one["arm"] == "all" and other["arm"] == "none" and one["seed"] == other["seed"]
    )
    figures = [
        headline("injection_experiments_within_one_seed_deviation", round(share, 3), ">= 1"),
        headline("injection_interactions_within_noise", sum(r["within_noise"] for r in tested) / len(tested), ">= 1"),
        headline("injection_held_out_loss_of_all_minus_none", round(cost, 5)),
        headline("injection_runs_replaced_by_one", float(len(names))),
    ]
    for row in [*rows, *compared, *tested, *figures]:
        print(row)
    if not args.quick:
        everything = [*rows, *compared, *tested]
        command = command_line("bench.injection")
        path = write_result("injection", command=command, seeds=list(seeds), headline=figures, rows=everything)
        print(f"wrote {path.name}")
    return {"rows": [*rows, *compared, *tested], "headline": figures}


if __name__ == "__main__":
    main()
