"""How much of the data is in play: competence, cyclical subset sizes, thresholds that grow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_count, check_number, clean_scores, seeded


def competence(progress: float, start: float = 0.01, root: float = 2.0, full_at: float = 1.0) -> float:
    """
    Return the share of the data, easiest first, that a learner may see: `min(1, (p / f (1 - c0^r) + c0^r)^(1/r))`.

    Platanios et al. 2019, equations 6 to 8. `root=1` is their linear and `root=2` their square-root competence.

    Args:
        progress (`float`): Share of training done, clamped to `[0, 1]`.
        start (`float`, *optional*, defaults to 0.01): `c0`, in `(0, 1]`.
        root (`float`, *optional*, defaults to 2.0): `r`, at least 1.
        full_at (`float`, *optional*, defaults to 1.0): `f`, the progress at which all data is in play, in `(0, 1]`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> [round(competence(p, start=0.1, root=1), 3) for p in (0, 0.5, 1, 2)]
    [0.1, 0.55, 1.0, 1.0]
    >>> round(competence(0.25, start=0.01), 6)
    0.500075
    ```
    """
    check_number("start", start, 0, 1, open_low=True)
    check_number("root", root, 1)
    check_number("full_at", full_at, 0, 1, open_low=True)
    done = min(max(check_number("progress", progress, -math.inf), 0.0) / full_at, 1.0)
    return min(1.0, (done * (1 - start**root) + start**root) ** (1 / root))


def competence_order(
    scores: Tensor | Sequence[float],
    num_samples: int,
    *,
    start: float = 0.01,
    root: float = 2.0,
    full_at: float = 1.0,
    seed: int = 0,
    nan: str = "error",
) -> Tensor:
    """
    Draw `num_samples` rows; draw `j` is uniform over the easiest `ceil(competence(j / num_samples) * num_rows)` rows.

    With replacement, as in the paper: rows repeat, and easy rows repeat more often.

    Args:
        scores (`torch.Tensor` or `Sequence[float]`): Difficulty, low is easy, shape `(num_rows,)`.
        num_samples (`int`): Draws of the whole run.
        start, root, full_at (`float`, *optional*): See [`competence`].
        seed (`int`, *optional*, defaults to 0): Seed of draws and ties.
        nan (`str`, *optional*, defaults to `"error"`): See [`clean_scores`].

    Returns:
        `torch.Tensor`: Row numbers, shape `(num_samples,)`.

    Raises:
        ValueError: an argument out of range, NaN scores.

    Example:
    ```python
    >>> order = competence_order([0.0, 1.0, 2.0, 3.0], 8, start=0.25, root=1)
    >>> int(order[0]), bool((order[:2] <= 1).all())
    (0, True)
    ```
    """
    check_count("num_samples", num_samples)
    competence(0.0, start, root, full_at)  # checks the ranges
    values = clean_scores(scores, nan=nan)
    generator = seeded(seed)
    shuffle = torch.randperm(values.numel(), generator=generator)
    easiest = shuffle[torch.sort(values[shuffle], stable=True).indices]
    done = (torch.arange(num_samples, dtype=torch.float64) / num_samples / full_at).clamp(max=1.0)
    share = (done * (1 - start**root) + start**root).pow(1 / root).clamp(max=1.0)
    # The subtraction keeps 0.3 * 10 = 3.0000000000000004 from opening a fourth row.
    pool = torch.ceil(share * values.numel() - 1e-9).clamp(min=1)
    uniform = torch.rand(num_samples, generator=generator, dtype=torch.float64)
    return easiest[(uniform * pool).long().clamp(max=values.numel() - 1)]


def cyclical_sizes(total: float, start: float = 0.25, end: float = 1.0, alpha: float = 0.5) -> list[float]:
    """
    Return the subset sizes of cyclical curriculum learning: up by `1 / alpha` to `end`, down by `alpha` to `start`.

    Sizes are appended until they sum to at least `total`.

    Args:
        total (`float`): Epoch equivalents of the whole plan, positive.
        start (`float`, *optional*, defaults to 0.25): Smallest share, in `(0, end]`.
        end (`float`, *optional*, defaults to 1.0): Largest share, in `(0, 1]`.
        alpha (`float`, *optional*, defaults to 0.5): In `(0, 1)`; 1 would never change the size.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> cyclical_sizes(3)
    [0.25, 0.5, 1.0, 0.5, 0.25, 0.5]
    ```
    """
    check_number("total", total, 0, open_low=True)
    check_number("end", end, 0, 1, open_low=True)
    check_number("start", start, 0, end, open_low=True)
    check_number("alpha", alpha, 0, 1, open_low=True, open_high=True)
    sizes, size, rising = [start], start, True
    while math.fsum(sizes) < total:
        size = min(size / alpha, end) if rising else max(size * alpha, start)
        if size in (start, end):
            rising = size < end
        sizes.append(size)
    return sizes


def draw_without_replacement(weights: Tensor, count: int, seed: int = 0, stream: int = 0) -> Tensor:
    """
    Draw `count` different rows, each next one with probability proportional to its weight among those left.

    By exponential races: row `i` finishes at `Exp(1) / w_i` and the first `count` win, in their order.

    Args:
        weights (`torch.Tensor`): Positive, shape `(num_rows,)`.
        count (`int`): In `[1, num_rows]`.
        seed, stream (`int`, *optional*): Seed and independent stream of it, such as the epoch.

    Raises:
        ValueError: a weight that is not positive and finite, or `count` out of range.

    Example:
    ```python
    >>> draw_without_replacement(torch.tensor([1.0, 1.0, 1.0]), 3).sort().values.tolist()
    [0, 1, 2]
    ```
    """
    if not bool((torch.isfinite(weights) & (weights > 0)).all()):
        raise ValueError("weights must be positive and finite, so that every row can be drawn.")
    if check_count("count", count) > weights.numel():
        raise ValueError(f"count={count} exceeds the {weights.numel()} rows that can be drawn once.")
    uniform = torch.rand(weights.numel(), generator=seeded(seed, stream), dtype=torch.float64)
    finish = -torch.log1p(-uniform) / weights.double()
    return torch.sort(finish, stable=True).indices[:count]


def self_paced_weights(losses: Tensor | Sequence[float], threshold: float, soft: bool = False) -> Tensor:
    """
    Return self-paced weights: `v = 1[l < lambda]`, or softly `v = max(0, 1 - l / lambda)`.

    They minimise `sum v_i l_i + f(v)` with `f = -lambda sum v` (Kumar et al. 2010), and with
    `f = lambda sum (v^2 / 2 - v)` (Jiang et al. 2014) for the soft form.

    Args:
        losses (`torch.Tensor` or `Sequence[float]`): Loss of each row, shape `(num_rows,)`.
        threshold (`float`): `lambda`, positive: the age of the model.
        soft (`bool`, *optional*, defaults to `False`): Linear weights.

    Raises:
        ValueError: NaN losses or a threshold that is not positive.

    Example:
    ```python
    >>> self_paced_weights([0.5, 1.0, 2.0], 1.0).tolist()
    [1.0, 0.0, 0.0]
    >>> self_paced_weights([0.5, 1.0, 2.0], 2.0, soft=True).tolist()
    [0.75, 0.5, 0.0]
    ```
    """
    values = clean_scores(losses, "losses")
    check_number("threshold", threshold, 0, open_low=True)
    if soft:
        return (1 - values / threshold).clamp(min=0.0)
    return (values < threshold).double()


def easiest_share(losses: Tensor | Sequence[float], share: float, min_rows: int = 1) -> Tensor:
    """
    Return which rows have the smallest losses: `max(min_rows, ceil(share * num_rows))` of them, ties to the lower row.

    The form of self-paced learning whose pace is set by a share of the data, not by a threshold on the loss.

    Raises:
        ValueError: `share` outside `[0, 1]`, NaN losses.

    Example:
    ```python
    >>> easiest_share([3.0, 1.0, 2.0], 0.5).tolist()
    [False, True, True]
    ```
    """
    values = clean_scores(losses, "losses")
    check_number("share", share, 0, 1)
    keep = min(max(math.ceil(share * values.numel() - 1e-9), check_count("min_rows", min_rows)), values.numel())
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[torch.sort(values, stable=True).indices[:keep]] = True
    return mask


def refill(rows: Tensor, num_samples: int, seed: int = 0, stream: int = 0) -> Tensor:
    """
    Return `num_samples` row numbers made of fresh permutations of `rows`, one after another, the last one cut.

    So each row occurs `floor` or `ceil` of `num_samples / len(rows)` times.

    Raises:
        ValueError: no row.

    Example:
    ```python
    >>> refill(torch.tensor([7, 9]), 4).sort().values.tolist()
    [7, 7, 9, 9]
    ```
    """
    if rows.numel() == 0:
        raise ValueError("There is no row to fill an epoch with. Lower the threshold or raise min_rows.")
    generator = seeded(seed, stream)
    rounds = -(-check_count("num_samples", num_samples) // rows.numel())
    passes = [rows[torch.randperm(rows.numel(), generator=generator)] for _ in range(rounds)]
    return torch.cat(passes)[:num_samples]
