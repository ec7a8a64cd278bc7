"""The curve of a learning-rate range test: when to stop it, and what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ._checks import check_number


def smooth_losses(losses: Sequence[float], smoothing: float = 0.9) -> list[float]:
    """
    Running mean without the bias of its start: `m_t = s m_{t-1} + (1 - s) l_t`, divided by `1 - s^t`.

    Args:
        losses (`Sequence[float]`): One for each update.
        smoothing (`float`, *optional*, defaults to 0.9): `s`, in `[0, 1)`; 0 leaves the losses as they are.

    Example:
    ```python
    >>> [round(x, 4) for x in smooth_losses([4.0, 2.0, 1.0], 0.5)]
    [4.0, 2.6667, 1.7143]
    ```
    """
    check_number("smoothing", smoothing, 0.0, 1.0, high_open=True)
    smooth, mean = [], 0.0
    for count, loss in enumerate(losses, 1):
        mean = smoothing * mean + (1 - smoothing) * loss
        smooth.append(mean / (1 - smoothing**count))
    return smooth


class RangeCurve:
    """
    Learning rates and losses of one sweep, as they come in.

    Args:
        stop_factor (`float`, *optional*, defaults to 4.0): The sweep ends where the smoothed loss is above this many
            times its lowest; above 1.
        smoothing (`float`, *optional*, defaults to 0.9): See [`smooth_losses`].

    Attributes:
        lrs, losses (`list[float]`): What was seen, finite losses only.
        stopped (`str` or `None`): Why it ended before its last learning rate.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> curve = RangeCurve(stop_factor=2.0, smoothing=0.0)
    >>> [curve.push(lr, loss) for lr, loss in [(0.1, 3.0), (0.2, 1.0), (0.4, 2.5)]]
    [True, True, False]
    >>> curve.stopped
    'at 0.4 the smoothed loss was 2.5 times its lowest'
    ```
    """

    def __init__(self, stop_factor: float = 4.0, smoothing: float = 0.9) -> None:
        check_number("stop_factor", stop_factor, 1.0, math.inf, low_open=True)
        check_number("smoothing", smoothing, 0.0, 1.0, high_open=True)
        self.stop_factor, self.smoothing = stop_factor, smoothing
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.stopped: str | None = None
        self._mean, self._best = 0.0, math.inf

    def push(self, lr: float, loss: float) -> bool:
        """Note the loss of the update that is made at `lr`; return whether the sweep goes on."""
        if not math.isfinite(loss):
            self.stopped = f"at {lr:.3g} the loss was {loss}"
            return False
        self.lrs.append(lr)
        self.losses.append(loss)
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * loss
        smooth = self._mean / (1 - self.smoothing ** len(self.losses))
        self._best = min(self._best, smooth)
        if self._best > 0 and smooth > self.stop_factor * self._best:
            self.stopped = f"at {lr:.3g} the smoothed loss was {smooth / self._best:.3g} times its lowest"
        return self.stopped is None
