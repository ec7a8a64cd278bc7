"""Which layers keep how many of their singular directions (Nayak et al., 2504.07097), and what leaks into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .schedules._checks import check_number

#: a layer keeps at most this share, so that something is left to train
LARGEST = 0.99


def retained_shares(importance: Sequence[float], minimum: float = 0.1, target: float = 0.8) -> list[float]:
    """
    Return the share of its singular directions that each layer keeps.

    Formula: `I_l / mean(I)` is the importance of layer l, with mean 1; it keeps `minimum + I_l (target - minimum)`,
    within `[minimum, 0.99]`. The mean of all is `target` where nothing is cut off.

    Args:
        importance (`Sequence[float]`): Of each layer: how alike its output is to its input, see
            [`likeness`].
        minimum (`float`, *optional*, defaults to 0.1): Share of the least important layer, in `(0, 1)`.
        target (`float`, *optional*, defaults to 0.8): Share of one of mean importance, from `minimum` to below 1.

    Raises:
        ValueError: an argument out of range, no layer, or importances whose mean is not above 0.

    Example:
    ```python
    >>> [round(share, 2) for share in retained_shares([0.5, 1.0, 0.9], minimum=0.1, target=0.5)]
    [0.35, 0.6, 0.55]
    ```
    """
    check_number("minimum", minimum, 0.0, 1.0, low_open=True, high_open=True)
    check_number("target", target, minimum, 1.0, high_open=True)
    mean = sum(importance) / len(importance) if importance else 0.0
    if not 0 < mean < float("inf"):
        raise ValueError(f"importance={list(importance)!r} must have a finite mean above 0, one for each layer.")
    return [min(max(minimum + one / mean * (target - minimum), minimum), LARGEST) for one in importance]


def likeness(inputs: Tensor, outputs: Tensor, real: Tensor | None = None) -> Tensor:
    """
    Return the summed cosine similarity of what goes into a layer and what comes out, token by token.

    Args:
        inputs, outputs (`torch.Tensor`): Shape `(..., d)`.
        real (`torch.Tensor`, *optional*): Shape `(...)`; tokens where it is 0 are padding and are left out.

    Returns:
        `torch.Tensor`: One number, fp64. Divide by the number of tokens.

    Example:
    ```python
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> round(likeness(x, torch.tensor([[2.0, 0.0], [1.0, -1.0]])).item(), 6)
    1.0
    ```
    """
    alike = torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
    return (alike if real is None else alike.masked_fill(real.eq(0), 0.0)).sum()


def leaked_share(change: Tensor, kept: Tensor) -> float:
    """
    Return the share of a change of the trained directions that lies within the kept ones.

    Formula: `|U_high^T dU| / |dU|`; 0 for no change.

    Args:
        change (`torch.Tensor`): `dU`, shape `(m, r)`.
        kept (`torch.Tensor`): `U_high`, shape `(m, k)`, orthonormal columns.

    Example:
    ```python
    >>> leaked_share(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0], [0.0]]))
    0.6000000238418579
    ```
    """
    size = change.norm()
    return float((kept.T @ change).norm() / size) if size > 0 else 0.0
