"""What choosing costs: CPU seconds of prompt selectors on a million rows, and of dividing completions over prompts.

`python -m bench.selection_overhead` writes `bench/results/selection_overhead.json`. One thread; no model is involved.
A generation draws 512 prompts of a million and learns from 8 completions of each; the first call, which makes the
tables, is left out. Allocators divide 8 or 16 completions a prompt on average, without an upper bound. Each figure is
the median over seeds of the median of a run's repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench._schema import command_line, headline, write_result
from hf_effi.protocols import RolloutGroups
from hf_effi.selection import DUMP, GRESO, VIP, AdaRFT, Knapsack, MoPPS, OfflineCurriculum

ROWS, DRAWN, GROUP = 1_000_000, 512, 8
#: prompts of a generation, and completions of all of them
DIVIDED = ((128, 2048), (512, 4096), (512, 8192))


def selectors(rows: int, seed: int) -> dict[str, Any]:
    """Return one selector of each kind, with random columns."""
    rates = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "GRESO": GRESO(rows, seed=seed),
        "MoPPS": MoPPS(rows, seed=seed),
        "MoPPS, all rows as candidates": MoPPS(rows, candidates=None, seed=seed),
        "BOTS": MoPPS(forget=0.1, rho=0.1, weak=rates / 2, strong=rates, seed=seed),
        "DUMP": DUMP((rates * 12).long(), seed=seed),
        "AdaRFT": AdaRFT(1 - rates, seed=seed),
        "OfflineCurriculum": OfflineCurriculum(rates, seed=seed),
    }


def answers(count: int, step: int, generator: torch.Generator) -> RolloutGroups:
    """Return groups of prompts whose pass rates are uniform."""
    rates = torch.rand(count, 1, generator=generator)
    rewards = (torch.rand(count, GROUP, generator=generator) < rates).float()
    lengths = torch.ones(count, GROUP, dtype=torch.long)
    advantages = rewards - rewards.mean(1, keepdim=True)
    return RolloutGroups(rewards, advantages, lengths, step, pass_rates=rewards.double().mean(1))


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    result = call()
    return time.process_time() - begun, result


def measure_selector(selector: Any, repeats: int, seed: int) -> tuple[float, float]:
    """Return the median CPU seconds of `select` and of `observe`."""
    generator = torch.Generator().manual_seed(seed)
    chosen, learned = [], []
    for step in range(repeats + 1):
        seconds, rows = seconds_of(lambda: selector.select(DRAWN, exclude=frozenset(range(DRAWN))))
        groups = answers(len(rows), step, generator)
        chosen.append(seconds)
        learned.append(seconds_of(lambda rows=rows, groups=groups: selector.observe(rows, groups))[0])
    return statistics.median(chosen[1:]), statistics.median(learned[1:])


def measure_allocator(allocator: Any, prompts: int, budget: int, repeats: int, seed: int) -> float:
    """Return the median CPU seconds of `allocate`, after one pass over the prompts."""
    generator = torch.Generator().manual_seed(seed)
    allocator.attach(SimpleNamespace(size=prompts, group_size=budget // prompts, seed=seed))
    rows = list(range(prompts))
    allocator.observe(rows, answers(prompts, 0, generator))
    return statistics.median(seconds_of(lambda: allocator.allocate(rows, budget))[0] for _ in range(repeats))


def run(seeds: Sequence[int], repeats: int, rows: int, divided: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return one row for each selector, and one for each allocator and size."""
    found = []
    for name in selectors(10, 0):
        pairs = [measure_selector(selectors(rows, seed)[name], repeats, seed) for seed in seeds]
        choose, learn = (round(statistics.median(values), 4) for values in zip(*pairs, strict=True))
        found.append({"part": "selector", "name": name, "rows": rows, "select": choose, "observe": learn})
    for name, make in (("VIP", VIP), ("VIP, relaxed", lambda: VIP(solver="relaxed")), ("Knapsack", Knapsack)):
        for prompts, budget in divided:
            values = [measure_allocator(make(), prompts, budget, max(1, repeats // 3), seed) for seed in seeds]
            seconds = round(statistics.median(values), 4)
            found.append(
                {"part": "allocator", "name": name, "prompts": prompts, "completions": budget, "seconds": seconds}
            )
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = list(range(args.seeds))
    rows = run(seeds, args.repeats, ROWS, DIVIDED)
    slowest = max(
        row["select"] + row["observe"] for row in rows if row["part"] == "selector" and "," not in row["name"]
    )
    figures = [headline("select_and_observe_seconds_1m_rows", round(slowest, 4), "< 1")]
    for row in rows:
        print(row)
    return write_result(
        "selection_overhead",
        command=command_line("bench.selection_overhead"),
        seeds=seeds,
        headline=figures,
        rows=rows,
    )


if __name__ == "__main__":
    main()
