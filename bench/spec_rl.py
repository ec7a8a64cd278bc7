"""
Speculative reuse of rollouts over three passes: what it saves of generation, and what it costs in reward.

    python -m bench.spec_rl [--cache FOLDER]

The task and the policy of the demo (chains of one-digit sums). Each arm gets the same prompts in the same order and
as many updates with the same learning rate; the first pass is the same run in all of them, to the bit. Arms
take turns within a seed. Seconds of generation are CPU seconds of one thread around the whole turn, with the forwards
that verify drafts and those that record what completions were drawn from.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3ForCausalLM

from bench._progress import with_line
from bench._schema import ROOT, command_line, headline, write_result
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.demo.command import quiet_libraries
from hf_effi.demo.measure import evaluate_policy
from hf_effi.demo.policy import PolicySettings, prepare_policy
from hf_effi.demo.task import (
    MAX_COMPLETION_TOKENS,
    Problem,
    build_tokenizer,
    exact_answer_reward,
    held_out_problems,
    training_problems,
)
from hf_effi.functional import metrics
from hf_effi.functional.rollouts import SpeculativeReuse

PROMPTS, GROUP, ROWS, PASSES = 256, 8, 256, 3
#: generations of so many updates: 256 or 1,024 completions at once
GENERATIONS = {"256 at once": 1, "1,024 at once": 4}
LEARNING_RATE, SEEDS = 3e-4, (0, 1, 2)
NONE, STRICT, LENIENT = "no reuse", "strict reuse", "lenient reuse (0.5)"
#: with 16 tokens in the vocabulary, all are stored
ARMS: dict[str, SpeculativeReuse | None] = {
    NONE: None,
    STRICT: SpeculativeReuse(),
    LENIENT: SpeculativeReuse(lenience=0.5),
}


def training_rows(seed: int, held_out: Sequence[Problem]) -> Dataset:
    """Return the prompts of a seed, all different."""
    problems: dict[str, Problem] = {}
    for problem in training_problems(1000 + seed, held_out):
        problems.setdefault(problem.prompt, problem)
        if len(problems) == PROMPTS:
            break
    rows = list(problems.values())
    random.Random(seed).shuffle(rows)
    return Dataset.from_dict({"prompt": [row.prompt for row in rows], "answer": [row.answer for row in rows]})


def run_arm(
    arm: str, generation: str, seed: int, checkpoint: Path, rows: Dataset, held_out: Sequence[Problem]
) -> dict[str, Any]:
    """Train one arm, and return what it generated, by pass, and what it learned."""
    tokenizer = build_tokenizer()
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        args = EffiGRPOConfig(
            folder, use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_steps=1, seed=seed, num_train_epochs=PASSES,
            per_device_train_batch_size=ROWS, num_generations=GROUP, max_completion_length=MAX_COMPLETION_TOKENS,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant_with_warmup", warmup_steps=4, adam_beta2=0.95,
            max_grad_norm=1.0, beta=0.0, loss_type="dapo", steps_per_generation=GENERATIONS[generation],
        )  # fmt: skip
        trainer = EffiGRPOTrainer(
            Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
            exact_answer_reward,
            args,
            rows,
            processing_class=tokenizer,
            rollout_reuse=ARMS[arm],
        )
        turn = trainer._generate_single_turn

        def timed(*given: Any, **named: Any) -> Any:
            begin = time.process_time()
            out = turn(*given, **named)
            seconds.append(time.process_time() - begin)
            return out

        trainer._generate_single_turn = timed
        begin = time.process_time()
        with_line(trainer, f"{arm}, {generation}, seed {seed}").train()
        total = time.process_time() - begin
    accuracy = evaluate_policy(trainer.model, tokenizer, held_out, samples_per_prompt=4, seed=1)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]

    def by_pass(values: Sequence[float]) -> list[Sequence[float]]:
        size = len(values) // PASSES
        return [values[i * size : (i + 1) * size] for i in range(PASSES)]

    def logged(name: str) -> list[float]:
        """The mean of each pass, over its generations."""
        passes = by_pass([entry.get(name) for entry in log])
        return [round(statistics.fmean([v for v in values if v is not None] or [0.0]), 4) for values in passes]

    return {
        "arm": arm,
        "generation": generation,
        "seed": seed,
        "cpu_seconds": round(total, 2),
        "generation_cpu_seconds": [round(sum(values), 3) for values in by_pass(seconds)],
        "reward": logged("reward"),
        "entropy": logged("entropy"),
        "length": logged("completions/mean_length"),
        "tokens_reused": logged(metrics.REUSED_TOKENS),
        "whole_completions": logged(metrics.REUSED_WHOLE),
        "accepted_length": logged(metrics.REUSE_ACCEPTED_LENGTH),
        "unique_completions": logged(metrics.UNIQUE_COMPLETIONS),
        "held_out_sampled": round(accuracy.sampled, 4),
        "held_out_greedy": round(accuracy.greedy, 4),
    }


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline figures: reuse acts from the second pass on, and the sums are over all three."""
    of = {(row["generation"], row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})

    def seconds(mine: dict[str, Any], stock: dict[str, Any], first: int) -> float:
        return sum(mine["generation_cpu_seconds"][first:]) / sum(stock["generation_cpu_seconds"][first:])

    found = []
    for generation, updates in GENERATIONS.items():
        for name, arm in (("strict", STRICT), ("lenient", LENIENT)):
            pairs = [(of[generation, arm, seed], of[generation, NONE, seed]) for seed in seeds]
            reused = statistics.fmean(value for mine, _ in pairs for value in mine["tokens_reused"][1:])
            total, later = (statistics.median(seconds(*pair, first) for pair in pairs) for first in (0, 1))
            learned = statistics.fmean(mine["held_out_sampled"] - stock["held_out_sampled"] for mine, stock in pairs)
            label = f"{name}_{updates * ROWS}"
            found += [
                headline(f"{label}_tokens_reused_after_first_pass", round(reused, 4)),
                headline(f"{label}_generation_seconds_ratio", round(total, 4), "< 1"),
                headline(f"{label}_generation_seconds_ratio_after_first_pass", round(later, 4), "< 1"),
                headline(f"{label}_held_out_accuracy_difference", round(learned, 4), ">= -0.02"),
            ]
    return found


@quiet_libraries()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "cache" / "demo" / "base")
    cache = parser.parse_args().cache
    torch.set_num_threads(1)
    held_out = held_out_problems(40)
    checkpoint, start = prepare_policy(PolicySettings(), held_out, cache, show_progress=False)
    rows: list[dict[str, Any]] = [{"arm": "before", "held_out_sampled": round(start.sampled, 4)}]
    for seed, generation, arm in itertools.product(SEEDS, GENERATIONS, ARMS):
        rows.append(run_arm(arm, generation, seed, checkpoint, training_rows(seed, held_out), held_out))
        print(rows[-1], flush=True)
    found = figures(rows[1:])
    print(*found, sep="\n")
    print(write_result("spec_rl", command=command_line("bench.spec_rl"), seeds=SEEDS, headline=found, rows=rows))


if __name__ == "__main__":
    main()
