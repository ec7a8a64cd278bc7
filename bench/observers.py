"""What the observers of a run cost inside the stock `Trainer.train()`: the doctor and the run record.

    python -m bench.observers

The same run of 240 updates with and without each callback, alternated in one process, CPU time of one thread,
beginning and end included; and the CPU time inside the callback's own events, which is finer than the noise of the
first. The model is tiny: a real update takes far longer, and the observers' work does not grow with it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from bench._progress import with_line
from bench._schema import command_line, headline, write_result
from bench.schedules import Data, build
from hf_effi.callbacks.doctor import TrainDoctor
from hf_effi.callbacks.run_record import RunRecordCallback

UPDATES, LOGGING_STEPS, ROUNDS = 240, 10, 3
SEEDS = (0, 1, 2)
ARMS = ("stock", "TrainDoctor", "RunRecordCallback")


def callbacks_of(arm: str) -> list[Any]:
    if arm == "stock":
        return []
    return [TrainDoctor(say=lambda sentence: None) if arm == "TrainDoctor" else RunRecordCallback()]


def timed(callback: Any, spent: dict[str, float]) -> Any:
    """Add the CPU seconds of a callback's events to `spent`, those of the beginning apart."""

    def measured(event: Any, part: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return event(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - start

        return call

    for name in [name for name in dir(callback) if name.startswith("on_")]:
        setattr(callback, name, measured(getattr(callback, name), "begin" if name == "on_train_begin" else "events"))
    return callback


def run(arm: str, seed: int, rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Return the CPU seconds of one `train()`, and of the callback's part in it."""
    spent = {"begin": 0.0, "events": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_steps=UPDATES,
            logging_steps=LOGGING_STEPS,
            per_device_train_batch_size=16,
            seed=seed,
        )
        callbacks = [timed(callback, spent) for callback in callbacks_of(arm)]
        trainer = Trainer(build(seed), args, train_dataset=rows, callbacks=callbacks)
        with_line(trainer, f"{arm}, seed {seed}", live=False)
        start = time.process_time()
        trainer.train()
        return {"total": time.process_time() - start, **spent}


def main() -> None:
    torch.set_num_threads(1)
    data, rows = Data(), []
    for seed in SEEDS:
        tokens = [{"input_ids": row, "labels": row} for row in data.batch(seed, 0).repeat(4, 1).unbind()]
        runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for turn in range(ROUNDS):
            for arm in ARMS if turn % 2 else ARMS[::-1]:
                runs[arm].append(run(arm, seed, tokens))
        for arm in ARMS:
            seconds = {part: round(statistics.median(r[part] for r in runs[arm]), 5) for part in runs[arm][0]}
            rows.append(
                {"arm": arm, "seed": seed, "cpu_seconds": seconds, "all": [round(r["total"], 4) for r in runs[arm]]}
            )

    def median(arm: str, value: Any) -> float:
        return statistics.median(value(row["cpu_seconds"]) for row in rows if row["arm"] == arm)

    stock = median(ARMS[0], lambda seconds: seconds["total"])
    figures = []
    for name, arm in (("doctor", "TrainDoctor"), ("record", "RunRecordCallback")):
        whole = median(arm, lambda seconds: seconds["total"]) / stock - 1
        inside = median(arm, lambda seconds: seconds["events"] / (seconds["total"] - seconds["begin"]))
        begin = median(arm, lambda seconds: seconds["begin"])
        figures += [
            headline(f"{name}_share_of_an_update", round(inside, 5), "<= 0.01"),
            headline(f"{name}_seconds_at_the_beginning", round(begin, 4)),
            headline(f"{name}_whole_run_difference", round(whole, 4)),
        ]
    write_result("observers", command=command_line("bench.observers"), seeds=SEEDS, headline=figures, rows=rows)


if __name__ == "__main__":
    main()
