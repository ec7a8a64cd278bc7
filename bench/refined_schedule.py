"""Does a schedule refined from the gradient norms of one run beat the schedule of that run?

    python -m bench.refined_schedule            # about 3 minutes of one core
    python -m bench.refined_schedule --quick    # seconds: does every part run; nothing is written

A small decoder is trained from scratch on the source text of Python's standard library, every run by a stock
Trainer and to the end of its decay. On one seed each schedule gets a peak learning rate of its own from the same grid.
The norms are those of the best linear run of that seed, recorded by `GradientNormsCallback`; the schedule refined from
their L1 form is tuned in the same way, and all are then run on the other seeds. Runs of one seed share initial weights
and data. The cost of the recorder is the ratio of the median times of updates with and without it, which take turns in
one run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bench._schema import command_line, headline, write_result
from bench.schedules import BATCH, WARMUP, Data, build
from hf_effi import LRScheduleCallback
from hf_effi.callbacks import GradientNormsCallback
from hf_effi.schedules import Schedule, cosine, linear, norms_of, refined_by_gradient_norm


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        updates (`tuple[int, ...]`): Lengths of runs.
        peaks (`tuple[float, ...]`): Peak learning rates, the same for every schedule.
        seeds (`tuple[int, ...]`): Of the runs that are compared; the tuning has a seed of its own.
        timed (`int`): Updates that are timed, half of them with the recorder.
        wider (`int`): Times the width of the second model that is timed.
    """

    updates: tuple[int, ...] = (240,)
    peaks: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    timed: int = 400
    wider: int = 4


WHOLE = Size()
QUICK = Size(updates=(6,), peaks=(4e-3, 8e-3), seeds=(0,), timed=8, wider=1)
TUNING_SEED = 100


def trainer_of(
    data: Data, model: LlamaForCausalLM, updates: int, peak: float, seed: int, callbacks: Sequence[Any], folder: str
) -> Trainer:
    """Return a stock Trainer that sees the rows of a seed in their order, with the optimizer of the other benches."""
    rows = torch.cat([data.batch(seed, step) for step in range(updates)])
    args = TrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        max_steps=updates,
        learning_rate=peak,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows_of = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, args, train_dataset=rows_of, callbacks=[*callbacks])


def run(
    data: Data, schedule: Schedule, peak: float, seed: int, updates: int, folder: str, recorded: bool = False
) -> tuple[float, Any]:
    """Train to the end; return the loss on held-out rows and the recorded norms."""
    recorder = GradientNormsCallback()
    callbacks = [LRScheduleCallback(schedule), *([recorder] if recorded else [])]
    trainer = trainer_of(data, build(seed), updates, peak, seed, callbacks, folder)
    trainer.train()
    trainer.model.eval()
    return round(data.loss(trainer.model), 5), norms_of(trainer) if recorded else None


def compare(data: Data, updates: int, size: Size, folder: str) -> list[dict[str, Any]]:
    """Tune each schedule on the seed of the tuning, then run it on the others."""
    schedules = {"linear": linear(warmup_fraction=WARMUP), "cosine": cosine(warmup_fraction=WARMUP)}
    rows: list[dict[str, Any]] = []
    best: dict[str, float] = {}

    def tune(name: str) -> None:
        found = {}
        for peak in size.peaks:
            loss, norms = run(data, schedules[name], peak, TUNING_SEED, updates, folder, recorded=name == "linear")
            found[peak] = (loss, norms)
            rows.append({"part": "tuning", "updates": updates, "schedule": name, "peak": peak, "loss": loss})
            print(rows[-1], flush=True)
        best[name] = min(found, key=lambda peak: found[peak][0])
        if name == "linear":
            norms = found[best[name]][1]
            schedules["refined"] = refined_by_gradient_norm(norms)

    tune("linear")
    for name in ("cosine", "refined"):
        tune(name)
    curve = schedules["refined"].bind(updates).trace()
    rows.append(
        {"part": "curve", "updates": updates, "values": [round(x, 4) for x in curve[:: max(1, updates // 48)]]}
    )
    for seed in size.seeds:
        for name, schedule in schedules.items():
            loss, _ = run(data, schedule, best[name], seed, updates, folder)
            rows.append(
                {
                    "part": "run",
                    "updates": updates,
                    "schedule": name,
                    "peak": best[name],
                    "seed": seed,
                    "loss": loss,
                }
            )
            print(rows[-1], flush=True)
    return rows


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._from = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._from)


def cost(data: Data, width: int, size: Size, folder: str) -> dict[str, Any]:
    """Time updates with and without the recorder, by turns; CPU seconds, as other processes share the machine."""
    torch.manual_seed(0)
    model = build(0)
    if width > 1:
        config = model.config
        config.hidden_size, config.intermediate_size = 64 * width, 192 * width
        config.head_dim = 16 * width
        model = LlamaForCausalLM(config)
    clock = _Clock()
    recorder = GradientNormsCallback(2)
    trainer_of(data, model, size.timed, 1e-3, 0, [recorder, clock], folder).train()
    begin = min(20, size.timed // 4 * 2)
    without, with_it = (statistics.median(clock.seconds[begin + i :: 2]) for i in (0, 1))
    return {
        "part": "cost",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "update_ms": round(1000 * without, 3),
        "update_with_recorder_ms": round(1000 * with_it, 3),
        "ratio": round(with_it / without, 4),
    }


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: refined minus linear and minus cosine at each length, paired by seed; and the cost."""
    found = []
    runs = [row for row in rows if row["part"] == "run"]

    def losses(name: str, updates: int) -> list[float]:
        return [row["loss"] for row in runs if row["schedule"] == name and row["updates"] == updates]

    for updates in sorted({row["updates"] for row in runs}):
        refined = losses("refined", updates)
        for other in ("linear", "cosine"):
            gaps = [a - b for a, b in zip(refined, losses(other, updates), strict=True)]
            goal = "<= 0" if other == "linear" else None
            found.append(headline(f"refined_minus_{other}_{updates}", round(statistics.mean(gaps), 5), goal))
            if other == "linear":
                wins = sum(gap < 0 for gap in gaps) / len(gaps)
                found.append(headline(f"share_of_seeds_better_than_linear_{updates}", round(wins, 3)))
    for row in rows:
        if row["part"] == "cost":
            goal = "<= 1.02"
            found.append(headline(f"recorder_update_ratio_{row['parameters'] // 1000}k", row["ratio"], goal))
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tiny part of each; write nothing")
    given = parser.parse_args(arguments)
    size = QUICK if given.quick else WHOLE
    torch.set_num_threads(1)
    data, rows = Data(), []
    with tempfile.TemporaryDirectory() as folder:
        for width in dict.fromkeys((1, size.wider)):
            rows.append(cost(data, width, size if width == 1 else _fewer(size), folder))
            print(rows[-1], flush=True)
        for updates in size.updates:
            rows += compare(data, updates, size, folder)
    found = figures(rows)
    for figure in found:
        print(figure["name"], figure["value"], figure["goal"] or "", flush=True)
    if not given.quick:
        write_result(
            "refined_schedule",
            command=command_line("bench.refined_schedule"),
            seeds=size.seeds,
            headline=found,
            rows=rows,
        )
    return found


def _fewer(size: Size) -> Size:
    return Size(timed=max(8, size.timed // 4))


if __name__ == "__main__":
    main()
