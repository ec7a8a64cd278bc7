"""A predictor that costs next to nothing beside a forward pass: naive Bayes on which tokens occur in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ._checks import check_count, check_number


class BernoulliBayes:
    """
    Two-class naive Bayes on token occurrence, learned row by row: `log P(c) + sum_v log P(x_v | c)`.

    `P(x_v = 1 | c) = (n_vc + alpha) / (n_c + 2 alpha)`, and the sum runs over the absent tokens too.
    `P(c) = (n_c + alpha) / (n + 2 alpha)`, so that a class without a row is unlikely, not impossible.

    Args:
        num_tokens (`int`): Tokens are in `[0, num_tokens)`.
        alpha (`float`, *optional*, defaults to 1.0): Smoothing, positive.

    Raises:
        ValueError: an argument out of range, or a token that is.

    Example:
    ```python
    >>> bayes = BernoulliBayes(3)
    >>> bayes.update([[0, 1], [2]], [True, False])
    >>> [round(float(p), 4) for p in bayes.log_probabilities([[0, 1]]).exp()[0]]
    [0.1111, 0.8889]
    ```
    """

    def __init__(self, num_tokens: int, alpha: float = 1.0) -> None:
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.alpha = check_number("alpha", alpha, 0, open_low=True)
        self.rows = torch.zeros(2, dtype=torch.float64)
        self.tokens = torch.zeros(2, num_tokens, dtype=torch.float64)

    def update(self, rows: Sequence[Sequence[int] | Tensor], labels: Tensor | Sequence[bool]) -> None:
        """
        Count rows of tokens with their labels; a token that occurs twice in a row counts once.

        Raises:
            ValueError: another number of labels than rows, or a token out of range.
        """
        classes = torch.as_tensor(labels).long()
        if classes.numel() != len(rows):
            raise ValueError(f"{classes.numel()} labels for {len(rows)} rows. Give one label per row.")
        place, token = self._occurrences(rows)
        self.rows += torch.bincount(classes, minlength=2)
        flat = classes[place] * self.num_tokens + token
        self.tokens += torch.bincount(flat, minlength=2 * self.num_tokens).view(2, -1)

    def log_probabilities(self, rows: Sequence[Sequence[int] | Tensor]) -> Tensor:
        """Return `log P(class | row)`, shape `(num_rows, 2)`, float64."""
        place, token = self._occurrences(rows)
        present = ((self.tokens + self.alpha) / (self.rows + 2 * self.alpha)[:, None]).log()
        absent = ((self.rows[:, None] - self.tokens + self.alpha) / (self.rows + 2 * self.alpha)[:, None]).log()
        prior = ((self.rows + self.alpha) / (self.rows.sum() + 2 * self.alpha)).log()
        scores = (prior + absent.sum(1)).repeat(len(rows), 1)
        scores.index_add_(0, place, (present - absent).T[token])
        return scores.log_softmax(1)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"rows": self.rows.clone(), "tokens": self.tokens.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Take back what [`~BernoulliBayes.state_dict`] returned.

        Raises:
            MismatchError: counts of another number of tokens.
        """
        if state["tokens"].shape != self.tokens.shape:
            raise MismatchError(
                f"The counts are for {state['tokens'].shape[1]} tokens, this predictor has {self.num_tokens}."
            )
        self.rows, self.tokens = state["rows"].clone(), state["tokens"].clone()

    def _occurrences(self, rows: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
        """Return the row number and the token of each occurrence, a token once per row."""
        bags = [torch.as_tensor(row, dtype=torch.long).unique() for row in rows]
        sizes = torch.tensor([bag.numel() for bag in bags], dtype=torch.long)
        token = torch.cat(bags) if bags else torch.empty(0, dtype=torch.long)
        if token.numel() and not 0 <= int(token.min()) <= int(token.max()) < self.num_tokens:
            raise ValueError(
                f"Tokens reach from {int(token.min())} to {int(token.max())}, outside [0, {self.num_tokens})."
            )
        return torch.arange(len(bags)).repeat_interleave(sizes), token
