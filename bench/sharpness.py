"""Does the sharpness that an optimizer sees early tell which learning rates fail, and how long a warm-up must be?

    python -m bench.sharpness            # about 8 minutes on one core
    python -m bench.sharpness --quick    # seconds: does every part run; nothing is written

A small decoder is trained from scratch on the source text of Python's standard library with AdamW and clipping as the
Trainer has them, at six peak learning rates and three warm-ups, then a constant rate. `SharpnessProbe` measures on
rows of the first batch. A run failed if its loss was not finite, if the mean of five losses rose above the first loss
after update 10, or if its held-out loss ends 0.3 nats above the best of its seed. The figure is how well the median
`rho` of the first 20 updates orders runs by that: the AUC, where 0.5 is chance. The peak learning rate alone, and the
loss at update 20, are held beside it.

Then one run at a low rate and the longest warm-up records a curve, and `suggest_warmup` reads from it how long the
warm-ups to three higher rates must be. Does a run with that warm-up train, in the sense above, and without it?
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench._schema import command_line, headline, write_result
from bench.optimizers import CLIP, build
from bench.schedules import Data
from hf_effi.callbacks import SharpnessProbe
from hf_effi.functional import metrics
from hf_effi.functional.doctor_sharpness import lr_over_sharpness
from hf_effi.functional.findings import RunFacts, TrainLimits
from hf_effi.functional.sharpness import suggest_warmup

MARGIN = 0.3


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        width, depth (`int`): Of the decoder.
        updates (`int`): Of every run.
        rates (`tuple[float, ...]`): Peak learning rates, rising.
        warmups (`tuple[int, ...]`): Updates of linear warm-up, rising.
        early (`tuple[int, ...]`): Probes whose median is the figure; all before any other one.
        late (`tuple[int, ...]`): Further probes, for the rule of the doctor.
        recorded (`float`): Peak rate of the run whose curve is read.
        asked (`tuple[float, ...]`): Peak rates that a warm-up is asked for; some of `rates`.
        seeds (`tuple[int, ...]`): Initial weights and order of the rows.
        rows (`int`): Of a probe.
        iterations (`int`): Most products of a probe.
        costs (`int`): Probes that are timed.
    """

    width: int = 48
    depth: int = 2
    updates: int = 160
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    warmups: tuple[int, ...] = (0, 20, 80)
    early: tuple[int, ...] = (5, 10, 20)
    late: tuple[int, ...] = (85, 100, 120, 140)
    recorded: float = 3e-3
    asked: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 8
    iterations: int = 8
    costs: int = 5


WHOLE = Size()
QUICK = Size(
    width=16, depth=1, updates=12, rates=(1e-3, 1.0), warmups=(0, 4), early=(2, 3), late=(6, 8, 10), asked=(1.0,),
    recorded=1e-3, seeds=(0,), rows=2, iterations=2, costs=1,
)  # fmt: skip


def run(
    data: Data, size: Size, rate: float, warmup: int, seed: int, steps: Sequence[int]
) -> tuple[dict[str, Any], SharpnessProbe]:
    """Train one model, and return its row and its probe."""
    model = build(size.width, size.depth, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    tokens = data.batch(seed, 0)[: size.rows]
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    probe = SharpnessProbe(rows, steps=tuple(steps), every=0, iterations=size.iterations)
    losses, trace = [], []
    for step in range(size.updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * (min(1.0, step / warmup) if warmup else 1.0)
        entry = {"step": step, "learning_rate": optimizer.param_groups[0]["lr"]}
        if probe.due(step):
            entry |= probe.probe(model, optimizer, step).metrics()
        trace.append(entry)
        batch = data.batch(seed, step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    means = [statistics.mean(losses[end - 5 : end]) for end in range(min(15, len(losses)), len(losses) + 1)]
    finite = all(map(math.isfinite, losses))
    early = [record.rho for record in probe.curve if record.step in size.early and math.isfinite(record.rho)]
    finding = lr_over_sharpness(trace, RunFacts(max_steps=size.updates), TrainLimits())
    return {
        "part": "run",
        "rate": rate,
        "warmup": warmup,
        "seed": seed,
        "rose": not finite or max(means) > losses[0],
        "loss": round(data.loss(model), 4) if finite else None,
        "loss_at_20": round(statistics.mean(losses[15:20] or losses), 4) if finite else None,
        "early_rho": round(statistics.median(early), 4) if early else None,
        "rhos": {str(entry["step"]): entry.get(metrics.SHARPNESS_RHO) for entry in trace if probe.due(entry["step"])},
        "doctor": finding is not None,
    }, probe


def mark(rows: Sequence[dict[str, Any]]) -> None:
    """Say of each run whether it failed, beside the best of its seed."""
    best = {
        seed: min(row["loss"] for row in rows if row["seed"] == seed and row["loss"] is not None)
        for seed in {row["seed"] for row in rows}
    }
    for row in rows:
        row["failed"] = row["rose"] or row["loss"] is None or row["loss"] > best[row["seed"]] + MARGIN


def auc(rows: Sequence[dict[str, Any]], key: str, within: str | None = None) -> float | None:
    """Return the share of pairs, a failed run and another one, in which the failed one has the larger `key`."""
    wins, pairs = 0.0, 0
    for bad in rows:
        for good in rows:
            if not bad["failed"] or good["failed"] or (within is not None and bad[within] != good[within]):
                continue
            one, other = (math.inf if row[key] is None else row[key] for row in (bad, good))
            wins += 1.0 if one > other else 0.5 if one == other else 0.0
            pairs += 1
    return round(wins / pairs, 4) if pairs else None


def advise(data: Data, size: Size, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ask for warm-ups, and train with those that end within the curve."""
    found = []
    last = size.updates - 1
    steps = sorted({*size.early, *size.late, last, *range(last // 4, last, max(1, last // 8))})
    for seed in size.seeds:
        _, probe = run(data, size, size.recorded, size.warmups[-1], seed, steps)
        records = [record for record in probe.curve if math.isfinite(record.preconditioned)]
        curve, factor = [(record.step, record.preconditioned) for record in records], records[0].factor
        best = min(row["loss"] for row in rows if row["seed"] == seed and row["loss"] is not None)
        for rate in size.asked:
            advice = suggest_warmup(curve, rate, factor)
            arms = [row for row in rows if row["seed"] == seed and row["rate"] == rate]
            row: dict[str, Any] = {
                "part": "advice",
                "rate": rate,
                "seed": seed,
                "updates": advice.updates,
                "within_curve": advice.within_curve,
                "highest_lr": advice.highest_lr,
                "failed_without": next(arm["failed"] for arm in arms if arm["warmup"] == 0),
                "loss_without": next(arm["loss"] for arm in arms if arm["warmup"] == 0),
                "best_loss_of_the_sweep": min((arm["loss"] for arm in arms if arm["loss"] is not None), default=None),
                "every_warmup_failed": all(arm["failed"] for arm in arms),
            }
            if advice.within_curve:
                trained, _ = run(data, size, rate, advice.updates, seed, size.early)
                row["loss"] = trained["loss"]
                row["failed"] = trained["rose"] or trained["loss"] > best + MARGIN
            found.append(row)
            print(row, flush=True)
    return found


def cost(data: Data, size: Size) -> dict[str, Any]:
    """Time probes with the defaults, on as many rows as a batch has, and updates, by turns."""
    model = build(size.width, size.depth, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.recorded)
    rows = [{"input_ids": row, "labels": row} for row in data.batch(0, 0)]
    probe = SharpnessProbe(rows, steps=(0,), every=1)
    updates, probes = [], []
    for step in range(10 * (size.costs + 1)):
        begin = time.process_time()
        batch = data.batch(0, step)
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        updates.append(time.process_time() - begin)
        if step % 10 == 9 and step > 9:
            begin = time.process_time()
            probe.probe(model, optimizer, step)
            probes.append(time.process_time() - begin)
    return {
        "part": "cost",
        "probe_in_updates": round(statistics.median(probes) / statistics.median(updates), 2),
        "products": [record.products for record in probe.curve],
        "residuals": [round(record.residual, 4) for record in probe.curve],
    }


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline."""
    runs = [row for row in rows if row["part"] == "run"]
    advice = [row for row in rows if row["part"] == "advice"]
    within = [row for row in advice if row["within_curve"]]
    failed, healthy = [row for row in runs if row["failed"]], [row for row in runs if not row["failed"]]

    def share(chosen: Sequence[dict[str, Any]], key: str) -> float | None:
        return round(sum(row[key] for row in chosen) / len(chosen), 4) if chosen else None

    trained = share(within, "failed")
    return [
        headline("auc_of_early_rho", auc(runs, "early_rho"), ">= 0.8"),
        headline("auc_of_early_rho_within_a_rate", auc(runs, "early_rho", "rate")),
        headline("auc_of_the_peak_rate", auc(runs, "rate")),
        headline("auc_of_the_loss_at_update_20", auc(runs, "loss_at_20")),
        headline("failed_runs", float(len(failed))),
        headline("doctor_speaks_in_failed_runs", share(failed, "doctor")),
        headline("doctor_speaks_in_healthy_runs", share(healthy, "doctor"), "<= 0"),
        headline("suggested_warmups_that_train", None if trained is None else round(1 - trained, 4), ">= 0.8"),
        headline("suggested_warmups", float(len(within))),
        headline("probe_cost_in_updates", next(row["probe_in_updates"] for row in rows if row["part"] == "cost")),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every part in seconds; nothing is written")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    size = QUICK if quick else WHOLE
    data = Data()
    if quick:
        data.held_out = data.held_out[:8]
    rows = []
    for seed in size.seeds:
        for rate in size.rates:
            for warmup in size.warmups:
                rows.append(run(data, size, rate, warmup, seed, (*size.early, *size.late))[0])
                print(rows[-1], flush=True)
    mark(rows)
    rows += advise(data, size, rows)
    rows.append(cost(data, size))
    found = figures(rows)
    for figure in found:
        print(figure)
    if not quick:
        command = command_line("bench.sharpness")
        write_result("sharpness", command=command, seeds=size.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
