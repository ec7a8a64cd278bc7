"""What the observers of a run cost inside the stock `Trainer.train()`: the doctor and the run record.

    python -m bench.observers

The same run of 240 updates with and without each callback, alternated in one process, CPU time of one thread, beginning and
end included. The model is tiny: a real update takes far longer, and the observers' work does not grow with it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from bench._schema import command_line, headline, write_result
from bench.schedules import Data, build
from hf_effi.callbacks.doctor import TrainDoctor
from hf_effi.callbacks.run_record import RunRecordCallback

UPDATES, LOGGING_STEPS, ROUNDS = 240, 10, 5
SEEDS = (0, 1, 2)
ARMS = ("stock", "TrainDoctor", "RunRecordCallback")


def callbacks_of(arm: str) -> list[Any]:
    if arm == "stock":
        return []
    return [TrainDoctor(say=lambda sentence: None) if arm == "TrainDoctor" else RunRecordCallback()]


def cpu_seconds(arm: str, seed: int, rows: list[dict[str, torch.Tensor]]) -> float:
    """Return the CPU seconds of one `train()`."""
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
        trainer = Trainer(build(seed), args, train_dataset=rows, callbacks=callbacks_of(arm))
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    data, rows, shares = Data(), [], {arm: [] for arm in ARMS[1:]}
    for seed in SEEDS:
        tokens = [{"input_ids": row, "labels": row} for row in data.batch(seed, 0).repeat(4, 1).unbind()]
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for turn in range(ROUNDS):
            for arm in ARMS if turn % 2 else ARMS[::-1]:
                seconds[arm].append(cpu_seconds(arm, seed, tokens))
        for arm in ARMS:
            rows.append({"arm": arm, "seed": seed, "cpu_seconds": [round(value, 4) for value in seconds[arm]]})
        for arm, found in shares.items():
            found.append(statistics.median(seconds[arm]) / statistics.median(seconds["stock"]) - 1)
    write_result(
        "observers",
        command=command_line("bench.observers"),
        seeds=SEEDS,
        headline=[
            headline(f"{name}_overhead_fraction", round(statistics.median(shares[arm]), 4), "<= 0.02")
            for name, arm in {"doctor": "TrainDoctor", "record": "RunRecordCallback"}.items()
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
