"""The schedule that the gradient norms of a finished run ask for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..gradient_norms import GradientNorms
from ._checks import as_numbers, check_choice, check_number
from .cyclic import table


def median_smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
    """
    Running median of width `2 floor(share T / 2) + 1`; the right end is mirrored, the left end repeated.

    Example:
    ```python
    >>> median_smooth([1, 1, 100, 1, 1, 1, 1, 1, 1, 1], share=0.2)
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    ```
    """
    check_number("share", share, 0.0, 1.0)
    n, half = len(values), int(share * len(values) / 2)

    def at(i: int) -> float:
        if n == 1 or i < 0:
            return values[0]
        i %= 2 * (n - 1)
        return values[i if i < n else 2 * (n - 1) - i]

    return [float(statistics.median(at(j) for j in range(i - half, i + half + 1))) for i in range(n)]


def refined_by_gradient_norm(
    norms: Sequence[float] | GradientNorms,
    optimizer: str = "adam",
    smooth: float = 0.1,
    total_steps: int | None = None,
) -> table:
    """
    Schedule refined from the gradient norms of one run (linear or cosine decay), with its own warm-up and annealing.

    Formula: `m_t ~ w_t sum_{s>t} w_s`, with `w = G^-2` for SGD (L2 norms) and `w = G^-1` for Adam (L1 norms), divided
    by its maximum. Constant norms give linear decay.
    Paper: Defazio et al., When, Why and How Much? (2310.07831).

    Args:
        norms (`Sequence[float]` or [`GradientNorms`]): One gradient norm for each update of the finished run; or what
            [`norms_of`] returns for that run, from which the right norm is taken. Norms of every k-th update are
            smoothed first and then interpolated to all updates. Zeros count as the smallest positive norm.
        optimizer (`str`, *optional*, defaults to `"adam"`): `"adam"` (L1 norms) or `"sgd"` (L2 norms).
        smooth (`float`, *optional*, defaults to 0.1): Width of the running median as a share of the run; 0 for none.
        total_steps (`int`, *optional*): Length of the new run; the curve is stretched to it.

    Returns:
        [`table`]: a schedule that stores its values.

    Raises:
        ValueError: no norms, or one that is NaN, infinite or negative, or all zero.
        MismatchError: the run recorded no L1 norms for `"adam"`, or no L2 norms for `"sgd"`.

    Example:
    ```python
    >>> norms = [4, 2, 1, 1, 1, 1, 2, 2]
    >>> [round(m, 6) for m in refined_by_gradient_norm(norms, "sgd", smooth=0.0, total_steps=8).trace()]
    [0.084821, 0.321429, 1.0, 0.714286, 0.428571, 0.142857, 0.017857, 0.0]
    ```
    """
    check_choice("optimizer", optimizer, ("adam", "sgd"))
    run = norms if isinstance(norms, GradientNorms) else None
    given = norms.of(optimizer) if isinstance(norms, GradientNorms) else norms
    norms = as_numbers("norms", given, "Pass one gradient norm for each update.")
    positive = [g for g in norms if g > 0]
    if not positive or not all(math.isfinite(g) and g >= 0 for g in norms):
        raise ValueError("norms must be finite, at least 0, and not all zero. Drop the steps that overflowed.")
    # A zero norm would weigh infinitely much.
    norms = [max(g, min(positive)) for g in norms]
    if smooth:
        norms = median_smooth(norms, smooth)
    if run is not None:
        norms = run.spread(norms)
    weights = [g ** (-2 if optimizer == "sgd" else -1) for g in norms]
    values, after = [0.0] * len(weights), 0.0
    for t in reversed(range(len(weights))):
        values[t] = weights[t] * after
        after += weights[t]
    top = max(values)
    # One update has nothing after it; it trains at the peak rather than not at all.
    values = [v / top for v in values] if top > 0 else [1.0]
    return table(total_steps, values=tuple(values))
