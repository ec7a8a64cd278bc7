"""The schedules of `bench.schedules` on a second corpus: any plain-text file of prose.

    python -m bench.schedules_prose --text FILE --title "six novels by Jane Austen"

Same model, batch, seeds and pairing as `bench.schedules`, at its long budget; the peak LR of each schedule is tuned on
a seed of its own over three values. Public-domain prose is in Debian's package r-cran-janeaustenr, for one.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from pathlib import Path
from typing import Any

import torch

from bench._schema import headline, write_result
from bench.schedules import BUDGETS, SCHEDULES, SEEDS, TUNING_SEED, Data, train

PEAKS = (1.4e-3, 2.8e-3, 5.6e-3)
#: Two-sided 5 % point of Student's t with two degrees of freedom.
T_CRITICAL = 4.303
REFERENCE = "wsd 1-sqrt 20%"


class TextData(Data):
    """Crops of a text file; characters outside ASCII are dropped, as the model knows 128 of them."""

    def __init__(self, path: Path) -> None:
        text = path.read_bytes()
        data = torch.frombuffer(bytearray(b for b in text if b < 128), dtype=torch.uint8).long()
        cut = int(len(data) * 0.95)
        self.train, self.valid, self.digest = data[:cut], data[cut:], hashlib.sha256(text).hexdigest()[:16]
        self.held_out = self._crops(self.valid, 384, torch.Generator().manual_seed(12345))


def study(data: TextData, name: str, budget: int) -> dict[str, Any]:
    """Tune the peak LR of one schedule, then run the seeds."""

    def loss(peak: float, seed: int) -> float:
        return train(data, SCHEDULES[name](budget), peak, seed)["loss"]

    tuning = {peak: loss(peak, TUNING_SEED) for peak in PEAKS}
    peak = min(tuning, key=tuning.__getitem__)
    losses = [loss(peak, seed) for seed in SEEDS]
    print(name, peak, losses, flush=True)
    return {"schedule": name, "budget": budget, "peak_lr": peak, "tuning": tuning, "losses": losses}


def against(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Add the paired difference from the reference schedule, and whether a t-test at 5 % tells it from zero."""
    gaps = [a - b for a, b in zip(row["losses"], reference["losses"], strict=True)]
    mean, spread = statistics.fmean(gaps), statistics.stdev(gaps)
    exceeds = spread > 0 and abs(mean) / (spread / len(gaps) ** 0.5) > T_CRITICAL
    return {
        **row,
        "loss_mean": round(statistics.fmean(row["losses"]), 4),
        "loss_sd": round(statistics.stdev(row["losses"]), 4),
        "minus_wsd": round(mean, 4),
        "minus_wsd_sd": round(spread, 4),
        "exceeds_noise": exceeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a plain-text file of at least 1 MB")
    parser.add_argument("--title", required=True, help="what the text is; becomes part of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, budget = TextData(args.text), BUDGETS[-1]
    rows = [study(data, name, budget) for name in SCHEDULES]
    rows = [against(row, rows[list(SCHEDULES).index(REFERENCE)]) for row in rows]
    for row in rows:
        row["corpus"] = f"{args.title}, sha256 {data.digest}"
    best = min(rows, key=lambda row: row["loss_mean"])
    write_result(
        "schedules_prose",
        command=f'python -m bench.schedules_prose --text FILE --title "{args.title}"',
        seeds=list(SEEDS),
        headline=[
            headline("wsd_minus_best_loss", rows[0]["loss_mean"] - best["loss_mean"]),
            headline("cosine_minus_wsd_loss", next(r["minus_wsd"] for r in rows if r["schedule"] == "cosine to 0")),
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
