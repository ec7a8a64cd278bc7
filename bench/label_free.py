"""
RL without labels or with one problem, beside labelled RL and beside controls, at equal prompts and updates.

    python -m bench.label_free [--quick] [--parts vote,few,best] [--cache FOLDER]

The task and the policy of the demo (chains of one-digit sums). Three parts, three seeds:

- `vote`: the majority of the completions of a prompt in the place of its label (TTRL), beside the labels and beside
  two controls: the answer of one completion drawn at random for the label, and the label of another prompt. Every arm
  has the same prompts in the same order. How often a vote is right is recorded and enters no reward.
- `few`: labelled RL on 1, 4 and 16 prompts whose accuracy moved most in the labelled run of the same seed, and on one
  prompt at random as control.
- `best`: one problem with a reward between 0 and 1 (characters of a text that are at their place); entropic advantages
  beside TRL's, by the best completion of the run.

CPU seconds of one thread are split by phase. `--quick` runs every part on tiny sizes and writes into the cache folder.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3ForCausalLM

from bench._progress import with_line
from bench._schema import ROOT, command_line, headline, write_result
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.callbacks import PassRateHistoryCallback
from hf_effi.data import repeat_rows
from hf_effi.demo.command import quiet_libraries
from hf_effi.demo.measure import Instrument, evaluate_policy
from hf_effi.demo.policy import PolicySettings, prepare_policy
from hf_effi.demo.task import (
    MAX_COMPLETION_TOKENS,
    Problem,
    build_tokenizer,
    exact_answer_reward,
    final_number,
    held_out_problems,
    training_problems,
)
from hf_effi.functional import metrics
from hf_effi.functional.data import seeded
from hf_effi.functional.rewards import is_answer
from hf_effi.functional.rollouts import high_variance_rows
from hf_effi.rewards import MajorityVoteReward
from hf_effi.selection import EntropicAdvantages, group_reward

LABELS, VOTE, RANDOM_VOTE, OTHER = "labels", "majority vote", "random vote", "label of another prompt"
FEW = (1, 4, 16)
MEAN, ENTROPIC = "mean baseline", "entropic"
PARTS = ("vote", "few", "best")
#: characters that the answer of the one problem is made of
LETTERS = "0123456789+-="


@dataclass(frozen=True)
class Size:
    """What a run of the bench costs."""

    prompts: int = 128
    rows: int = 256
    group: int = 8
    updates: int = 16
    per_length: int = 20
    best_updates: int = 30
    best_rows: int = 64
    best_length: int = 10
    completion_tokens: int = MAX_COMPLETION_TOKENS
    learning_rate: float = 3e-4
    seeds: tuple[int, ...] = (0, 1, 2)
    policy: PolicySettings = PolicySettings()

    def quick(self) -> Size:
        """Return a variant in which every part runs and nothing is learned."""
        policy = PolicySettings(hidden_size=32, num_layers=1, intermediate_size=32, sft_steps=4, sft_batch_size=4)
        return replace(
            self, prompts=8, rows=16, completion_tokens=6, group=4, updates=4, per_length=1, best_updates=2,
            best_rows=8, best_length=3, seeds=(0,), policy=policy,
        )  # fmt: skip


class RandomVote:
    """The control of the vote: the answer of one completion of the group, drawn at random, is the label."""

    def __init__(self, seed: int) -> None:
        self.generator = seeded(seed, 7)

    def __call__(self, prompts: Any, completions: Any, group_size: int, **kwargs: Any) -> list[float | None]:
        answers = [final_number(text) for text in completions]
        found: list[float | None] = []
        for first in range(0, len(answers), group_size):
            group = answers[first : first + group_size]
            readable = [answer for answer in group if is_answer(answer)]
            if not readable:
                found += [None] * len(group)
                continue
            label = readable[int(torch.randint(len(readable), (1,), generator=self.generator))]
            found += [float(answer == label) for answer in group]
        return found


class Matches:
    """Share of the characters of a text that stand at their place; remembers the best completion so far."""

    def __init__(self, target: str) -> None:
        self.target, self.best, self.curve = target, 0.0, list[float]()
        self.__name__ = "matches"

    def __call__(self, completions: Sequence[str], **kwargs: Any) -> list[float]:
        longest = [max(len(text), len(self.target)) for text in completions]
        right = [sum(a == b for a, b in zip(text, self.target, strict=False)) for text in completions]
        found = [hits / length for hits, length in zip(right, longest, strict=True)]
        self.best = max(self.best, *found)
        self.curve.append(round(self.best, 4))
        return found


def training_rows(seed: int, size: Size, held_out: Sequence[Problem]) -> Dataset:
    """Return the prompts of a seed, all different, with their answers and those of other prompts."""
    problems: dict[str, Problem] = {}
    for problem in training_problems(1000 + seed, held_out):
        problems.setdefault(problem.prompt, problem)
        if len(problems) == size.prompts:
            break
    rows = list(problems.values())
    random.Random(seed).shuffle(rows)
    answers = [row.answer for row in rows]
    # Shifted by one, so that no prompt has its own, but for equal answers.
    other = answers[1:] + answers[:1]
    return Dataset.from_dict({"prompt": [row.prompt for row in rows], "answer": answers, "other": other})


def other_label_reward(completions: list[str], other: list[int], **kwargs: Any) -> list[float]:
    """Reward the label of another prompt."""
    return exact_answer_reward(completions, other)


def rewards_of(arm: str, seed: int) -> Any:
    """Return the reward function of an arm of the first part."""
    if arm == VOTE:
        return MajorityVoteReward(final_number, column="answer", name="reward")
    if arm == RANDOM_VOTE:
        return group_reward(RandomVote(seed), name="reward")
    return other_label_reward if arm == OTHER else exact_answer_reward


class Bench:
    """The policy, and the runs that begin from it."""

    def __init__(self, size: Size, cache: Path) -> None:
        self.size, self.tokenizer = size, build_tokenizer()
        self.held_out = held_out_problems(size.per_length)
        self.checkpoint, start = prepare_policy(size.policy, self.held_out, cache, show_progress=False)
        self.start = round(start.sampled, 4)

    def train(self, name: str, seed: int, reward: Any, rows: Dataset, **over: Any) -> tuple[Any, dict[str, Any]]:
        """Return the trained trainer, and the CPU seconds of each phase."""
        size, callbacks = self.size, over.pop("callbacks", [])
        objects = {"advantage_transform": over.pop("advantage_transform", None)}
        with tempfile.TemporaryDirectory() as folder:
            args = EffiGRPOConfig(
                folder, use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none",
                save_strategy="no", disable_tqdm=True, logging_steps=1, seed=seed,
                **{
                    "max_steps": size.updates, "per_device_train_batch_size": size.rows,
                    "num_generations": size.group, "max_completion_length": size.completion_tokens, **over,
                },
                learning_rate=size.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=2,
                adam_beta2=0.95, max_grad_norm=1.0, beta=0.0, loss_type="dapo",
            )  # fmt: skip
            trainer = EffiGRPOTrainer(
                Qwen3ForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32),
                reward,
                args,
                rows,
                processing_class=self.tokenizer,
                callbacks=callbacks,
                **objects,
            )
            meter = Instrument(trainer)
            meter.start()
            with_line(trainer, f"{name}, seed {seed}").train()
            cpu = {phase: round(seconds, 2) for phase, seconds in meter.split()[1].items()}
        return trainer, cpu

    def row(self, part: str, arm: str, seed: int, trainer: Any, cpu: dict[str, float]) -> dict[str, Any]:
        """Return the record of a run whose policy is tested on the held-out prompts."""
        accuracy = evaluate_policy(trainer.model, self.tokenizer, self.held_out, samples_per_prompt=4, seed=1)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        votes = {
            name: [round(entry[metrics.LABEL + name], 4) for entry in log if metrics.LABEL + name in entry]
            for name in ("majority_ratio", "abstained", "accuracy")
        }
        return {
            "part": part,
            "arm": arm,
            "seed": seed,
            "held_out_sampled": round(accuracy.sampled, 4),
            "held_out_greedy": round(accuracy.greedy, 4),
            "reward": [round(entry["reward"], 4) for entry in log if "reward" in entry],
            "entropy": [round(entry["entropy"], 4) for entry in log if "entropy" in entry],
            "votes": votes if any(votes.values()) else None,
            "cpu_seconds": cpu,
        }

    def of_seed(self, seed: int, parts: Sequence[str]) -> list[dict[str, Any]]:
        """Return the records of one seed."""
        rows, found = training_rows(seed, self.size, self.held_out), []
        history = PassRateHistoryCallback()
        arms = (LABELS, VOTE, RANDOM_VOTE, OTHER) if "vote" in parts else (LABELS,) if "few" in parts else ()
        for arm in arms:
            callbacks = [history] if arm == LABELS else []
            trainer, cpu = self.train(arm, seed, rewards_of(arm, seed), rows, callbacks=callbacks)
            found.append(self.row("vote", arm, seed, trainer, cpu))
        if "few" in parts:
            found += self.few(seed, rows, history)
        if "best" in parts:
            found += [self.best(arm, seed) for arm in (MEAN, ENTROPIC)]
        return found

    def few(self, seed: int, rows: Dataset, history: PassRateHistoryCallback) -> list[dict[str, Any]]:
        """Train on a few prompts that the history chooses, and on one that chance does."""
        size, found = self.size, []
        chosen: dict[str, list[int]] = {f"{k} of high variance": [] for k in FEW}
        for k, arm in zip(FEW, chosen, strict=True):
            try:
                chosen[arm] = high_variance_rows(history.table(len(rows)), k)
            except ValueError as error:  # a run in which too few moved is a result
                found.append({"part": "few", "arm": arm, "seed": seed, "missing": str(error)})
        chosen["1 at random"] = [random.Random(seed).randrange(len(rows))]
        for arm, numbers in chosen.items():
            if not numbers:
                continue
            prompts = size.rows // size.group
            repeated = repeat_rows(rows, numbers, -(-prompts // len(numbers)) * len(numbers))
            trainer, cpu = self.train(arm, seed, exact_answer_reward, repeated)
            found.append({**self.row("few", arm, seed, trainer, cpu), "rows": numbers})
        return found

    def best(self, arm: str, seed: int) -> dict[str, Any]:
        """Search for one text."""
        size, drawn = self.size, random.Random(500 + seed)
        matches = Matches("".join(drawn.choice(LETTERS) for _ in range(size.best_length)))
        rows = Dataset.from_dict({"prompt": ["1+1="] * size.best_rows})
        trainer, cpu = self.train(
            arm, seed, matches, rows, max_steps=size.best_updates, per_device_train_batch_size=size.best_rows,
            num_generations=size.best_rows, max_completion_length=size.best_length + 2,
            advantage_transform=EntropicAdvantages() if arm == ENTROPIC else None,
        )  # fmt: skip
        log = [round(entry["reward"], 4) for entry in trainer.state.log_history if "reward" in entry]
        return {
            "part": "best", "arm": arm, "seed": seed, "best": round(matches.best, 4), "best_curve": matches.curve,
            "reward": log, "cpu_seconds": cpu,
        }  # fmt: skip


def figures(start: float, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline figures: means over the seeds."""
    found: list[dict[str, Any]] = []

    def mean(part: str, arm: str, key: str) -> float | None:
        values = [row[key] for row in rows if row["part"] == part and row["arm"] == arm and key in row]
        return statistics.fmean(values) if values else None

    def add(name: str, value: float | None, base: float | None, goal: str | None = None) -> None:
        if value is not None and base is not None:
            found.append(headline(name, round(value - base, 4), goal))

    held_out = "held_out_sampled"
    labels, vote = mean("vote", LABELS, held_out), mean("vote", VOTE, held_out)
    add("labelled_accuracy_gain", labels, start)
    add("majority_vote_accuracy_gain", vote, start, "> 0")
    add("majority_vote_minus_labels", vote, labels)
    add("majority_vote_minus_random_vote", vote, mean("vote", RANDOM_VOTE, held_out), "> 0")
    add("majority_vote_minus_label_of_another_prompt", vote, mean("vote", OTHER, held_out), "> 0")
    for k in FEW:
        few = mean("few", f"{k} of high variance", held_out)
        add(f"{k}_prompt{'s' if k > 1 else ''}_accuracy_gain", few, start, "> 0")
    add(
        "1_prompt_minus_1_at_random", mean("few", "1 of high variance", held_out), mean("few", "1 at random", held_out)
    )
    add("entropic_best_minus_mean_baseline_best", mean("best", ENTROPIC, "best"), mean("best", MEAN, "best"), "> 0")
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the bench; returns the result file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "cache" / "demo" / "base")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, with commas between")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, results into the cache folder")
    args = parser.parse_args(arguments)
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}. Known: {', '.join(PARTS)}.")
    torch.set_num_threads(1)
    size = Size().quick() if args.quick else Size()
    with quiet_libraries():
        bench = Bench(size, args.cache / "quick" if args.quick else args.cache)
        rows: list[dict[str, Any]] = [{"part": "before", "arm": "before", "held_out_sampled": bench.start}]
        for seed in size.seeds:
            for row in bench.of_seed(seed, parts):
                rows.append(row)
                print(row, flush=True)
    found = figures(bench.start, rows)
    print(*found, sep="\n")
    whole = set(parts) == set(PARTS) and not args.quick
    folder = {} if whole else {"folder": args.cache / "results"}
    path = write_result(
        "label_free", command=command_line("bench.label_free"), seeds=size.seeds, headline=found, rows=rows, **folder
    )
    print(path)
    return path


if __name__ == "__main__":
    main()
