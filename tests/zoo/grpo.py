"""The exact savings of `EffiGRPOTrainer` on scripted rollouts: no generation, the trainer's own loss."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.demo import toy

from .builders import PAD, VOCAB
from .cases import Case, stock
from .compare import MIXED_TOLERANCE, measure

#: the two rows of a group have one prompt
_PROMPTS = ((3, 3, 6, 6), (5, 5, 4, 4))
_COMPLETIONS = ((2, 7, 8, 1), (4, 8, 3, 6))
_ADVANTAGES = ((0.8, 1.0, -0.7, 0.0), (0.9, 0.0, 0.0, -1.1))
_WIDTHS = max(map(max, _PROMPTS)), max(map(max, _COMPLETIONS))


def rollouts() -> list[dict[str, Any]]:
    """Two micro-batches of one optimizer step: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(3)
    chunks = []
    for prompts, completions, advantages in zip(_PROMPTS, _COMPLETIONS, _ADVANTAGES, strict=True):
        masks = (
            torch.stack([torch.arange(_WIDTHS[0]) >= _WIDTHS[0] - n for n in prompts]).long(),
            torch.stack([torch.arange(_WIDTHS[1]) < n for n in completions]).long(),
        )
        ids = [torch.randint(3, VOCAB, mask.shape, generator=generator).masked_fill(mask == 0, PAD) for mask in masks]
        ids[0][1::2] = ids[0][::2]
        chunks.append(
            {
                "prompt_ids": ids[0],
                "prompt_mask": masks[0],
                "completion_ids": ids[1],
                "completion_mask": masks[1],
                "advantages": torch.tensor(advantages),
                # of a uniform policy: without them every ratio is 1, and the loss does not depend on the weights
                "old_per_token_logps": torch.full(masks[1].shape, -math.log(VOCAB), dtype=torch.float64),
                "num_items_in_batch": torch.tensor(sum(map(sum, _COMPLETIONS))),
            }
        )
    return chunks


@functools.cache
def _toy() -> Any:
    return toy(8)


def _trainer(case: Case, model: nn.Module, savings: str, folder: str) -> EffiGRPOTrainer:
    t = _toy()
    args = EffiGRPOConfig(
        folder,
        **{
            **t.grpo_args,
            "exact_savings": savings,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 2,
            "beta": 0.0,
            "epsilon": 1e6,  # nothing is clipped
            "forward_buckets": 3 if "trim" in savings else 0,
            "disable_tqdm": True,
            "activation_checkpointing": case.row.get("checkpointing") == "yes",
            "router_aux_loss_coef": None if case.row.get("router") == "yes" else 0.0,
        },
    )
    trainer = EffiGRPOTrainer(model, t.reward, args, t.prompts, processing_class=t.tokenizer)
    trainer.current_gradient_accumulation_steps = 2
    return trainer


def _call(trainer: EffiGRPOTrainer) -> Any:
    def call(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        chunks = trainer._forward.sorted_chunks(rollouts())
        return sum(trainer._compute_loss(model, chunk) for chunk in chunks), {}

    return call


@contextlib.contextmanager
def exact_saving(case: Case, saving: str) -> Iterator[Any]:
    """One saving against the trainer without any."""
    from .features import Pair

    with tempfile.TemporaryDirectory() as folder:
        if "grpo" not in case.cache:
            with stock():
                off = _trainer(case, case.fresh(), "off", folder)
                case.cache["grpo"] = measure(case.ready(off.model), _call(off))
        trainer = _trainer(case, case.fresh(), saving, folder)
        model = case.ready(trainer.model)
        # As in a training step: a backward with checkpointing runs layers again.
        with trainer._forward.holding_attention():
            yield Pair(case.cache["grpo"], model, _call(trainer), tolerance=MIXED_TOLERANCE, recomputes=False)
