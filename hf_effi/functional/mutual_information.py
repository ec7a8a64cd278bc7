"""SAMI: a bound of the mutual information between the principles in a prompt and the response to it."""

from __future__ import annotations

import torch
from torch import Tensor

#: how the log-probs of the tokens of a response become one number
REDUCTIONS = ("mean", "sum")


def response_logps(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """
    Return the log-prob of each response: the mean or the sum over its tokens.

    The paper's bound takes the sum; its code, and the default here, the mean.

    Args:
        logits (`torch.Tensor`): Shape `(rows, tokens, vocabulary)`.
        labels (`torch.Tensor`): Token ids, -100 where no token of the response stands, shape `(rows, tokens)`.
        reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` or `"sum"`.

    Returns:
        `torch.Tensor`: float32, shape `(rows,)`.

    Raises:
        ValueError: an unknown reduction, or a row without a token of a response.

    Example:
    ```python
    >>> logits = torch.zeros(1, 3, 4)
    >>> [round(float(response_logps(logits, torch.tensor([[-100, 2, 1]]), how)), 3) for how in ("mean", "sum")]
    [-1.386, -2.773]
    ```
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}.")
    targets = labels[:, 1:]
    inside = targets != -100
    lengths = inside.sum(1)
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} has no token of a response, so that nothing says how likely it is. Leave it out.")
    tokens = targets.masked_fill(~inside, 0).unsqueeze(2)
    logps = logits[:, :-1].float().log_softmax(2).gather(2, tokens).squeeze(2).masked_fill(~inside, 0.0).sum(1)
    return logps / lengths if reduction == "mean" else logps


def sami_loss(logps: Tensor, side: str = "both") -> Tensor:
    """
    Return the InfoNCE loss of `C` principles and the `C` responses that were written under them, on both sides.

    `L = 1/2 [CE(rows) + CE(columns)]` of the matrix `l_ij`, the log-prob of response `j` under principle `i`, whose
    targets are the diagonal. `log C - L` is a lower bound of the mutual information. SAMI, Sec. 3,
    [2404.14313](https://huggingface.co/papers/2404.14313).

    Args:
        logps (`torch.Tensor`): Shape `(C, C)`, or `(queries, C, C)`, of which the mean is taken; `C` at least 2.
        side (`str`, *optional*, defaults to `"both"`): `"both"`, or one term alone: `"responses"`, which of the
            responses was written under a principle (rows), or `"principles"`, under which principle a response was
            written (columns).

    Raises:
        ValueError: another shape, fewer than two principles, or an unknown side.

    Example:
    ```python
    >>> round(float(sami_loss(torch.tensor([[-1.0, -2.0], [-3.0, -1.5]]))), 5)
    0.27892
    ```
    """
    if logps.ndim not in (2, 3) or logps.size(-1) != logps.size(-2) or logps.size(-1) < 2 or not logps.numel():
        raise ValueError(
            f"logps must have shape (C, C) or (queries, C, C) with C of at least 2, got {tuple(logps.shape)}: with "
            "one principle there is nothing to tell it from."
        )
    if side not in ("both", "responses", "principles"):
        raise ValueError(f"side must be 'both', 'responses' or 'principles', got {side!r}.")
    rows = -torch.diagonal(logps.log_softmax(-1), dim1=-2, dim2=-1).mean()
    columns = -torch.diagonal(logps.log_softmax(-2), dim1=-2, dim2=-1).mean()
    if side == "both":
        return (rows + columns) / 2
    return rows if side == "responses" else columns
