"""Weight decay where the data repeat: 0.1 beside 0.8, 1.6 and 3.2 over many passes, and over a single one.

    python -m bench.data_repeats [--rows 256] [--quick]

A decoder of 115,008 parameters on bytes of Python's standard library. "Repeated" trains on 256 crops of 32 tokens,
about 16 times each; "single pass" trains the same updates on crops that do not come again. Every weight decay tries
the same two learning rates on a seed that is not counted. Held-out loss, three seeds that share weights and order of
the data over the arms. The finding to be seen is that of Pre-training under infinite compute: the best weight decay
is far above 0.1 where data repeat; the control is that it is not where they do not. With `--rows 64` the rows come 62
times, there is no control, and the result is `data_repeats_64.json`. `--quick` writes nothing.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench._rejected_study import by_seed, fit, mean, tuned, worst_gap
from bench._schema import RESULTS, command_line, headline, write_result
from bench.schedules import BATCH, Data, build

DECAYS, RATES, SEEDS = (0.1, 0.8, 1.6, 3.2), (4e-3, 8e-3), (0, 1, 2)
UNIQUE_ROWS, UPDATES, QUICK_UPDATES = 256, 250, 2


class RepeatedData(Data):
    """The same crops again and again, in an order that depends on the seed."""

    def __init__(self, rows: int = UNIQUE_ROWS) -> None:
        super().__init__()
        self.rows = self._crops(self.train, rows, torch.Generator().manual_seed(7))

    def batch(self, seed: int, step: int) -> torch.Tensor:
        per_pass = len(self.rows) // BATCH
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_pass)
        order = torch.randperm(len(self.rows), generator=generator)
        first = step % per_pass * BATCH
        return self.rows[order[first : first + BATCH]]


def run(data: Data, decay: float, updates: int, seed: int, lr: float) -> dict[str, Any]:
    model = build(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    fit(model, data, optimizer, updates, seed)
    tokens = data.batch(seed, updates - 1)
    with torch.no_grad():
        trained = model(tokens, labels=tokens).loss.item()
    return {"loss": round(data.loss(model), 5), "last_batch_loss": round(trained, 5)}


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> tuple[list[dict[str, Any]], list[Any]]:
    """Run all arms; return rows and headline figures, and write them unless it is quick."""
    parser = argparse.ArgumentParser(prog="python -m bench.data_repeats")
    parser.add_argument("--quick", action="store_true", help="a few updates, one seed: measures nothing")
    parser.add_argument("--rows", type=int, default=UNIQUE_ROWS, help="crops that are repeated, a multiple of 16")
    args = parser.parse_args(arguments)
    if args.rows < BATCH or args.rows % BATCH:
        parser.error(f"--rows must be a multiple of {BATCH}, got {args.rows}")
    quick, alone = args.quick, args.rows != UNIQUE_ROWS
    torch.set_num_threads(1)
    seeds, updates = ((0,), QUICK_UPDATES) if quick else (SEEDS, UPDATES)
    rows: list[dict[str, Any]] = []
    kinds = [("repeated", RepeatedData(args.rows), DECAYS), ("single pass", Data(), DECAYS[:2])]
    for name, data, decays in kinds[:1] if alone else kinds:
        for decay in decays:
            arm = f"{name}, weight decay {decay:g}"
            rows += tuned(arm, functools.partial(run, data, decay, updates), [(lr,) for lr in RATES], seeds)
    arms = [f"repeated, weight decay {decay:g}" for decay in DECAYS]
    best = min(arms, key=lambda arm: mean(by_seed(rows, arm)))
    single = [f"single pass, weight decay {decay:g}" for decay in DECAYS[:2]]
    figures = [
        headline("passes_over_the_rows", updates * BATCH / args.rows),
        headline("best_weight_decay_repeated", DECAYS[arms.index(best)], "> 0.1"),
        headline("strongest_gain_repeated", worst_gap(rows, best, arms[0]), "< 0"),
        *([] if alone else [headline("same_change_single_pass", worst_gap(rows, single[1], single[0]))]),
    ]
    for figure in figures:
        print(figure, flush=True)
    if not quick:
        write_result(
            f"data_repeats_{args.rows}" if alone else "data_repeats",
            command=command_line("bench.data_repeats"),
            seeds=seeds,
            headline=figures,
            rows=rows,
            folder=folder,
        )
    return rows, figures


if __name__ == "__main__":
    main()
