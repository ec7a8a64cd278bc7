"""Log-probs that wait until it is known which rows stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredLogProbs:
    """
    Stands in for the log-probs that TRL asks for while it generates, in one call of `_generate_and_score_completions`.

    Dropped rows would pay for them. TRL gets a placeholder for each forward, and the entry of its output that holds
    the very same tensor is the one to compute later: so nothing of TRL's conditions for these forwards is repeated
    here.
    """

    def __init__(self) -> None:
        self._placeholders: list[Tensor] = []

    def put_off(self, attention_mask: Tensor, columns: int) -> Tensor:
        """
        Return what stands for log-probs, shape `(rows, columns)`.

        Args:
            attention_mask (`torch.Tensor`): Of the forward, shape `(rows, any)`.
            columns (`int`): Completion tokens of a row.
        """
        placeholder = attention_mask.new_zeros(attention_mask.size(0), columns, dtype=torch.float32)
        self._placeholders.append(placeholder)
        return placeholder

    def entries_of(self, batch: dict[str, Any]) -> tuple[str, ...]:
        """
        Return the names of the entries that hold a placeholder, in the order in which they were asked for.

        Raises:
            RuntimeError: one is in no entry, so that something was computed from it.
        """
        found = [[name for name, value in batch.items() if value is placeholder] for placeholder in self._placeholders]
        if not all(found):
            raise RuntimeError(
                "log-probs that were asked for during the generation are in no entry of the batch that it returns. "
                "They were put off until the rows are chosen, and are zero until then: compute nothing from them in "
                "an override of `_generate` or `_generate_and_score_completions`, or turn off prompt selection, "
                "difficulty filtering, pruning and the exact saving 'skip'."
            )
        return tuple(name for names in found for name in names)
