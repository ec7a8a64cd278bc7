"""Masked language modelling on a Trainer, with a masking ratio that is a function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..functional import metrics
from ..functional.data import check_count, mask_tokens, masking_ratio, seeded
from ..functional.kept_arguments import keeps_arguments
from .batch_transform import BatchTransform


class MaskingRatioCurriculum(BatchTransform):
    """
    Mask each batch when an update takes it, at a ratio that falls over the run.

    The Trainer's collator pads only (`DataCollatorWithPadding`); `labels` of the batch are replaced.

    Args:
        mask_token_id (`int`): What a masked token becomes.
        special_ids (`Sequence[int]`): Never masked: `tokenizer.all_special_ids`.
        vocab_size (`int`): Random tokens are drawn below it: `len(tokenizer)`.
        start, end (`float`, *optional*, default to 0.3 and 0.15): Ratio at the first update and at the end, in
            `(0, 1]`.
        warmup_fraction, warmup_from (`float`, *optional*, default to 0.0 and 0.15): See [`masking_ratio`].
        continues (`torch.Tensor`, *optional*): From [`continues_word`], shape `(vocab_size,)`, for whole-word masking.
        random_share, keep_share (`float`, *optional*, default to 0.1): See [`mask_tokens`].
        eval_ratio (`float`, *optional*): Ratio of evaluation, the same masks each time. Default: `end`.

    Raises:
        ValueError: an argument out of range.
    """

    @keeps_arguments
    def __init__(
        self,
        mask_token_id: int,
        special_ids: Sequence[int],
        vocab_size: int,
        *,
        start: float = 0.3,
        end: float = 0.15,
        warmup_fraction: float = 0.0,
        warmup_from: float = 0.15,
        continues: torch.Tensor | None = None,
        random_share: float = 0.1,
        keep_share: float = 0.1,
        eval_ratio: float | None = None,
    ) -> None:
        self.special = torch.tensor(list(special_ids), dtype=torch.long)
        self.curve = {"start": start, "end": end, "warmup_fraction": warmup_fraction, "warmup_from": warmup_from}
        self.eval_ratio = end if eval_ratio is None else eval_ratio
        self.masking: dict[str, Any] = {
            "mask_token_id": check_count("mask_token_id", mask_token_id, 0),
            "vocab_size": check_count("vocab_size", vocab_size),
            "continues": continues,
            "random_share": random_share,
            "keep_share": keep_share,
        }
        if continues is not None and len(continues) != vocab_size:
            raise ValueError(f"continues has {len(continues)} entries for vocab_size={vocab_size}.")
        masking_ratio(0.0, **self.curve)
        row = torch.zeros(1, 1, dtype=torch.long)  # a wrong share or ratio raises here, not in the first update
        mask_tokens(row, row == 0, self.eval_ratio, torch.Generator(), **self.masking)

    def ratio(self, step: int, total_steps: int) -> float:
        """Return the masking ratio of the update after `step` finished ones."""
        return masking_ratio(step / max(total_steps, 1), **self.curve)

    def __call__(
        self, batch: dict[str, Any], step: int, total_steps: int, generator: torch.Generator
    ) -> dict[str, Any]:
        return self._masked(batch, self.ratio(step, total_steps), generator)

    def at_evaluation(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch masked at `eval_ratio`, the same tokens each time."""
        return self._masked(batch, self.eval_ratio, seeded(int(batch["input_ids"].sum())))

    def metrics(self, step: int, total_steps: int) -> dict[str, float]:
        return {metrics.MASKING_RATIO: self.ratio(step, total_steps)}

    def _masked(self, batch: dict[str, Any], ratio: float, generator: torch.Generator) -> dict[str, Any]:
        ids = batch["input_ids"]
        maskable = ~torch.isin(ids, self.special.to(ids.device))
        if batch.get("attention_mask") is not None:
            maskable &= batch["attention_mask"].bool()
        masked, labels = mask_tokens(ids, maskable, ratio, generator, **self.masking)
        return {**batch, "input_ids": masked, "labels": labels}
