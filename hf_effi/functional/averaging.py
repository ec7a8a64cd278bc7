"""Averages of the weights of one run: which weight each checkpoint gets, and the mean with one extra copy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .options import refuse_idle

AverageKind = Literal["ema", "uniform", "linear"]


def averaging_weights(count: int, kind: AverageKind = "ema", alpha: float = 0.2) -> list[float]:
    """
    Return the weight of each of the last `count` checkpoints, oldest first; they sum to 1.

    Formula: `"uniform"`: `1 / k` (LAWA, 2209.14981). `"linear"`: `j / (1 + ... + k)`. `"ema"`: what
    `m_1 = theta_1`, `m_j = (1 - alpha) m_{j-1} + alpha theta_j` gives (CMA, 2511.18903).

    Args:
        count (`int`): Checkpoints, `k`, at least 1.
        kind (`str`, *optional*, defaults to `"ema"`): `"ema"`, `"uniform"` or `"linear"`.
        alpha (`float`, *optional*, defaults to 0.2): Weight of the newest, in `(0, 1]`; only `"ema"` reads it. The
            source does not say whether its 0.2 belongs to the newer or to the older weights; for the other reading
            pass 0.8.

    Raises:
        ValueError: an argument out of range, or an `alpha` that nothing reads.

    Example:
    ```python
    >>> [round(w, 5) for w in averaging_weights(6)]
    [0.32768, 0.08192, 0.1024, 0.128, 0.16, 0.2]
    >>> averaging_weights(3, "linear") == [1 / 6, 2 / 6, 3 / 6]
    True
    ```
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count={count!r} must be an integer of at least 1.")
    if not isinstance(alpha, (int, float)) or not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha!r} is outside (0, 1]: the weight of the newest checkpoint.")
    if kind in ("uniform", "linear"):
        refuse_idle("alpha", alpha, 0.2, acts=False, needs="with kind='ema'")
    if kind == "uniform":
        return [1 / count] * count
    if kind == "linear":
        total = count * (count + 1) // 2
        return [place / total for place in range(1, count + 1)]
    if kind == "ema":
        newer = [alpha * (1 - alpha) ** (count - place) for place in range(2, count + 1)]
        return [(1 - alpha) ** (count - 1), *newer]
    raise ValueError(f"kind={kind!r} is unknown. Choose 'ema', 'uniform' or 'linear'.")


def merge_weights(decay: Sequence[float]) -> list[float]:
    """
    Return the weights with which merging a constant-LR run imitates a decay of its last updates.

    Formula: with `w_0 = 1` and the wished decay `w_1 >= ... >= w_k`, `c_j = w_j - w_{j+1}` and `c_k = w_k`. Merging
    `theta_n, ..., theta_{n+k}` with `c` weighs the updates after `n` by `w`. It is exact where the gradients do not
    depend on the weights, and of first order otherwise.

    Args:
        decay (`Sequence[float]`): `w_1, ..., w_k`, not rising, in `[0, 1]`.

    Returns:
        `list[float]`: `c_0, ..., c_k`, oldest first, one more than `decay`; they sum to 1.

    Raises:
        ValueError: no value, one outside `[0, 1]`, or a rising one.

    Example:
    ```python
    >>> merge_weights([0.75, 0.5, 0.25])  # a linear decay is the plain mean
    [0.25, 0.25, 0.25, 0.25]
    ```
    """
    shares = [1.0, *decay]
    if len(shares) < 2 or not all(0 <= later <= sooner for sooner, later in zip(shares, shares[1:], strict=False)):
        raise ValueError(f"decay={list(decay)!r} must hold falling factors in [0, 1], such as [0.75, 0.5, 0.25].")
    return [sooner - later for sooner, later in zip(shares, [*shares[1:], 0.0], strict=True)]


class RunningAverage:
    """
    The weighted mean of states that come one after another, in one copy on the CPU.

    Floating-point tensors are averaged in fp32 or wider, so that small shares also move bf16 weights; of others the
    latest counts. Nothing is shared with the states that were pushed.

    Example:
    ```python
    >>> average = RunningAverage()
    >>> average.push({"w": torch.tensor([1.0])})
    >>> average.push({"w": torch.tensor([4.0])}, weight=2.0)
    >>> average.mean["w"].item(), average.count
    (3.0, 2)
    ```
    """

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.weight = 0.0
        self.count = 0

    @torch.no_grad()
    def push(self, state: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """
        Add a state. A weight of 0 changes nothing.

        Raises:
            ValueError: a negative or non-finite weight, or other names or shapes than before.
        """
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight={weight!r} must be a finite number of at least 0.")
        if weight == 0:
            return
        if self.mean and {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in self.mean.items()}:
            raise ValueError("The state has other tensors than those before it. Average checkpoints of one run.")
        self.weight += weight
        self.count += 1
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                self.mean[name] = tensor.detach().to("cpu", copy=True)
            elif name not in self.mean:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                self.mean[name] = tensor.detach().to("cpu", wide, copy=True)
            else:
                mean = self.mean[name]
                mean.lerp_(tensor.detach().to(mean), weight / self.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return mean, weight and count; `mean` is not copied."""
        return {"mean": self.mean, "weight": self.weight, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what [`~RunningAverage.state_dict`] returned."""
        self.mean, self.weight, self.count = dict(state["mean"]), state["weight"], state["count"]


def weighted_average(states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """
    Return the weighted mean of states that may be loaded one by one.

    Args:
        states (`Iterable[Mapping[str, torch.Tensor]]`): Of one run, as many as `weights`; a generator is read lazily.
        weights (`Sequence[float]`): At least 0, not all 0; normalised to a sum of 1.

    Raises:
        ValueError: counts differ, no positive weight, or see [`~RunningAverage.push`].

    Example:
    ```python
    >>> weighted_average([{"w": torch.zeros(1)}, {"w": torch.ones(1)}], averaging_weights(2, "uniform"))["w"].item()
    0.5
    ```
    """
    average = RunningAverage()
    for state, weight in zip(states, weights, strict=True):
        average.push(state, weight)
    if not average.count:
        raise ValueError(f"weights={list(weights)!r}: at least one must be positive.")
    return average.mean


@torch.no_grad()
def exchange(live: Mapping[str, Tensor], other: dict[str, Tensor]) -> None:
    """
    Exchange the values of two states tensor by tensor, so that no third copy is held. Twice restores `live` to the
    bit.

    Args:
        live (`Mapping[str, torch.Tensor]`): Such as a model's parameters; written in place, in their own dtype.
        other (`dict[str, torch.Tensor]`): Receives what `live` held.

    Example:
    ```python
    >>> live, other = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
    >>> exchange(live, other)
    >>> live["w"].item(), other["w"].item()
    (2.0, 1.0)
    ```
    """
    for name, tensor in live.items():
        held = tensor.detach().to("cpu", copy=True)
        tensor.copy_(other[name])
        other[name] = held
