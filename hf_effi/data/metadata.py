"""
MeCo on a Trainer: a collator that keeps metadata beside the text, and the transform that joins them until cooldown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RefusedError
from ..functional import metrics
from ..functional.data import check_count, check_number, cooldown_step, join_metadata
from ..functional.kept_arguments import keeps_arguments
from .batch_transform import BatchTransform


class MetadataCollator:
    """
    Pad plain documents on the right and carry their metadata tokens beside them, for [`MetadataConditioning`].

    Rows have `input_ids`, optionally `labels`, and `metadata_ids`: token ids without special tokens; an empty list or
    `None` is a document without metadata.

    Args:
        pad_token_id (`int`): Fills up `input_ids`.
        bos_token_id, eos_token_id (`int`, *optional*): Stay first and last where a document has them.
        max_length (`int`, *optional*): Longest row, at least 4, metadata included. Longer documents are cut.

    Raises:
        ValueError: an argument out of range, a row without tokens, or rows without the column `metadata_ids`.
        RefusedError: packed rows.

    Example:
    ```python
    >>> rows = [{"input_ids": [5, 6], "metadata_ids": [9]}, {"input_ids": [7], "metadata_ids": []}]
    >>> batch = MetadataCollator(0)(rows)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["metadata_ids"].tolist()
    ([[5, 6], [7, 0]], [[5, 6], [7, -100]], [[9], [-1]])
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        pad_token_id: int,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.pad_token_id = check_count("pad_token_id", pad_token_id, 0)
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.max_length = None if max_length is None else check_count("max_length", max_length, 4)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if not any("metadata_ids" in row for row in rows):
            raise ValueError(
                "No row has metadata_ids. Tokenize the metadata into that column ([] where there is none) and set "
                "remove_unused_columns=False."
            )
        packed = {key for row in rows for key in ("position_ids", "seq_lengths") if key in row}
        if packed:
            raise RefusedError(
                f"Rows carry {sorted(packed)}: they are packed. Pass one document per row, packing off."
            )
        ids = [_tokens(row["input_ids"])[: self.max_length] for row in rows]
        if not all(ids):
            raise ValueError("A document has no token. Filter empty documents out of the dataset.")
        labels = [_tokens(row.get("labels")) or tokens for row, tokens in zip(rows, ids, strict=True)]
        labels = [row[: self.max_length] for row in labels]
        return {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
            "labels": _padded(labels, -100),
            # -1 is no token, so that the lengths need no tensor of their own
            "metadata_ids": _padded([_tokens(row.get("metadata_ids")) for row in rows], -1),
        }


def _tokens(value: Any) -> list[int]:
    return value.tolist() if isinstance(value, Tensor) else list(value if value is not None else ())


def _padded(rows: Sequence[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)


class MetadataConditioning(BatchTransform):
    """
    Train on documents with their metadata, then on plain ones for the last share of the updates (MeCo).

    Args:
        collator (`MetadataCollator`): The Trainer's collator; special tokens and length are read from it.
        where (`str`, *optional*, defaults to `"prepend"`): `"prepend"` without loss on the metadata, or `"append"`
            with.
        cooldown_fraction (`float`, *optional*, defaults to 0.1): Plain share of the updates at the end, in `[0, 1]`.
        dropout (`float`, *optional*, defaults to 0.0): Share of documents that stay plain before that, in `[0, 1]`.

    Raises:
        ValueError: an argument out of range, or a batch that did not come from the collator.
    """

    columns = ("metadata_ids",)

    @keeps_arguments
    def __init__(
        self,
        collator: MetadataCollator,
        where: Literal["prepend", "append"] = "prepend",
        *,
        cooldown_fraction: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        if not isinstance(collator, MetadataCollator):
            raise ValueError(f"collator={collator!r} must be the MetadataCollator that the Trainer uses.")
        if where not in ("prepend", "append"):
            raise ValueError(f"where={where!r} is not known. Use 'prepend' or 'append'.")
        self.collator, self.where = collator, where
        self.cooldown_fraction = check_number("cooldown_fraction", cooldown_fraction, 0, 1)
        self.dropout = check_number("dropout", dropout, 0, 1)

    def conditioned(self, step: int, total_steps: int) -> bool:
        """Return whether this update (finished updates before it) sees metadata."""
        return step < cooldown_step(total_steps, self.cooldown_fraction)

    def __call__(
        self, batch: dict[str, Any], step: int, total_steps: int, generator: torch.Generator
    ) -> dict[str, Any]:
        plain = self.at_evaluation(batch)
        metadata = batch["metadata_ids"]
        if not self.conditioned(step, total_steps) or not metadata.shape[1]:
            return plain
        lengths = (metadata >= 0).sum(dim=1)
        kept = torch.rand(len(metadata), generator=generator, dtype=torch.float64) >= self.dropout
        return join_metadata(
            batch["input_ids"],
            batch["labels"],
            batch["attention_mask"].sum(dim=1),
            metadata,
            lengths * kept.to(lengths.device),
            self.where,
            pad_token_id=self.collator.pad_token_id,
            bos_token_id=self.collator.bos_token_id,
            eos_token_id=self.collator.eos_token_id,
            max_length=self.collator.max_length,
        )

    def at_evaluation(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the plain documents."""
        if "metadata_ids" not in batch:
            raise ValueError("The batch has no metadata_ids. Give the Trainer data_collator=MetadataCollator(...).")
        return {key: value for key, value in batch.items() if key != "metadata_ids"}

    def metrics(self, step: int, total_steps: int) -> dict[str, float]:
        return {metrics.METADATA: float(self.conditioned(step, total_steps))}
