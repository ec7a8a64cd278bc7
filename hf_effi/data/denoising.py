"""UL2's mixture of denoisers on a Trainer, for decoder-only and encoder-decoder models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import RefusedError
from ..functional.data import (
    UL2_DENOISERS,
    Denoiser,
    check_count,
    fitting_length,
    noise_counts,
    seeded,
    span_mask,
    split_spans,
)
from ..functional.kept_arguments import keeps_arguments
from .batch_transform import BatchTransform


class UL2Denoising(BatchTransform):
    """
    Turn each row of text into a denoising task, drawn from a mixture, when an update takes it.

    Decoder-only: `mode inputs separator targets eos`, padded to `max_length`, loss on `targets eos`. Encoder-decoder,
    with `max_target_length`: `input_ids` are `mode inputs eos` and `labels` are `targets eos`. Nothing is cut off: a
    row may have `row_length` tokens and always fits then.

    Args:
        sentinel_ids (`Sequence[int]`): Tokens that stand for hidden spans, in their order; no text has them.
        pad_token_id (`int`): Fills up rows.
        max_length (`int`): Tokens of `input_ids`.
        max_target_length (`int`, *optional*): Tokens of `labels`. Given: encoder-decoder. Default: decoder-only.
        denoisers (`Sequence[Denoiser]`, *optional*): The mixture. Default: the seven of UL2.
        mode_ids (`Mapping[str, int]`, *optional*): First token of each mode, such as `{"R": ..., "X": ..., "S": ...}`.
            Default: none, the mode is not told.
        separator_id (`int`, *optional*): Between inputs and targets; decoder-only. Default: none, the targets begin
            with the first sentinel.
        eos_token_id (`int`, *optional*): Ends the targets, and the inputs of an encoder.

    Attributes:
        row_length (`int`): Most tokens of a row that fit after every denoiser: pack the text to this length.

    Raises:
        ValueError: an argument out of range, too few sentinels, or a mode without a token.
        RefusedError: at the call, a batch with columns that would not fit the denoised rows.
    """

    @keeps_arguments
    def __init__(
        self,
        sentinel_ids: Sequence[int],
        pad_token_id: int,
        max_length: int,
        *,
        max_target_length: int | None = None,
        denoisers: Sequence[Denoiser] = UL2_DENOISERS,
        mode_ids: Mapping[str, int] | None = None,
        separator_id: int | None = None,
        eos_token_id: int | None = None,
    ) -> None:
        self.pad_token_id = check_count("pad_token_id", pad_token_id, 0)
        self.max_length, self.max_target_length = check_count("max_length", max_length), max_target_length
        self.encodes = max_target_length is not None
        self.denoisers, self.sentinel_ids = tuple(denoisers), list(sentinel_ids)
        if wrong := [denoiser for denoiser in self.denoisers if not isinstance(denoiser, Denoiser)]:
            raise ValueError(f"denoisers holds {wrong[0]!r}, which is no Denoiser. Pass e.g. Denoiser('R', 0.15, 3).")
        if self.encodes and separator_id is not None:
            raise ValueError("separator_id is for decoder-only models; with max_target_length labels stand alone.")
        missing = {denoiser.mode for denoiser in self.denoisers} - set(mode_ids or ())
        if mode_ids is not None and missing:
            raise ValueError(f"mode_ids has no token for {sorted(missing)}. Add them, or pass no mode_ids.")
        self.eos = [] if eos_token_id is None else [eos_token_id]
        self.separator = [] if separator_id is None else [separator_id]
        self.mode_of = {mode: [token] for mode, token in (mode_ids or {}).items()}
        self.marks = torch.tensor([*self.sentinel_ids, *self.separator, *(mode_ids or {}).values()], dtype=torch.long)
        self.row_length = self._row_length()
        self._check_marks()
        self.weights = torch.tensor([denoiser.weight for denoiser in self.denoisers], dtype=torch.float64)

    def __call__(
        self, batch: dict[str, Any], step: int, total_steps: int, generator: torch.Generator
    ) -> dict[str, Any]:
        rows = self._rows(batch)
        drawn = torch.multinomial(self.weights, len(rows), replacement=True, generator=generator).tolist()
        parts = [self._denoised(row, self.denoisers[which], generator) for row, which in zip(rows, drawn, strict=True)]
        device = batch["input_ids"].device
        return {key: value.to(device) for key, value in self._joined(parts).items()}

    def at_evaluation(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch denoised the same way each time."""
        return self(batch, 0, 1, seeded(int(batch["input_ids"].sum())))

    def _row_length(self) -> int:
        room = self.max_length - bool(self.mode_of) - len(self.separator) - len(self.eos)
        if not self.encodes:
            return fitting_length(self.denoisers, room)
        targets = check_count("max_target_length", self.max_target_length) - len(self.eos)
        return fitting_length(self.denoisers, room, targets)

    def _check_marks(self) -> None:
        if self.marks.unique().numel() != self.marks.numel() or bool((self.marks < 0).any()):
            raise ValueError(
                f"sentinel_ids, separator_id and mode_ids are {self.marks.tolist()}: each must be a token id of its "
                "own."
            )
        most = max(noise_counts(self.row_length, denoiser)[1] for denoiser in self.denoisers)
        if most > len(self.sentinel_ids):
            raise ValueError(
                f"Rows of {self.row_length} tokens are hidden in up to {most} spans, and there are "
                f"{len(self.sentinel_ids)} "
                "sentinel_ids. Add sentinel tokens to the tokenizer, lower max_length, or use longer spans."
            )

    def _rows(self, batch: dict[str, Any]) -> list[Tensor]:
        known = {"input_ids", "attention_mask", "labels"}
        other = sorted(key for key, value in batch.items() if key not in known and isinstance(value, Tensor))
        if other:
            raise RefusedError(
                f"The batch carries {other}, which do not fit the denoised rows. Use a collator that gives input_ids "
                "and attention_mask only."
            )
        ids = batch["input_ids"].cpu()
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids).bool() if mask is None else mask.cpu().bool()
        rows = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        for row in rows:
            if not 2 <= len(row) <= self.row_length:
                raise ValueError(
                    f"A row has {len(row)} tokens; 2 to row_length={self.row_length} fit. Cut the text into rows of "
                    "row_length tokens, or raise max_length."
                )
        if bool(torch.isin(ids[mask], self.marks).any()):
            raise ValueError("A row holds a sentinel, separator or mode token. Take tokens that no text has.")
        return rows

    def _denoised(self, row: Tensor, denoiser: Denoiser, generator: torch.Generator) -> tuple[list[int], list[int]]:
        inputs, targets = split_spans(row, span_mask(len(row), denoiser, generator), self.sentinel_ids)
        behind = self.eos if self.encodes else self.separator
        lead = self.mode_of.get(denoiser.mode, [])
        return [*lead, *inputs.tolist(), *behind], [*targets.tolist(), *self.eos]

    def _joined(self, parts: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        if self.encodes:
            rows = [inputs for inputs, _ in parts]
            longest = cast(int, self.max_target_length)  # checked when this was built
            labels = _filled([targets for _, targets in parts], longest, -100)
        else:
            rows = [inputs + targets for inputs, targets in parts]
            labels = _filled([[-100] * len(inputs) + targets for inputs, targets in parts], self.max_length, -100)
        return {
            "input_ids": _filled(rows, self.max_length, self.pad_token_id),
            "attention_mask": _filled([[1] * len(row) for row in rows], self.max_length, 0),
            "labels": labels,
        }


def _filled(rows: Sequence[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)
