"""GrowLength against a fixed length: the same text, the same model, equal tokens and equal CPU time.

Text: the sources of the Python standard library, packed into rows of 1024 characters; files are either trained on or
held out. `fixed` trains on whole rows. `growing_equal_tokens` trains on the same rows in the same order, cut to 128,
256, 512 and, for the second half, 1024 characters. `growing_equal_time` takes as many updates as fit into the CPU time
of `fixed` of the same seed. All have one peak learning rate and a cosine over their own updates; the loss is measured
on whole rows.
"""

from __future__ import annotations

import random
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench._curriculum_study import heldout_loss, pieces, small_llama
from bench._progress import with_line
from hf_effi.functional.data import staged_length
from hf_effi.trainers.mixins.sequence_length import SequenceLengthMixin

LENGTHS, ROWS_A_STEP, STEPS, PEAK = (128, 256, 512, 1024), 2, 600, 3e-3
FULL = LENGTHS[-1]


class _Trainer(SequenceLengthMixin, Trainer):
    """The thin subclass."""


class _CpuTime(TrainerCallback):
    """CPU seconds from the first step to the last."""

    began = seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.began or time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.process_time() - self.began


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Return the training rows of this seed, enough for twice the updates, and 48 held-out rows of other files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "idlelib", "test", "tests"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    held = pieces(files[:20], FULL)[:48]
    return pieces(files[20:320], FULL)[: 2 * STEPS * ROWS_A_STEP], held


def run_arm(seed: int, arm: str, steps: int) -> dict[str, Any]:
    """Train one arm for so many updates and return its row."""
    rows, held = data(seed)
    torch.manual_seed(seed)
    model, watch = small_llama(FULL), _CpuTime()
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            "unused",
            max_steps=steps,
            per_device_train_batch_size=ROWS_A_STEP,
            learning_rate=PEAK,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[watch],
        sequence_length=None if arm == "fixed" else lambda step, total: staged_length(step / total, LENGTHS),
    )
    with_line(trainer, f"{arm} length, seed {seed}").train()
    return {
        "part": "length",
        "seed": seed,
        "arm": arm,
        "steps": steps,
        "tokens": steps * ROWS_A_STEP * FULL,
        "cpu_seconds": round(watch.seconds, 2),
        "heldout_loss": round(heldout_loss(model, held, batch=8), 5),
    }


def run_seed(seed: int) -> list[dict[str, Any]]:
    """Return the rows of one seed; the third arm gets the updates that the first two measurements allow."""
    fixed = run_arm(seed, "fixed", STEPS)
    grown = run_arm(seed, "growing_equal_tokens", STEPS)
    steps = round(STEPS * fixed["cpu_seconds"] / grown["cpu_seconds"])
    return [fixed, grown, run_arm(seed, "growing_equal_time", steps)]
