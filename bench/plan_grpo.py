"""How far is `hf-effi plan grpo --measure` from runs that it has not seen?

    python -m bench.plan_grpo            # about 3 CPU minutes on one core
    python -m bench.plan_grpo --smoke    # seconds: does every part run; nothing is written

For each seed the device is measured by the planner's own short runs, in which all completions have one length and no
group is dead. From that, and from what a user knows beforehand (lengths as histograms, pass rates, settings), four
runs of `EffiGRPOTrainer` are foretold and then made: a decoder of 0.1 million parameters in which each token ends a
completion with the probability of a uniform choice, and rewards that are coins of a pass rate drawn for each prompt.
Seconds are CPU seconds of this process on one thread, in planner and runs alike, since the machine is shared; phases
are those of the trainer, with what lies outside of them as `update`. Of a run's generations the first is left out, and
for each phase the slowest and the fastest: what happens once, as the check of an attention that is switched for the
first time, is no part of an update.

A phase enters the headline where it takes at least 5 % of the measured update; the figure is the largest error of a
mean over seeds, of all settings, whole updates and such phases.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from bench._schema import command_line, headline, write_result
from hf_effi.functional.forward_costs import ForwardCosts
from hf_effi.functional.grpo_expected import Lengths
from hf_effi.functional.grpo_plan import GRPOChoices, GRPOShape, planned_work
from hf_effi.report.measure_grpo import POINTS, Point, measure_device, random_model, timed_run
from hf_effi.report.model_shapes import build_on_meta
from hf_effi.trainers.grpo.packed import costs_of

VOCABULARY, END = 48, 1
#: share of an update from which a phase counts
COUNTS_FROM = 0.05
RATES = ((0.0, 1.0), (0.1, 1.0), (0.5, 1.0), (0.9, 1.0), (1.0, 1.0))


def ends_by_chance(longest: int) -> Lengths:
    """Return the lengths of completions that end after each token with probability 1 / `VOCABULARY`."""
    stay = 1 - 1 / VOCABULARY
    shares = [stay ** (length - 1) / VOCABULARY for length in range(1, longest)]
    return Lengths(tuple(range(1, longest + 1)), (*shares, stay ** (longest - 1)))


def even(first: int, last: int) -> Lengths:
    """Return lengths that are all as likely."""
    return Lengths(tuple(range(first, last + 1)), (1.0,) * (last - first + 1))


ALL = ("trim", "sort", "skip", "pack", "share")
#: name -> what is run: they differ in groups, lengths, savings, updates for each generation, KL and filter
SETTINGS: dict[str, tuple[GRPOShape, GRPOChoices]] = {
    "groups of 4, short, savings off": (
        GRPOShape(6, 4, 24, even(8, 16), ends_by_chance(24), RATES),
        GRPOChoices(),
    ),
    "groups of 8, long prompts, all savings, 2 updates": (
        GRPOShape(4, 8, 8, even(64, 96), ends_by_chance(32), RATES, num_iterations=2),
        GRPOChoices(ALL),
    ),
    "groups of 16, long completions, savings but skip, KL": (
        GRPOShape(2, 16, 16, even(16, 32), ends_by_chance(80), RATES, beta=0.04),
        GRPOChoices(("trim", "sort", "pack", "share")),
    ),
    "groups of 6, filter with refills, savings off, 3 updates": (
        GRPOShape(4, 6, 12, even(32, 48), ends_by_chance(48), RATES, num_iterations=3),
        GRPOChoices((), filter_rounds=3),
    ),
}


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        seeds (`tuple[int, ...]`): Of weights, prompts and coins.
        cycles (`int`): Generations of a run; the first is left out.
        points (`tuple[Point, ...]`): What the planner measures.
        measured_cycles (`int`): Generations of each of these.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    cycles: int = 9
    points: tuple[Point, ...] = POINTS
    measured_cycles: int = 3


WHOLE = Size()
SMOKE = Size(seeds=(0,), cycles=2, points=(Point(1, 2, 2, 4, 4), Point(1, 4, 4, 4, 6)), measured_cycles=2)


def config() -> Qwen3Config:
    """Return the model's config."""
    return Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0,
        eos_token_id=END, bos_token_id=None,
    )  # fmt: skip


def costs() -> ForwardCosts:
    """Return the costs by which the trainer chooses layouts."""
    return costs_of(build_on_meta(config(), "float32", None), torch.device("cpu"))


def run_seed(seed: int, size: Size, folder: Path) -> list[dict[str, Any]]:
    """Measure the device, foretell every setting, then run it."""
    device = measure_device(
        config(), costs(), points=size.points, cycles=size.measured_cycles, now=time.process_time, seed=100 + seed
    )
    rows: list[dict[str, Any]] = [
        {
            "part": "device",
            "seed": seed,
            "fit_error": round(device.error, 4),
            "seconds": round(device.seconds, 1),
            "speeds": device.speeds,
        }
    ]
    told = {
        name: planned_work(shape, choices, costs()).seconds(device.speeds)
        for name, (shape, choices) in SETTINGS.items()
    }
    model = random_model(config(), "float32", seed)
    with torch.no_grad():
        model.lm_head.weight[[0, END]] = 0.0  # a logit of 0: about as likely as any other token
    model.save_pretrained(folder / "model")
    for name, (shape, choices) in SETTINGS.items():
        found = timed_run(
            str(folder / "model"), shape, choices, folder, cycles=size.cycles, now=time.process_time, seed=seed
        )
        rows.append(
            {
                "part": "run",
                "setting": name,
                "seed": seed,
                "predicted": {phase: round(value, 5) for phase, value in told[name].items()},
                "measured": {phase: round(value, 5) for phase, value in found.items()},
            }
        )
        print(rows[-1], flush=True)
    return rows


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each setting: means over seeds, errors of the update and of its phases."""
    judged = []
    for name, (shape, choices) in SETTINGS.items():
        runs = [row for row in rows if row.get("setting") == name and row["part"] == "run"]
        means = {
            kind: {phase: statistics.mean(run[kind].get(phase, 0.0) for run in runs) for phase in runs[0]["measured"]}
            for kind in ("predicted", "measured")
        }
        predicted, measured = (
            {"step": sum(means[kind].values()), **means[kind]} for kind in ("predicted", "measured")
        )
        counted = [phase for phase, value in measured.items() if value >= COUNTS_FROM * measured["step"]]
        errors = {phase: abs(predicted[phase] - measured[phase]) / measured[phase] for phase in counted}
        judged.append(
            {
                "part": "setting",
                "setting": name,
                "savings": ",".join(choices.savings) or "off",
                "filter_rounds": choices.filter_rounds,
                **{key: getattr(shape, key) for key in ("prompts", "group_size", "num_iterations", "beta")},
                "predicted": {phase: round(value, 5) for phase, value in predicted.items()},
                "measured": {phase: round(value, 5) for phase, value in measured.items()},
                "relative_error": {phase: round(value, 4) for phase, value in errors.items()},
                "worst_seed_step": round(max(_step_error(run) for run in runs), 4),
            }
        )
    return judged


def _step_error(run: dict[str, Any]) -> float:
    told, found = sum(run["predicted"].values()), sum(run["measured"].values())
    return abs(told - found) / found


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: the largest error; beside it, that of whole updates alone, also of single seeds."""
    judged = [row for row in rows if row["part"] == "setting"]
    return [
        headline(
            "plan_grpo_max_relative_error", max(max(row["relative_error"].values()) for row in judged), "<= 0.25"
        ),
        headline("plan_grpo_max_step_error", max(row["relative_error"]["step"] for row in judged)),
        headline("plan_grpo_max_step_error_of_a_seed", max(row["worst_seed_step"] for row in judged)),
        headline("plan_grpo_fit_error", max(row["fit_error"] for row in rows if row["part"] == "device")),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part in seconds; nothing is written")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = SMOKE if parsed.smoke else dataclasses.replace(WHOLE, seeds=tuple(range(parsed.seeds)))
    rows = []
    for seed in size.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows += run_seed(seed, size, Path(folder))
    rows += judge(rows)
    found = figures(rows)
    for row in rows[-len(SETTINGS) :]:
        print(row)
    for figure in found:
        print(figure)
    if not parsed.smoke and len(size.seeds) >= 3:
        write_result("plan_grpo", command=command_line("bench.plan_grpo"), seeds=size.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
