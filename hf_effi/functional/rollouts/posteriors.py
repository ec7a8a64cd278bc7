"""Beta posteriors of pass rates: what was seen of a prompt, how fast it is forgotten, and draws from it."""

from __future__ import annotations

import torch
from torch import Tensor


def forget_counts(value: Tensor, prior: float, rate: float) -> Tensor:
    """
    Move the count of a posterior towards that of the prior: `(1 - f) * a + f * a_0`.

    This is the decay of both papers: MoPPS ([2507.04632](https://huggingface.co/papers/2507.04632)) writes `lambda`
    for what is kept, `f = 1 - lambda`; BOTS ([2510.26374](https://huggingface.co/papers/2510.26374)) writes `lambda`
    for what is forgotten, `f = lambda`.

    Args:
        value (`torch.Tensor`): Counts `a` (or `b`) of the posterior, any shape.
        prior (`float`): Count of the prior.
        rate (`float`): `f` in [0, 1]: 0 forgets nothing, 1 everything.

    Example:
    ```python
    >>> forget_counts(torch.tensor([5.0, 1.0]), prior=1.0, rate=0.5).tolist()
    [3.0, 1.0]
    ```
    """
    return (1 - rate) * value + rate * prior


def draw_gamma(shape: Tensor, generator: torch.Generator) -> Tensor:
    """
    Draw from `Gamma(shape, 1)`, one number per element, by the method of Marsaglia and Tsang.

    Args:
        shape (`torch.Tensor`): Positive, float64, shape `(n,)`.
        generator (`torch.Generator`): On the CPU. (The distributions of torch take none.)

    Example:
    ```python
    >>> drawn = draw_gamma(torch.full((20_000,), 3.0, dtype=torch.float64), torch.Generator().manual_seed(0))
    >>> abs(float(drawn.mean()) - 3) < 0.05, abs(float(drawn.var()) - 3) < 0.15
    (True, True)
    ```
    """
    small = shape < 1  # Gamma(a) = Gamma(a + 1) * U^(1/a)
    d = shape + small - 1 / 3
    c = (9 * d).rsqrt()
    drawn = torch.empty_like(d)
    todo = torch.arange(len(d))
    while len(todo):
        x = torch.randn(len(todo), generator=generator, dtype=d.dtype)
        u = torch.rand(len(todo), generator=generator, dtype=d.dtype)
        scale = d[todo]
        v = (1 + c[todo] * x) ** 3
        log_v = torch.where(v > 0, v, 1).log()
        accepted = (v > 0) & (u.log() < 0.5 * x * x + scale * (1 - v + log_v))
        drawn[todo[accepted]] = (scale * v)[accepted]
        todo = todo[~accepted]
    u = torch.rand(len(d), generator=generator, dtype=d.dtype)
    return torch.where(small, drawn * u ** (1 / shape), drawn)


def draw_beta(alpha: Tensor, beta: Tensor, generator: torch.Generator) -> Tensor:
    """
    Draw from `Beta(alpha, beta)`, one number in [0, 1] per element.

    Args:
        alpha, beta (`torch.Tensor`): Positive, float64, shape `(n,)` each.
        generator (`torch.Generator`): On the CPU.

    Example:
    ```python
    >>> alpha, beta = torch.full((2, 20_000), 2.0, dtype=torch.float64)
    >>> drawn = draw_beta(alpha, 3 * beta, torch.Generator().manual_seed(0))
    >>> abs(float(drawn.mean()) - 2 / 8) < 0.01
    True
    ```
    """
    first, second = draw_gamma(alpha, generator), draw_gamma(beta, generator)
    total = first + second
    return torch.where(total > 0, first / total, alpha / (alpha + beta))  # both can underflow for tiny shapes


def distance_to_target(rates: Tensor, target: float, band: tuple[float, float] | None = None) -> Tensor:
    """
    How far a pass rate is from what one wants to train on.

    `|p - target|`, whose order is that of `(p - target)^2`; with a band 0 inside of it and outside the distance to its
    nearer end.

    Args:
        rates (`torch.Tensor`): Pass rates, any shape.
        target (`float`): In [0, 1]. Not read with a band.
        band (`tuple[float, float]`, *optional*): Lower and upper end, both inside.

    Example:
    ```python
    >>> rates = torch.tensor([0.25, 0.5, 1.0])
    >>> distance_to_target(rates, 0.5).tolist(), distance_to_target(rates, 0.5, (0.25, 0.75)).tolist()
    ([0.25, 0.0, 0.5], [0.0, 0.0, 0.25])
    ```
    """
    if band is None:
        return (rates - target).abs()
    return torch.maximum(band[0] - rates, rates - band[1]).clamp(min=0)


def reference_position(observed: float, weak: float, strong: float) -> float | None:
    """
    Where the policy stands between a weak and a strong reference: `mu = (p - p_weak) / (p_strong - p_weak)`.

    Args:
        observed, weak, strong (`float`): Mean pass rates over the same prompts, of the policy and of the references.

    Returns:
        `float` or `None`: in [-1, 2]; `None` where the references do not differ on these prompts.

    Example:
    ```python
    >>> reference_position(0.5, weak=0.25, strong=0.75), reference_position(0.5, weak=0.3, strong=0.3)
    (0.5, None)
    ```
    """
    gap = strong - weak
    return None if abs(gap) < 1e-6 else min(2.0, max(-1.0, (observed - weak) / gap))


def implied_rates(weak: Tensor, strong: Tensor, position: float) -> Tensor:
    """
    Pass rates that the references imply for the policy: `clip(mu * p_strong + (1 - mu) * p_weak, 0, 1)`.

    Args:
        weak, strong (`torch.Tensor`): Pass rates of the references, shape `(num_rows,)` each.
        position (`float`): `mu`, see [`reference_position`].

    Example:
    ```python
    >>> implied_rates(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.0]), 0.5).tolist()
    [0.25, 0.75]
    ```
    """
    return (position * strong + (1 - position) * weak).clamp(0, 1)
