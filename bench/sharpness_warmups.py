"""Is a warm-up that `suggest_warmup` names worth having? Two peaks that are within reach of the recorded curve.

    python -m bench.sharpness_warmups            # about 2 minutes on one core
    python -m bench.sharpness_warmups --quick    # seconds; nothing is written

Run after `bench.sharpness`, in which it named no warm-up that ends within the run: all peaks that were asked for lay
at the edge or above it. The decoder, the curve and the meaning of "failed" are those of that bench. Each peak is
trained without a warm-up, and with what is suggested, if that ends within the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bench._schema import command_line, headline, write_result
from bench.schedules import Data
from bench.sharpness import QUICK, WHOLE, advise, mark, run

PEAKS = (5e-3, 7e-3)


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline; a gain is the loss without a warm-up minus the loss with the suggested one."""
    advice = [row for row in rows if row["part"] == "advice"]
    within = [row for row in advice if row["within_curve"]]
    gains = [row["loss_without"] - row["loss"] for row in within]
    return [
        headline("suggested_warmups", float(len(within))),
        headline(
            "suggested_warmups_that_train",
            round(1 - sum(row["failed"] for row in within) / len(within), 4) if within else None,
            ">= 0.8",
        ),
        headline("mean_gain_over_no_warmup", round(statistics.mean(gains), 4) if gains else None, "> 0"),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every part in seconds; nothing is written")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    # The quick one asks for the rate of the curve itself, so that a warm-up is named and trained.
    peaks = (QUICK.recorded,) if quick else PEAKS
    size = dataclasses.replace(QUICK if quick else WHOLE, rates=peaks, asked=peaks, warmups=(0, 4 if quick else 80))
    data, rows = Data(), []
    if quick:
        data.held_out = data.held_out[:8]
    for seed in size.seeds:
        for rate in size.rates:
            rows.append(run(data, size, rate, 0, seed, size.early)[0])
            print(rows[-1], flush=True)
    mark(rows)
    rows += advise(data, size, rows)
    found = figures(rows)
    for figure in found:
        print(figure)
    if not quick:
        command = command_line("bench.sharpness_warmups")
        write_result("sharpness_warmups", command=command, seeds=size.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
