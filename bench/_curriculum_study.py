"""Does ascending quality need a learning rate that does not decay to zero? The paper's question, at the smallest size.

Text: the sources of the Python standard library, in pieces of 96 characters. Target domain: the package `asyncio`; one half
of its files is in the training pool, the other is held out. Quality score of a piece: the log-likelihood ratio of two
character-bigram models, target against everything else, which is what a linear classifier scores. Both orders train on the
same pieces, once, with the same peak learning rate; arms differ in order, schedule and averaging only.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.functional.schedules import constant, cosine
from hf_effi.samplers import QualityAscendingSampler, ShuffledSampler
from hf_effi.trainers._sampler_mixin import SamplerMixin

LENGTH, BATCH, STEPS, PEAK, TARGET = 96, 16, 240, 3e-3, "asyncio"
AVERAGED, ALPHA = 6, 0.2
ORDERS = ("shuffled", "ascending")
SCHEDULES = ("cosine_to_zero", "cdma", "constant_averaged")


class _Trainer(SamplerMixin, Trainer):
    """The thin subclass."""


class _Average(TrainerCallback):
    """EMA over the last checkpoints, one every 1 % of the run: `m <- (1 - alpha) m + alpha theta`."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = max(1, state.max_steps // 100)
        left = state.max_steps - state.global_step
        if left % every or left // every >= AVERAGED:
            return
        now = {name: value.detach().clone() for name, value in kwargs["model"].state_dict().items()}
        self.mean = {n: (1 - ALPHA) * self.mean[n] + ALPHA * v for n, v in now.items()} if self.mean else now


def _pieces(paths: list[Path]) -> Tensor:
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long().clamp(max=127)
    return codes[: codes.numel() // LENGTH * LENGTH].view(-1, LENGTH)


def _bigrams(pieces: Tensor) -> Tensor:
    """Return log conditional probabilities of the next character, add-one smoothed, shape `(128, 128)`."""
    counts = torch.bincount((pieces[:, :-1] * 128 + pieces[:, 1:]).flatten(), minlength=128 * 128).view(128, 128)
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
    kept, held = _pieces(target[::2]), _pieces(target[1::2])[:256]
    general = _pieces(rng.sample(other, 150))
    pool = torch.cat([kept[: STEPS * BATCH // 8], general])
    rows = torch.randperm(pool.shape[0], generator=torch.Generator().manual_seed(seed))[: STEPS * BATCH]
    pool = pool[rows]
    ratio = _bigrams(kept) - _bigrams(general)
    return pool, ratio[pool[:, :-1], pool[:, 1:]].mean(1), held


def _loss(model: Any, pieces: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        parts = [float(model(input_ids=part, labels=part).loss) * part.shape[0] for part in pieces.split(64)]
    return sum(parts) / pieces.shape[0]


def run_arm(seed: int, order: str, schedule: str) -> dict[str, Any]:
    """Train one arm and return its row."""
    pool, scores, held = data(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )
    shapes = {
        "cosine_to_zero": cosine(warmup_fraction=0.05),
        "cdma": cosine(warmup_fraction=0.05, floor=1 / 3),
        "constant_averaged": constant(warmup_fraction=0.05),
    }
    average = _Average()
    sampler = QualityAscendingSampler(scores, seed=seed) if order == "ascending" else ShuffledSampler(len(pool), seed)
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            "unused",
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
        callbacks=[LRScheduleCallback(shapes[schedule]), average],
        train_sampler=sampler,
    )
    trainer.train()
    if schedule != "cosine_to_zero":
        model.load_state_dict(average.mean)
    return {
        "part": "study",
        "seed": seed,
        "order": order,
        "schedule": schedule,
        "steps": trainer.state.global_step,
        "heldout_target_loss": round(_loss(model, held), 5),
    }
