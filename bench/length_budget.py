"""
Length budgets on chains of sums: what accuracy costs in tokens, at an equal number of updates.

    python -m bench.length_budget [--quick]

A policy of 75,000 parameters that half knows the task is trained by GRPO from one checkpoint, on the same prompts in
the same order. The right way to answer is long, the lazy one short and mostly wrong. The arms:

- `no length term`: the answer alone;
- `penalty w`: the answer less `w` times the length over the longest, for three weights: the control, which is tuned;
- `triangular`, `triangular gated`, `band gated`: 0.6 of the answer and 0.3 of the length beside a budget that falls;
- `triangular gated, from N`: the same with a budget that begins at N tokens in place of 24;
- `triangular gated, cap`: the same, generating no more than twice the budget;
- `beta stays`, `beta falls`: a KL term of 0.02, and one that falls to 0 by a cosine;
- `temperature falls`: from 1.2 to 1.0, in place of 1.0;
- `next-token term`: 0.1 of the loss on prompts, which are random sums and not worth learning.

CPU seconds are of one thread; those of generation are around the whole turn. Accuracy and tokens are of greedy answers
to held-out problems, up to the full length in all arms. `--quick` runs every part on tiny sizes and learns nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from bench._progress import with_line
from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.callbacks import GenerationCapCallback, GRPOScheduleCallback
from hf_effi.demo.measure import evaluate_policy
from hf_effi.demo.policy import PolicySettings, prepare_policy
from hf_effi.demo.task import (
    Problem,
    build_tokenizer,
    exact_answer_reward,
    final_number,
    held_out_problems,
    training_problems,
)
from hf_effi.functional.rewards import ExponentialBudget
from hf_effi.rewards import LengthBudgetReward
from hf_effi.schedules import cosine, linear

SEEDS, LONGEST, MOST_TOKENS = (0, 1, 2), 5, 32
WEIGHTS = (0.1, 0.3, 1.0)
NONE, TRIANGLE, GATED, BAND, CAPPED = (
    "no length term",
    "triangular",
    "triangular gated",
    "band gated",
    "triangular gated, cap",
)
#: where tighter budgets begin: about the mean length of a worked answer, and the mean length of the policy's own
TIGHTER = (12, 8)
STAYS, FALLS, COOLER, PROMPTS = "beta stays", "beta falls", "temperature falls", "next-token term"


@dataclass(frozen=True)
class Settings:
    """What all arms share."""

    steps: int = 40
    rows: int = 64
    held_out: int = 40
    seeds: tuple[int, ...] = SEEDS
    policy: PolicySettings = PolicySettings(
        hidden_size=64, num_layers=2, intermediate_size=128, sft_steps=600, sft_max_terms=4, lazy_fraction=0.3
    )

    def budget(self, start: int = 24) -> ExponentialBudget:
        """24, 16, 11 and 8 tokens: the longest worked answers have about 24, all of them 11 on average."""
        return ExponentialBudget(start, 0.7, max(1, self.steps // 4))

    def quick(self) -> Settings:
        """Return a variant in which every part runs and nothing is learned."""
        policy = replace(self.policy, hidden_size=32, sft_steps=5, sft_warmup_steps=1)
        return replace(self, steps=4, rows=8, held_out=1, seeds=(0,), policy=policy)


def length_penalty(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
    """The control: a straight line from 0 for no token to -1 for the longest completion."""
    return [-len(ids) / MOST_TOKENS for ids in completion_ids]


def penalty_arm(weight: float) -> str:
    return f"penalty {weight}"


def tighter_arm(start: int) -> str:
    return f"{GATED}, from {start}"


@dataclass(frozen=True)
class Arm:
    """What is beside the answer: a reward with its weight, the weight of the answer, and the callbacks."""

    reward: Callable[..., Any] | None = None
    weights: tuple[float, ...] = (1.0,)
    callbacks: tuple[Any, ...] = ()
    config: tuple[tuple[str, float], ...] = ()


def arms(settings: Settings) -> dict[str, Arm]:
    """Return the arms by name; objects are made anew for each call."""
    paper = (0.6, 0.3)

    def budgeted(shape: str, gated: bool, *callbacks: Any, start: int = 24) -> Arm:
        gate = exact_answer_reward if gated else None
        return Arm(LengthBudgetReward(settings.budget(start), shape, gate, name="length"), paper, callbacks)

    return {
        NONE: Arm(),
        **{penalty_arm(weight): Arm(length_penalty, (1.0, weight)) for weight in WEIGHTS},
        TRIANGLE: budgeted("triangular", False),
        GATED: budgeted("triangular", True),
        **{tighter_arm(start): budgeted("triangular", True, start=start) for start in TIGHTER},
        BAND: budgeted("band", True),
        CAPPED: budgeted("triangular", True, GenerationCapCallback(settings.budget(), ratio=2.0)),
        STAYS: Arm(config=(("beta", 0.02),)),
        FALLS: Arm(config=(("beta", 0.02),), callbacks=(GRPOScheduleCallback(beta=cosine()),)),
        COOLER: Arm(
            config=(("temperature", 1.2),), callbacks=(GRPOScheduleCallback(temperature=linear(floor=1 / 1.2)),)
        ),
        PROMPTS: Arm(config=(("ntp_coef", 0.1),)),
    }


def prompts(settings: Settings, seed: int) -> Dataset:
    """Return the prompts of a seed, enough for all updates."""
    problems = training_problems(seed + 100, held_out_problems(settings.held_out, max_terms=LONGEST), 2, LONGEST)
    drawn = list(itertools.islice(problems, settings.rows // 8 * settings.steps))
    return Dataset.from_dict({"prompt": [p.prompt for p in drawn], "answer": [p.answer for p in drawn]})


@torch.no_grad()
def tokens_of(policy: Any, tokenizer: Any, problems: Sequence[Problem]) -> tuple[float, float]:
    """Return the mean tokens of greedy answers to held-out problems, and of the right ones."""
    batch = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    ids = policy.generate(
        **batch,
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )[:, batch["input_ids"].shape[1] :]
    lengths = (ids != tokenizer.pad_token_id).sum(1).tolist()
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    right = [n for n, text, p in zip(lengths, texts, problems, strict=True) if final_number(text) == p.answer]
    return statistics.fmean(lengths), statistics.fmean(right or [0.0])


def run(name: str, seed: int, settings: Settings, checkpoint: Path) -> dict[str, Any]:
    """Train one arm; return what it answers, how long, and where its CPU seconds went."""
    arm = arms(settings)[name]
    generation: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        args = EffiGRPOConfig(
            folder, max_steps=settings.steps, per_device_train_batch_size=settings.rows, num_generations=8,
            max_completion_length=MOST_TOKENS, learning_rate=2e-4, lr_scheduler_type="constant_with_warmup",
            warmup_steps=3, adam_beta2=0.95, epsilon_high=0.28, seed=seed, bf16=False, use_cpu=True,
            activation_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no", run_record=False,
            disable_tqdm=True, model_init_kwargs={"dtype": "float32"}, reward_weights=list(arm.weights),
            exact_savings="off", **dict(arm.config),
        )  # fmt: skip
        tokenizer = build_tokenizer()
        trainer = EffiGRPOTrainer(
            str(checkpoint),  # by its path, from which TRL loads the reference too
            [exact_answer_reward, *([arm.reward] if arm.reward is not None else [])],
            args,
            prompts(settings, seed),
            processing_class=tokenizer,
            callbacks=list(arm.callbacks),
        )
        turn = trainer._generate_single_turn

        def timed(*given: Any, **named: Any) -> Any:
            begin = time.process_time()
            out = turn(*given, **named)
            generation.append(time.process_time() - begin)
            return out

        trainer._generate_single_turn = timed
        with_line(trainer, f"{name}, seed {seed}")
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    held_out, policy = held_out_problems(settings.held_out, max_terms=LONGEST), trainer.model
    accuracy = evaluate_policy(policy, tokenizer, held_out, 4, seed=0)
    tokens, of_right = tokens_of(policy, tokenizer, held_out)
    return {
        "arm": name,
        "seed": seed,
        "greedy_accuracy": round(accuracy.greedy, 4),
        "sampled_accuracy": round(accuracy.sampled, 4),
        "tokens": round(tokens, 3),
        "tokens_of_right_answers": round(of_right, 3),
        "generated_tokens": int(sum(_logged(trainer, "completions/mean_length")) * settings.rows),
        "cut_share": round(statistics.fmean(_logged(trainer, "completions/clipped_ratio")), 4),
        "cpu_seconds": round(seconds, 2),
        "generation_cpu_seconds": round(sum(generation), 2),
    }


def _logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Return the headlines: means over the seeds, and differences that are paired by seed.

    The penalty that is compared with the budget is the one whose answers are nearest in length to the budget's: more
    accuracy at another length would compare two things.
    """
    of = {(row["arm"], row["seed"]): row for row in rows if "seed" in row}
    seeds = sorted({seed for _, seed in of})
    names = list(dict.fromkeys(arm for arm, _ in of))

    def mean(arm: str, key: str) -> float:
        return statistics.fmean(of[arm, seed][key] for seed in seeds)

    def gap(arm: str, control: str, key: str) -> float:
        return statistics.fmean(of[arm, seed][key] - of[control, seed][key] for seed in seeds)

    nearest = min(map(penalty_arm, WEIGHTS), key=lambda arm: abs(mean(arm, "tokens") - mean(GATED, "tokens")))
    found = [
        headline(f"{key}: {arm}", round(mean(arm, key), 4)) for key in ("greedy_accuracy", "tokens") for arm in names
    ]
    for arm in (TRIANGLE, GATED, *map(tighter_arm, TIGHTER), BAND, CAPPED):
        found += [
            headline(f"tokens_ratio: {arm} over {NONE}", round(mean(arm, "tokens") / mean(NONE, "tokens"), 4), "< 1"),
            headline(f"accuracy_gain: {arm} over {NONE}", round(gap(arm, NONE, "greedy_accuracy"), 4), ">= -0.02"),
        ]
    cost = mean(CAPPED, "generation_cpu_seconds") / mean(GATED, "generation_cpu_seconds")
    moved = [
        headline(f"accuracy_gain: {arm} over {control}", round(gap(arm, control, "greedy_accuracy"), 4), goal)
        for arm, control, goal in (
            (FALLS, STAYS, "> 0"), (FALLS, NONE, "> 0"), (COOLER, NONE, "> 0"), (PROMPTS, NONE, ">= -0.02")
        )
    ]  # fmt: skip
    return [
        *found,
        *moved,
        headline(f"accuracy_gain: {GATED} over {TRIANGLE}", round(gap(GATED, TRIANGLE, "greedy_accuracy"), 4), "> 0"),
        headline(f"accuracy_gain: {GATED} over {BAND}", round(gap(GATED, BAND, "greedy_accuracy"), 4), "> 0"),
        headline(
            f"accuracy_gain: {GATED} over the nearest penalty ({nearest.split()[1]})",
            round(gap(GATED, nearest, "greedy_accuracy"), 4),
            "> 0",
        ),
        headline(f"generation_seconds_ratio: {CAPPED} over {GATED}", round(cost, 4), "< 1"),
        headline(f"accuracy_gain: {CAPPED} over {GATED}", round(gap(CAPPED, GATED, "greedy_accuracy"), 4), ">= -0.02"),
    ]


def main(arguments: list[str] | None = None, results: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run every part on tiny sizes; nothing is learned")
    quick = parser.parse_args(arguments).quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings = Settings().quick() if quick else Settings()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        held_out = held_out_problems(settings.held_out, max_terms=LONGEST)
        checkpoint, start = prepare_policy(settings.policy, held_out, Path(folder) / "policy", show_progress=False)
        rows.append({"arm": "before", "greedy_accuracy": round(start.greedy, 4)})
        for seed in settings.seeds:
            order = list(arms(settings))
            for name in order if seed % 2 == 0 else order[::-1]:
                rows.append(run(name, seed, settings, checkpoint))
                print(rows[-1], flush=True)
    name = "length_budget_quick" if quick else "length_budget"
    return write_result(
        name,
        command=command_line("bench.length_budget"),
        seeds=settings.seeds,
        headline=figures(rows),
        rows=rows,
        folder=results,
    )


if __name__ == "__main__":
    main()
