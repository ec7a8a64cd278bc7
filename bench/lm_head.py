"""
The LM head on a CPU beside TRL's: what forward and backward multiply, keep alive and take, and how exact they are.

`python -m bench.lm_head [--seeds 3] [--repeats 5]`. 256 rows of width 256, a vocabulary of 65,536, fp32, one thread;
both compute in torch here, as neither has a CPU kernel. Multiply-adds and live bytes are counted; times are ratios of
medians of CPU seconds from alternated runs. On `peaked` rows the probability lies on few tokens, as in a trained
model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from bench._counters import GemmCounter, LiveBytes
from bench._schema import command_line, headline, write_result
from hf_effi.kernels.lm_head import LMHeadCounters, lm_head_log_probs

ROWS, WIDTH, VOCABULARY = 256, 256, 65_536
PAPER_EPS = 2.0**-12
LIVE_SHARE, ACTIVE_SHARE = 0.3, 0.1

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Hidden states, weight, targets, and the factor of each row's loss."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    factors: Tensor


def draw_case(seed: int, live: float = 1.0, frozen: bool = False, peaked: bool = False) -> Case:
    """Return random rows, of which a share of `live` have a gradient; `peaked` ones like few tokens."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    if peaked:
        liked = torch.randint(VOCABULARY, (ROWS, round(ACTIVE_SHARE * VOCABULARY / ROWS)), generator=generator)
        hidden, targets = 20.0 * weight[liked].sum(1), liked[:, 0].contiguous()
    factors = (torch.randperm(ROWS, generator=generator) < round(live * ROWS)).float() / ROWS
    return Case(hidden.requires_grad_(), weight.requires_grad_(not frozen), targets, factors)


def by_trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ())[0]


def ours(**options: Any) -> LogProbs:
    return lambda *tensors: lm_head_log_probs(*tensors, **options).log_probs


def step(log_probs: LogProbs, case: Case) -> list[Tensor]:
    """Return the gradients of the weighed sum of log-probs."""
    total = (log_probs(case.hidden, case.weight, case.targets) * case.factors).sum()
    return list(torch.autograd.grad(total, [t for t in case[:2] if t.requires_grad]))


def largest_error(case: Case) -> float:
    """Return the largest error of our gradients against autograd through all logits in fp64."""
    wide = Case(*(t.detach().double().requires_grad_(t.requires_grad) for t in case[:2]), case.targets, case.factors)

    def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return (hidden @ weight.t()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    return max(
        ((found - exact).abs().max() / exact.abs().max()).item()
        for found, exact in zip(step(ours(), case), step(full, wide), strict=True)
    )


def compare(log_probs: LogProbs, case: Case, repeats: int) -> dict[str, float]:
    """Return what ours needs over what TRL's needs on the same rows."""
    arms = {"trl": by_trl, "ours": log_probs}
    counts: dict[str, tuple[int, int]] = {}
    for name, run in arms.items():
        with GemmCounter() as gemms, LiveBytes() as memory:
            step(run, case)
        counts[name] = gemms.multiply_adds, memory.peak
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            start = time.process_time()
            step(run, case)
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "multiply_adds": counts["ours"][0] / counts["trl"][0],
        "live_bytes": counts["ours"][1] / counts["trl"][1],
        "cpu_seconds": medians["ours"] / medians["trl"],
    }


def measure(seed: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row per setting."""
    counters = LMHeadCounters()
    filtered = ours(column_eps=PAPER_EPS, filter_weight=True, counters=counters)
    settings = {
        "exact": (ours(), draw_case(seed)),
        "gradient_in_forward": (ours(grad_in_forward=True), draw_case(seed)),
        "frozen_head": (ours(), draw_case(seed, frozen=True)),
        "live_rows": (ours(), draw_case(seed, live=LIVE_SHARE)),
        "peaked": (ours(), draw_case(seed, peaked=True)),
        "peaked_filtered": (filtered, draw_case(seed, peaked=True)),
    }
    rows = []
    for name, (log_probs, case) in settings.items():
        row = {"seed": seed, "setting": name, **compare(log_probs, case, repeats)}
        if name in ("exact", "live_rows"):
            row["gradient_error"] = largest_error(case)
        if name == "peaked_filtered":
            row["active_columns"] = 1 - counters.columns_skipped / counters.columns
            row["dropped_mass_per_row"] = counters.dropped_mass_per_row
        rows.append({key: round(value, 8) if isinstance(value, float) else value for key, value in row.items()})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in range(args.seeds) for row in measure(seed, args.repeats)]

    def median(setting: str, key: str) -> float:
        return round(statistics.median(row[key] for row in rows if row["setting"] == setting), 4)

    goals = {"exact": "<= 1", "gradient_in_forward": "<= 0.76", "live_rows": "<= 0.5", "peaked_filtered": "<= 0.6"}
    settings = dict.fromkeys(row["setting"] for row in rows)
    error = max(row["gradient_error"] for row in rows if "gradient_error" in row)
    figures = [
        headline("lm_head_max_relative_gradient_error", error, "<= 1e-5"),
        *(headline(f"lm_head_multiply_adds_{s}", median(s, "multiply_adds"), goals.get(s)) for s in settings),
        *(headline(f"lm_head_cpu_seconds_{s}", median(s, "cpu_seconds")) for s in settings),
        *(headline(f"lm_head_live_bytes_{s}", median(s, "live_bytes")) for s in settings),
        headline("lm_head_active_columns", median("peaked_filtered", "active_columns")),
        headline("lm_head_dropped_mass_per_row", median("peaked_filtered", "dropped_mass_per_row")),
    ]
    path = write_result(
        "lm_head", command=command_line("bench.lm_head"), seeds=range(args.seeds), headline=figures, rows=rows
    )
    print(path)


if __name__ == "__main__":
    main()
