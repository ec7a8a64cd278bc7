"""Does ascending quality need a learning rate that does not decay to zero? The paper's question, at the smallest size.

Text: the sources of the Python standard library, in pieces of 96 characters. Target domain: the package `asyncio`; one
half of its files is in the training pool, the other is held out. Quality score of a piece: the log-likelihood ratio of
two character-bigram models, target against everything else, which is what a linear classifier scores. Both orders
train on the same pieces, once, with the same peak learning rate; arms differ in order, schedule and averaging only.
"""

from __future__ import annotations

import random
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bench._progress import with_line
from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.callbacks.weight_averaging import WeightAveragingCallback
from hf_effi.functional.schedules import constant, cosine
from hf_effi.samplers import QualityAscendingSampler, ShuffledSampler
from hf_effi.trainers.mixins.sampler import SamplerMixin

LENGTH, BATCH, STEPS, PEAK, TARGET = 96, 16, 240, 3e-3, "asyncio"
ORDERS = ("shuffled", "ascending")
SCHEDULES = ("cosine_to_zero", "cdma", "constant_averaged")


class _Trainer(SamplerMixin, Trainer):
    """The thin subclass."""


def pieces(paths: list[Path], length: int = LENGTH) -> Tensor:
    """Return the text of the files as character codes below 128, shape `(pieces, length)`."""
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long().clamp(max=127)
    return codes[: codes.numel() // length * length].view(-1, length)


def _bigrams(rows: Tensor) -> Tensor:
    """Return log conditional probabilities of the next character, add-one smoothed, shape `(128, 128)`."""
    counts = torch.bincount((rows[:, :-1] * 128 + rows[:, 1:]).flatten(), minlength=128 * 128).view(128, 128)
    return ((counts + 1).double() / (counts + 1).sum(1, keepdim=True)).log()


def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the training pieces of this seed, their scores, and the held-out pieces of the target domain."""
    root = Path(sysconfig.get_paths()["stdlib"])
    target = sorted((root / TARGET).glob("*.py"))
    other = sorted(
        path
        for path in root.rglob("*.py")
        if not {TARGET, "site-packages", "idlelib"} & set(path.relative_to(root).parts)
    )
    rng = random.Random(seed)
    kept, held = pieces(target[::2]), pieces(target[1::2])[:256]
    general = pieces(rng.sample(other, 150))
    pool = torch.cat([kept[: STEPS * BATCH // 8], general])
    rows = torch.randperm(pool.shape[0], generator=torch.Generator().manual_seed(seed))[: STEPS * BATCH]
    pool = pool[rows]
    ratio = _bigrams(kept) - _bigrams(general)
    return pool, ratio[pool[:, :-1], pool[:, 1:]].mean(1), held


def small_llama(length: int) -> LlamaForCausalLM:
    """Return the untrained model of the studies: two layers of width 64 over characters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=length,
        )
    )


def heldout_loss(model: Any, rows: Tensor, batch: int = 64) -> float:
    """Return the loss in nats a character."""
    model.eval()
    with torch.no_grad():
        parts = [float(model(input_ids=part, labels=part).loss) * part.shape[0] for part in rows.split(batch)]
    return sum(parts) / rows.shape[0]


def run_arm(seed: int, order: str, schedule: str) -> dict[str, Any]:
    """Train one arm and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        return _run_arm(seed, order, schedule, folder)


def _run_arm(seed: int, order: str, schedule: str, folder: str) -> dict[str, Any]:
    pool, scores, held = data(seed)
    torch.manual_seed(seed)
    model = small_llama(LENGTH)
    shapes = {
        "cosine_to_zero": cosine(warmup_fraction=0.05),
        "cdma": cosine(warmup_fraction=0.05, floor=1 / 3),
        "constant_averaged": constant(warmup_fraction=0.05),
    }
    callbacks: list[TrainerCallback] = [LRScheduleCallback(shapes[schedule])]
    if schedule != "cosine_to_zero":
        callbacks.append(WeightAveragingCallback(swap_in=True))
    sampler = QualityAscendingSampler(scores, seed=seed) if order == "ascending" else ShuffledSampler(len(pool), seed)
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=PEAK,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=[{"input_ids": piece, "labels": piece} for piece in pool],
        callbacks=callbacks,
        train_sampler=sampler,
    )
    with_line(trainer, f"{order}, {schedule}, seed {seed}").train()
    return {
        "part": "study",
        "seed": seed,
        "order": order,
        "schedule": schedule,
        "steps": trainer.state.global_step,
        "heldout_target_loss": round(heldout_loss(model, held), 5),
    }
