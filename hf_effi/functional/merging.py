"""Merging of models and of the checkpoints of one run: weights, combinations, interpolation, deltas, cosines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: a model as this module sees it: a name for each tensor. A mapping that loads a tensor when it is asked for will do.
State = Mapping[str, Tensor]
#: elements that are held in double precision at a time
_BLOCK = 1 << 22


def metric_weights(values: Sequence[float], penalty: float, *, greater_is_better: bool = False) -> list[float]:
    """
    Return weights that prefer checkpoints with a better metric, by one penalty whatever their number.

    Formula: `w_i ~ (min_j m_j / m_i)^p` where less is better, `w_i ~ (m_i / max_j m_j)^p` where more is, normalised to
    a sum of 1. `p = 0` is the uniform mean to the bit, `p -> inf` the best checkpoint. The idea (weights by training
    loss or by step, one penalty) is that of Metrics-Weighted Averaging (2504.18580); its abstract does not give the
    formula, and this one is ours.

    Args:
        values (`Sequence[float]`): One metric per checkpoint, finite and above 0.
        penalty (`float`): `p`, at least 0.
        greater_is_better (`bool`, *optional*, defaults to `False`): Whether a larger metric is better, as a step or an
            accuracy is.

    Returns:
        `list[float]`: One weight per checkpoint, in the order of `values`.

    Raises:
        ValueError: no value, one that is not above 0, or a negative or non-finite penalty.

    Example:
    ```python
    >>> metric_weights([2.0, 1.0], penalty=1)
    [0.3333333333333333, 0.6666666666666666]
    >>> metric_weights([100, 200, 300], penalty=0, greater_is_better=True) == [1 / 3] * 3
    True
    ```
    """
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 <= penalty < math.inf:
        raise ValueError(f"penalty={penalty!r} must be a finite number of at least 0. 0 is the uniform mean.")
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(
            f"values={list(values)!r} must be finite and above 0, as their ratios are the weights. Choose another "
            "metric."
        )
    if penalty == 0:
        return [1 / len(values)] * len(values)
    best = max(values) if greater_is_better else min(values)
    logs = [penalty * math.log(value / best if greater_is_better else best / value) for value in values]
    total = math.fsum(map(math.exp, logs))
    return [math.exp(log) / total for log in logs]


def check_weights(weights: Sequence[float], count: int) -> None:
    """
    Refuse weights that are not one finite number per state, or do not sum to 1.

    Raises:
        ValueError: with the weights.
    """
    if len(weights) != count or not count:
        raise ValueError(f"weights={list(weights)!r} must hold one number per state, which are {count}.")
    if not all(math.isfinite(weight) for weight in weights) or abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(f"weights={list(weights)!r} must be finite and sum to 1; negative ones are allowed.")


@torch.no_grad()
def combine_tensors(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """
    Return `sum_i w_i theta_i` of one tensor, in the type of the last one.

    It is added up in fp32 or wider. A tensor of integers or booleans is the last one. States of weight 0 are left out,
    so that a weight of 1 gives that tensor to the bit.

    Args:
        tensors (`Sequence[torch.Tensor]`): Of equal shape, oldest first.
        weights (`Sequence[float]`): One number per tensor; they sum to 1.

    Returns:
        `torch.Tensor`: A new tensor.
    """
    last = tensors[-1]
    if not last.is_floating_point():
        return last.clone()
    used = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0].to(last.dtype, copy=True)
    wide = torch.promote_types(last.dtype, torch.float32)
    total = torch.zeros(last.shape, dtype=wide, device=last.device)
    for tensor, weight in used:
        total.add_(tensor.to(total), alpha=weight)
    return total.to(last.dtype)


def combine(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """
    Return the linear combination of states, one tensor after another. Negative weights are allowed.

    Formula: `theta = sum_i w_i theta_i` with `sum_i w_i = 1`, see [`combine_tensors`].

    Args:
        states (`Sequence[Mapping[str, torch.Tensor]]`): Of equal names and shapes, oldest first.
        weights (`Sequence[float]`): One number per state; they sum to 1.

    Returns:
        `dict[str, torch.Tensor]`: New tensors, in the types of the last state.

    Raises:
        ValueError: weights that do not sum to 1, or states of different tensors.

    Example:
    ```python
    >>> combine([{"w": torch.zeros(1)}, {"w": torch.ones(1)}], [-0.5, 1.5])["w"].item()
    1.5
    ```
    """
    check_weights(weights, len(states))
    for state in states:
        if set(state) != set(states[-1]):
            raise ValueError(f"The states have different tensors: {_differences(state, states[-1])}.")
    made = {}
    for name in states[-1]:
        tensors = [state[name] for state in states]
        if len({tensor.shape for tensor in tensors}) > 1:
            raise ValueError(f"{name} has the shapes {[tuple(t.shape) for t in tensors]}. Merge models of one shape.")
        made[name] = combine_tensors(tensors, weights)
    return made


def _differences(some: State, others: State) -> str:
    names = sorted(set(some) ^ set(others))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def interpolated(base: State, tuned: State, alpha: float) -> dict[str, Tensor]:
    """
    Return the weights between a model and what it became: `(1 - alpha) base + alpha tuned` (WiSE-FT, 2109.01903).

    Args:
        base, tuned (`Mapping[str, torch.Tensor]`): Of equal names and shapes.
        alpha (`float`): 0 is `base` and 1 is `tuned`, to the bit (in the types of `tuned`); outside of them it
            extrapolates.

    Raises:
        ValueError: a non-finite `alpha`, or states of different tensors.

    Example:
    ```python
    >>> interpolated({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0.25)["w"].item()
    0.25
    ```
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha!r} must be finite: 0 is the base, 1 the tuned model.")
    return combine([base, tuned], [1 - alpha, alpha])


@torch.no_grad()
def add_delta(target: Tensor, tuned: Tensor, base: Tensor, scale: float = 1.0) -> Tensor:
    """
    Return `target + scale (tuned - base)` of one tensor, in the type of `target`, added up in fp32 or wider.

    Where `target` has more rows than the other two, such as those of new tokens, these rows are kept as they are.

    Args:
        target (`torch.Tensor`): Shape `(rows, ...)`.
        tuned, base (`torch.Tensor`): Shape `(fewer or equal rows, ...)`, both alike.
        scale (`float`, *optional*, defaults to 1): 0 is `target` to the bit.

    Raises:
        ValueError: shapes that do not fit.

    Example:
    ```python
    >>> add_delta(torch.tensor([1.0, 5.0]), torch.tensor([3.0]), torch.tensor([2.0]), scale=0.5)
    tensor([1.5000, 5.0000])
    ```
    """
    shapes = [tuple(tensor.shape) for tensor in (target, tuned, base)]
    fits = shapes[1] == shapes[2] and shapes[0][1:] == shapes[1][1:] and shapes[0][:1] >= shapes[1][:1]
    if not fits:
        raise ValueError(f"The shapes {shapes} of target, tuned and base do not fit.")
    if not target.is_floating_point() or scale == 0:
        return target.clone()
    wide = torch.promote_types(target.dtype, torch.float32)
    made = target.to(wide, copy=True)
    rows = made[: tuned.shape[0]] if made.dim() else made
    rows.add_(tuned.to(wide) - base.to(wide), alpha=scale)
    return made.to(target.dtype)


def cosine(one: Tensor, other: Tensor) -> float | None:
    """
    Return the cosine between two tensors of one shape, in double precision; `None` where one of them is 0.

    Two models that were fine-tuned from the same weights have cosines near 1 in each of their matrices; matrices that
    were initialised apart have cosines near 0. It is how a head that does not belong to the others shows.

    Example:
    ```python
    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    0.7071067811865475
    ```
    """
    (a, product), (_, b) = products([one, other])
    length = math.sqrt(a) * math.sqrt(b)
    return None if length == 0 else max(-1.0, min(1.0, product / length))


@torch.no_grad()
def products(tensors: Sequence[Tensor], origin: Tensor | None = None) -> list[list[float]]:
    """
    Return the inner products of tensors of one shape, in double precision, a block of elements at a time.

    Args:
        tensors (`Sequence[torch.Tensor]`): At least one.
        origin (`torch.Tensor`, *optional*): Taken off each of them first.

    Returns:
        `list[list[float]]`: Entry `[i][j]` is `<t_i - origin, t_j - origin>`.

    Example:
    ```python
    >>> products([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], torch.ones(2))
    [[1.0, 3.0], [3.0, 13.0]]
    ```
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    start = None if origin is None else origin.detach().reshape(-1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for begin in range(0, flat[0].numel(), _BLOCK):
        part = torch.stack([tensor[begin : begin + _BLOCK].double() for tensor in flat])
        if start is not None:
            part -= start[begin : begin + _BLOCK].double()
        total += part @ part.T
    return total.tolist()


def pareto_flags(points: Sequence[Sequence[float]]) -> list[bool]:
    """
    Return, of each point, whether no other one is at least as good in every score and better in one. Less is better.

    Args:
        points (`Sequence[Sequence[float]]`): Shape `(points, scores)`. A NaN is worse than any number.

    Example:
    ```python
    >>> pareto_flags([(1.0, 3.0), (2.0, 2.0), (2.0, 3.0)])
    [True, True, False]
    ```
    """
    clean = [[math.inf if math.isnan(score) else score for score in point] for point in points]

    def beaten(point: list[float]) -> bool:
        return any(
            all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in clean
        )  # fmt: skip

    return [not beaten(point) for point in clean]


def concatenate_lora(
    downs: Sequence[Tensor], ups: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """
    Return the factors whose product is the weighted mean of the products of several LoRA pairs.

    Formula: `sum_i w_i B_i A_i = [w_1 B_1, ..., w_k B_k] [A_1; ...; A_k]`, of rank `k r`. The mean of the factors is
    something else: it has the cross terms `B_i A_j`.

    Args:
        downs (`Sequence[torch.Tensor]`): `A_i`, shape `(r, in)`; of a convolution `(r, in, h, w)`.
        ups (`Sequence[torch.Tensor]`): `B_i`, shape `(out, r)`; of a convolution `(out, r, 1, 1)`.
        weights (`Sequence[float]`): One number per pair; they sum to 1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `A` of shape `(k r, in)` and `B` of shape `(out, k r)`.

    Example:
    ```python
    >>> a, b = concatenate_lora([torch.ones(1, 2), torch.eye(1, 2)], [torch.ones(3, 1)] * 2, [0.5, 0.5])
    >>> (b @ a)[0]
    tensor([1.0000, 0.5000])
    ```
    """
    check_weights(weights, len(downs))
    scaled = [(up.float() * weight).to(up.dtype) for up, weight in zip(ups, weights, strict=True)]
    return torch.cat(list(downs), 0), torch.cat(scaled, 1)
