"""
Which outer step a short run from scratch wants: DiLoCo's (0.7, Nesterov 0.9) or the plain mean of the weights.

    python -m bench.local_updates_outer           # about 3 minutes on one core
    python -m bench.local_updates_outer --quick   # seconds: a few updates, one seed; writes nothing into results

Two workers take turns in one process, so nothing is sent and no time is measured: model, rows, schedule, clipping and
the outer step are those of `bench/local_updates.py`. Each arm tunes its learning rate over the same values, on a seed
of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench._schema import RESULTS, command_line, headline, write_result
from bench.local_updates import SEEDS, TUNING_SEED, rows_of
from bench.schedules import Data, build, make_optimizer
from hf_effi.functional.local_updates import LocalUpdates, flatten, outer_step, unflatten_into
from hf_effi.functional.schedules import cosine

RATES, UPDATES, ROWS = (1e-3, 2e-3), 300, 8
DDP = "ddp"


def arms_of(intervals: Sequence[int]) -> dict[str, LocalUpdates | None]:
    found: dict[str, LocalUpdates | None] = {DDP: None}
    for every in intervals:
        found[f"diloco {every}"] = LocalUpdates(every)
        found[f"mean {every}"] = LocalUpdates(every, outer_lr=1.0, outer_momentum=0.0)
    return found


def train(data: Data, local: LocalUpdates | None, rate: float, seed: int, updates: int) -> float:
    """Return the held-out loss of a run of two workers; without local updates of one with all rows."""
    workers = 1 if local is None else 2
    rows = torch.stack([row["input_ids"] for row in rows_of(data, seed, 2 * ROWS * updates)])
    batches = rows.view(updates, workers, -1, rows.shape[1])
    models = [build(seed) for _ in range(workers)]
    weights = [list(model.parameters()) for model in models]
    optimizers = [make_optimizer(model, rate) for model in models]
    schedule = cosine(updates, warmup_steps=updates // 20)
    anchor = flatten(weights[0])
    velocity = torch.zeros_like(anchor)
    for update in range(updates):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(update)
            batch = batches[update, worker]
            model(batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(weights[worker], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if local is not None and local.is_due(update + 1, updates):
            mean = (flatten(weights[0]) + flatten(weights[1])) / 2
            anchor = outer_step(anchor, mean, velocity, local.outer_lr, local.outer_momentum)
            for own in weights:
                unflatten_into(own, anchor)
    return data.loss(models[0])


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: means over seeds of the loss over DDP's of the same seed, less 1."""
    by = {(row["arm"], row["seed"]): row["held_out_loss"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    gaps = {
        arm: statistics.mean(by[arm, seed] / by[DDP, seed] - 1 for seed in seeds)
        for arm in dict.fromkeys(row["arm"] for row in rows)
    }
    return [
        headline(f"{arm.replace(' ', '_')}_relative_loss_gap", round(gap, 5), "<= 0.02")
        for arm, gap in gaps.items()
        if arm != DDP
    ]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few updates, one seed; writes nothing into results")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    arms = arms_of((2,) if quick else (10, 50))
    rates, seeds, updates = (RATES[:1], SEEDS[:1], 4) if quick else (RATES, SEEDS, UPDATES)
    data, rows = Data(), []
    for arm, local in arms.items():
        trials = {rate: train(data, local, rate, TUNING_SEED, updates) for rate in rates} if len(rates) > 1 else {}
        rate = min(trials, key=lambda one: trials[one]) if trials else rates[0]
        for seed in seeds:
            loss = train(data, local, rate, seed, updates)
            rows.append({"arm": arm, "seed": seed, "learning_rate": rate, "updates": updates, "held_out_loss": loss})
            print(rows[-1], flush=True)
    if quick and folder == RESULTS:
        folder = Path(tempfile.mkdtemp(prefix="hf_effi_outer_quick_"))
    command = command_line("bench.local_updates_outer")
    path = write_result(
        "local_updates_outer", command=command, seeds=seeds, headline=figures(rows), rows=rows, folder=folder
    )
    print(path)
    return path


if __name__ == "__main__":
    main()
