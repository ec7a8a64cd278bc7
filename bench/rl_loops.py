"""The loops around RL on chains of sums, on a CPU: what each is worth, or what it costs.

`python -m bench.rl_loops` writes `bench/results/rl_loops.json`; `--quick` does a small part and writes nothing. The
policy is the demo's, fine-tuned on short chains; it is asked for longer ones.

- `pdr`: accuracy and tokens of one answer, of sequential refinement (two answers one after the other) and of PDR (four
  drafts, one answer). The workspace is the steps that most drafts agree on, and the answer goes on from there.
- `deficient`: rounds of SimPO on pairs from the rows of highest loss, and on rows drawn at random; the same number of
  rows, samples and updates. Accuracy on other chains.
- `reflection`: seconds per generated token with the processor over without.
- `reward_bench`: seconds of a reward model in batches sorted by length over one answer at a time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from bench._schema import command_line, headline, write_result
from hf_effi.data import ModelScore
from hf_effi.demo.policy import PolicySettings, fine_tune
from hf_effi.demo.task import Problem, build_tokenizer, final_number, held_out_problems, training_problems
from hf_effi.functional.data import deficient_rows, preference_pairs
from hf_effi.functional.rollouts import pdr
from hf_effi.recipes import CyclicalReflection, evaluate_reward_model

TOKENIZER = build_tokenizer()


def answers(model: Any, prompts: Sequence[str], *processors: Any, tokens: int = 64, **settings: Any) -> list[str]:
    """Return a completion of each prompt, sampled unless told otherwise."""
    asked = TOKENIZER(list(prompts), return_tensors="pt", padding=True)
    settings = {"do_sample": True, "max_new_tokens": tokens, **settings}
    made = model.generate(**asked, logits_processor=list(processors), **settings)
    return list(TOKENIZER.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True))


def agreed_steps(drafts: Sequence[str]) -> str:
    """Return the first steps that at least half of the drafts share: the distiller of this task."""
    steps = [draft.split("=")[:-1] for draft in drafts]
    kept: list[str] = []
    for place in itertools.count():
        votes = Counter(tuple(own[: place + 1]) for own in steps if len(own) > place and own[:place] == kept)
        best, count = votes.most_common(1)[0] if votes else ((), 0)
        if 2 * count < len(drafts) or not count:
            return "".join(f"{step}=" for step in kept)
        kept = list(best)


def refined(model: Any, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return accuracy and tokens of one answer, of sequential refinement and of PDR."""
    found = []
    for name, rounds in (("one answer", (1,)), ("sequential", (1, 1)), ("pdr", (4, 1))):
        right, read = [], []
        for problem in problems:
            done = pdr(
                lambda prompts: answers(model, prompts),
                problem.prompt,
                rounds,
                agreed_steps,
                encode=list,
                decode="".join,
                join=lambda prompt, workspace: prompt + workspace,
            )
            right.append(float(final_number(done.answer) == problem.answer))
            read.append((done.sequential_tokens, done.total_tokens))
        accuracy = round(statistics.fmean(right), 4)
        sequential, total = (round(statistics.fmean(side), 1) for side in zip(*read, strict=True))
        found.append({"arm": name, "accuracy": accuracy, "sequential_tokens": sequential, "total_tokens": total})
    return found


def value(answer: str, gold: str) -> float:
    """Return the share of the worked solution that an answer begins with, from -1 to 1."""
    return 2 * len(os.path.commonprefix([answer, gold])) / len(gold) - 1


def rounds_on(
    choose: Callable[[Any], list[int]], start: Any, problems: Sequence[Problem], rounds: int, steps: int, samples: int
) -> Any:
    """Return the policy after rounds of SimPO on pairs of its answers to the chosen rows."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = copy.deepcopy(start)
    for _ in range(rounds):
        pairs = []
        for problem in (problems[row] for row in choose(model)):
            given = answers(model, [problem.prompt] * samples)
            found = preference_pairs(given, [value(answer, problem.worked) for answer in given], floor=-1.0)
            pairs += [{"prompt": problem.prompt, "chosen": given[a], "rejected": given[b]} for a, b in found]
        if not pairs:
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = CPOConfig(
                folder,
                loss_type="simpo",
                cpo_alpha=0.0,
                simpo_gamma=0.5,
                beta=2.5,
                learning_rate=1e-4,
                max_steps=steps,
                per_device_train_batch_size=16,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            CPOTrainer(model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=TOKENIZER).train()
    return model.eval()


def deficient(start: Any, tests: Sequence[Problem], seed: int, rows: int, rounds: int, steps: int) -> dict[str, Any]:
    """Return the greedy accuracy on other chains, before, on deficient rows and on rows drawn at random."""
    source = training_problems(seed, tests, 4, 7)
    problems = [next(source) for _ in range(rows)]
    ids = [TOKENIZER(problem.prompt)["input_ids"] for problem in problems]
    said = [[*TOKENIZER(problem.worked)["input_ids"], TOKENIZER.eos_token_id] for problem in problems]
    batch = {
        "input_ids": [one + two for one, two in zip(ids, said, strict=True)],
        "labels": [[-100] * len(one) + two for one, two in zip(ids, said, strict=True)],
    }
    draws = random.Random(seed)
    choices: dict[str, Callable[[Any], list[int]]] = {
        "deficient": lambda model: deficient_rows(ModelScore(model)(batch)).tolist(),
        "random": lambda model: draws.sample(range(rows), -(-3 * rows // 10)),
    }

    def accuracy(model: Any) -> float:
        given = answers(model, [problem.prompt for problem in tests], do_sample=False)
        right = [final_number(text) == problem.answer for text, problem in zip(given, tests, strict=True)]
        return round(statistics.fmean(right), 4)

    found = {"before": accuracy(start)}
    for name, choose in choices.items():
        torch.manual_seed(seed)
        found[name] = accuracy(rounds_on(choose, start, problems, rounds, steps, samples=8))
    return found


def seconds(call: Callable[[], Any], times: int) -> float:
    """Return the median seconds of a call."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def costs(model: Any, prompts: Sequence[str], times: int) -> dict[str, float]:
    """Return what the processor and batches of a reward model cost, as ratios."""
    length = TOKENIZER(list(prompts), return_tensors="pt", padding=True)["input_ids"].shape[1]
    reflect = CyclicalReflection(TOKENIZER, length, words=["~"], end=None)
    plain = seconds(lambda: answers(model, prompts, min_new_tokens=64), times)
    moved = seconds(lambda: answers(model, prompts, reflect, min_new_tokens=64), times)
    judge = Qwen3ForSequenceClassification(Qwen3Config(**{**model.config.to_dict(), "num_labels": 1}))
    draws = random.Random(0)
    rows = [
        {
            "id": str(place),
            "prompt": prompt,
            "chosen": ["1" * draws.randint(1, 60)],
            "rejected": ["2" * draws.randint(1, 60) for _ in range(3)],
            "subset": "all",
        }
        for place, prompt in enumerate(prompts)
    ]

    def judged(size: int) -> Any:
        return evaluate_reward_model(judge, rows, TOKENIZER, batch_size=size, render=lambda p, a: p + a)

    alone, sorted_batches = seconds(lambda: judged(1), times), seconds(lambda: judged(16), times)
    return {
        "reflection_seconds_ratio": round(moved / plain, 4),
        "reward_bench_seconds_ratio": round(sorted_batches / alone, 4),
    }


def run(seed: int, quick: bool) -> list[dict[str, Any]]:
    """Return the rows of one seed."""
    steps, per_length, rows, rounds = (5, 1, 8, 1) if quick else (600, 30, 128, 3)
    settings = PolicySettings(sft_steps=steps, sft_max_terms=5, lazy_fraction=0.0, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        fine_tune(settings, Path(folder), show_progress=False)
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    tests = held_out_problems(per_length, 6, 7, seed=40_000 + seed)
    found = [{"seed": seed, "part": "pdr", **row} for row in refined(model, tests)]
    compared = deficient(model, tests, seed, rows, rounds, steps=2 if quick else 30)
    found += [{"seed": seed, "part": "deficient", "arm": name, "accuracy": value} for name, value in compared.items()]
    spent = costs(model, [problem.prompt for problem in tests[:8]], 1 if quick else 5)
    return [*found, {"seed": seed, "part": "costs", **spent}]


def mean_of(rows: Sequence[dict[str, Any]], key: str, **where: Any) -> float:
    """Return the mean of a column over the rows that match."""
    return statistics.fmean(row[key] for row in rows if all(row.get(name) == value for name, value in where.items()))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run all seeds, and write the result unless it is quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a few updates, no file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = [0] if args.quick else [0, 1, 2]
    rows = [row for seed in seeds for row in run(seed, args.quick)]

    def gain(part: str, arm: str, over: str) -> float:
        one, two = (mean_of(rows, "accuracy", part=part, arm=name) for name in (arm, over))
        return round(one - two, 4)

    figures = [
        headline("pdr_accuracy_gain_over_one_answer", gain("pdr", "pdr", "one answer"), "> 0"),
        headline("pdr_accuracy_gain_over_sequential", gain("pdr", "pdr", "sequential")),
        headline("deficient_accuracy_gain_over_random_rows", gain("deficient", "deficient", "random"), "> 0"),
        headline("reflection_seconds_ratio", round(mean_of(rows, "reflection_seconds_ratio", part="costs"), 4)),
        headline("reward_bench_seconds_ratio", round(mean_of(rows, "reward_bench_seconds_ratio", part="costs"), 4)),
    ]
    for row in [*rows, *figures]:
        print(row)
    if not args.quick:
        write_result("rl_loops", command=command_line("bench.rl_loops"), seeds=seeds, headline=figures, rows=rows)
    return {"rows": rows, "headline": figures}


if __name__ == "__main__":
    main()
