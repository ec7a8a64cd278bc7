"""Averages of the weights of one run: which weight each checkpoint gets, and what holds the average as it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .options import refuse_idle

AverageKind = Literal["ema", "uniform", "linear"]
#: How an exponential average begins: see [`ema_rate`].
EMACorrection = Literal["warmup", "bias", "none"]


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


def trend_weights(count: int) -> list[float]:
    """
    Return the weights of a least-squares line through `count` checkpoints, read at the newest; they sum to 1.

    A plain mean of a window stands where the weights were in the middle of it; the line does not lag. The oldest
    weights are negative from three checkpoints on.

    Formula: with `n` checkpoints and `t_j = j - (n - 1) / 2`, `w_j = 1 / n + t_j t_{n-1} / sum_i t_i^2`.

    Args:
        count (`int`): Checkpoints, `n`, at least 1, the same number of updates apart.

    Returns:
        `list[float]`: Oldest first.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> [round(w, 3) for w in trend_weights(5)]
    [-0.2, 0.0, 0.2, 0.4, 0.6]
    ```
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count={count!r} must be an integer of at least 1.")
    if count == 1:
        return [1.0]
    places = [place - (count - 1) / 2 for place in range(count)]
    squares = sum(place * place for place in places)
    return [1 / count + place * places[-1] / squares for place in places]


def ema_decay(half_life_steps: float, every_steps: int = 1) -> float:
    """
    Return the decay of an exponential average whose weights halve every `half_life_steps` updates.

    Formula: `d = 2 ** (-every_steps / half_life_steps)`, where the average is brought up to date every `every_steps`
    updates.

    Args:
        half_life_steps (`float`): In updates of the run, above 0.
        every_steps (`int`, *optional*, defaults to 1): Updates between two snapshots, at least 1.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> ema_decay(1), ema_decay(20, every_steps=10) == 0.5**0.5
    (0.5, True)
    ```
    """
    if isinstance(half_life_steps, bool) or not (0 < half_life_steps < math.inf):
        raise ValueError(f"half_life_steps={half_life_steps!r} must be a finite number above 0.")
    if not isinstance(every_steps, int) or isinstance(every_steps, bool) or every_steps < 1:
        raise ValueError(f"every_steps={every_steps!r} must be an integer of at least 1.")
    return 2.0 ** (-every_steps / half_life_steps)


def ema_rate(count: int, decay: float, correction: EMACorrection = "warmup") -> float:
    """
    Return the share of the newest weights in an exponential average: `e <- e + rate (theta - e)`.

    Formula, with `t = count` and `d = decay`:

    - `"warmup"`: `1 - min(d, (1 + t) / (10 + t))`; the average begins as the weights themselves (`t = 0`).
    - `"bias"`: `(1 - d) / (1 - d^t)`, which is `e_t = d e_{t-1} + (1 - d) theta_t` from `e_0 = 0`, divided by
      `1 - d^t`; the average begins with the first snapshot (`t = 1`).
    - `"none"`: `1 - d`; the average begins as the weights themselves.

    Args:
        count (`int`): Number of the snapshot, from 1; 0 for the weights that the average begins with.
        decay (`float`): In `[0, 1)`.
        correction (`str`, *optional*, defaults to `"warmup"`): One of the three.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> ema_rate(0, 0.99), round(ema_rate(1, 0.99), 4), round(ema_rate(5000, 0.99), 4)
    (1.0, 0.8182, 0.01)
    >>> ema_rate(1, 0.99, "bias"), round(ema_rate(2, 0.5, "bias"), 4)
    (1.0, 0.6667)
    ```
    """
    if not isinstance(decay, (int, float)) or isinstance(decay, bool) or not 0 <= decay < 1:
        raise ValueError(f"decay={decay!r} is outside [0, 1): the share that the average keeps of itself.")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"count={count!r} must be an integer of at least 0.")
    if correction not in ("warmup", "bias", "none"):
        raise ValueError(f"correction={correction!r} is unknown. Choose 'warmup', 'bias' or 'none'.")
    if count == 0:
        return 1.0
    if correction == "warmup":
        return 1 - min(decay, (1 + count) / (10 + count))
    if correction == "bias":
        return (1 - decay) / (1 - decay**count)
    return 1.0 - decay


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
    The weighted mean of states that come one after another, in one copy.

    Floating-point tensors are averaged in fp32 or wider, so that small shares also move bf16 weights; of others the
    latest counts. Nothing is shared with the states that were pushed.

    Args:
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the copy is; `None` for where each
            tensor is.

    Example:
    ```python
    >>> average = RunningAverage()
    >>> average.push({"w": torch.tensor([1.0])})
    >>> average.push({"w": torch.tensor([4.0])}, weight=2.0)
    >>> average.mean["w"].item(), average.count
    (3.0, 2)
    ```
    """

    def __init__(self, device: torch.device | str | None = "cpu") -> None:
        self.device = device
        self.mean: dict[str, Tensor] = {}
        self.weight = 0.0
        self.count = 0

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
        self._refuse_others(state)
        self.weight += weight
        self._move(state, weight / self.weight)

    def blend(self, state: Mapping[str, Tensor], rate: float) -> None:
        """
        Move the mean towards a state: `mean <- mean + rate (state - mean)`, see [`ema_rate`]. The first state is the
        mean, whatever its rate.

        Raises:
            ValueError: a rate outside `[0, 1]`, or other names or shapes than before.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate!r} is outside [0, 1].")
        self._refuse_others(state)
        self._move(state, rate)

    def _refuse_others(self, state: Mapping[str, Tensor]) -> None:
        if self.mean and {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in self.mean.items()}:
            raise ValueError("The state has other tensors than those before it. Average checkpoints of one run.")

    @torch.no_grad()
    def _move(self, state: Mapping[str, Tensor], rate: float) -> None:
        self.count += 1
        for name, tensor in state.items():
            device = tensor.device if self.device is None else self.device
            if not tensor.is_floating_point():
                self.mean[name] = tensor.detach().to(device, copy=True)
            elif name not in self.mean:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                self.mean[name] = tensor.detach().to(device, wide, copy=True)
            else:
                mean = self.mean[name]
                mean.lerp_(tensor.detach().to(mean), rate)

    def state_dict(self) -> dict[str, Any]:
        """Return mean, weight and count; `mean` is not copied."""
        return {"mean": self.mean, "weight": self.weight, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what [`~RunningAverage.state_dict`] returned."""
        self.mean, self.weight, self.count = dict(state["mean"]), state["weight"], state["count"]


class WindowAverage:
    """
    The latest `last` states in a ring, and their weighted mean at any moment.

    Each state is kept as it came, in its own dtype, so the mean is that of exactly these states and no rounding of a
    running sum is left in it. Memory: `last` copies.

    Args:
        last (`int`): States to keep, at least 1.
        weights (`Callable[[int], list[float]]`): From the number of states to one weight each, oldest first, with sum
            1; such as [`trend_weights`]. They may be negative.
        keep (`Callable[[dict], dict]`, *optional*): Takes the copy of a state and returns what is kept instead of it,
            with the same values, such as tensors that lie in a file.

    Raises:
        ValueError: `last` out of range.

    Example:
    ```python
    >>> window = WindowAverage(2, lambda count: averaging_weights(count, "uniform"))
    >>> for value in (9.0, 1.0, 2.0):
    ...     window.push({"w": torch.tensor([value])})
    >>> window.mean["w"].item(), window.count
    (1.5, 2)
    ```
    """

    def __init__(
        self,
        last: int,
        weights: Callable[[int], list[float]],
        keep: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        if not isinstance(last, int) or isinstance(last, bool) or last < 1:
            raise ValueError(f"last={last!r} must be an integer of at least 1.")
        self.last, self._weights, self._keep = last, weights, keep
        self._states: list[dict[str, Tensor]] = []

    @property
    def count(self) -> int:
        """States that are kept now."""
        return len(self._states)

    @property
    def mean(self) -> dict[str, Tensor]:
        """The weighted mean, computed now, in fp32 or wider; of other tensors the latest. Empty without a state."""
        if not self._states:
            return {}
        weights = self._weights(len(self._states))
        if min(weights) >= 0:
            return weighted_average(self._states, weights)
        return _affine(self._states, weights)

    def push(self, state: Mapping[str, Tensor]) -> None:
        """
        Add a copy of a state, and drop the oldest where there are more than `last`.

        Raises:
            ValueError: other names or shapes than before.
        """
        newest = self._states[-1] if self._states else state
        if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in newest.items()}:
            raise ValueError("The state has other tensors than those before it. Average checkpoints of one run.")
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        self._states = [*self._states, copied if self._keep is None else self._keep(copied)][-self.last :]

    def state_dict(self) -> dict[str, Any]:
        """Return the states, oldest first; they are not copied."""
        return {"states": list(self._states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what [`~WindowAverage.state_dict`] returned."""
        self._states = []
        for one in state["states"]:
            self.push(one)


@torch.no_grad()
def _affine(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the sum of states times weights that may be negative and sum to 1: the newest, and differences to it."""
    found: dict[str, Tensor] = {}
    for name, newest in states[-1].items():
        if not newest.is_floating_point():
            found[name] = newest.detach().clone()
            continue
        wide = newest.detach().to(torch.promote_types(newest.dtype, torch.float32))
        total = wide.clone()
        for state, weight in zip(states[:-1], weights[:-1], strict=True):
            total.add_(state[name].to(wide) - wide, alpha=weight)
        found[name] = total
    return found


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
