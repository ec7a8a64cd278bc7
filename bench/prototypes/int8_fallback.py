"""Int8 blocks with a second int8 term where they hold outliers (arXiv 2503.08040)."""

from __future__ import annotations

import torch

from bench.prototypes.jetfire import block_int8, expand, round_trip

BLOCK = 128


def quantize_by_block(tensor: torch.Tensor, role: str, contracted: int) -> torch.Tensor:
    return round_trip(tensor, BLOCK)


def with_residual(x: torch.Tensor, threshold: float, block: int = BLOCK) -> tuple[torch.Tensor, float]:
    """
    Return `x` after the round trip, and the share of blocks that fell back.

    `x ~ s1 q1`; where a block has `max|x| > threshold`, `x ~ s1 q1 + s2 q2` with `q2` the int8 of what `q1` leaves
    over. The error of such an element is at most `s1 / 508`, about that of 16 bits.
    """
    q, scale = block_int8(x, block)
    first = q * expand(scale, x.shape, block)
    falls_back = scale * 127 > threshold
    second = round_trip(x - first, block) * expand(falls_back, x.shape, block)
    return first + second, float(falls_back.float().mean())


class FallbackQuantizer:
    """
    Round inputs with fallback, weights and gradients without.

    After each update the threshold moves by `factor` where the share of fallback blocks has left `[lowest, highest]`.
    The paper's own bounds were not at hand: these are ours.
    """

    def __init__(self, lowest: float = 0.1, highest: float = 0.3, factor: float = 1.3) -> None:
        self.lowest, self.highest, self.factor = lowest, highest, factor
        self.threshold, self.rate, self.history = 1.0, 0.0, []

    def __call__(self, tensor: torch.Tensor, role: str, contracted: int) -> torch.Tensor:
        if role != "input":
            return round_trip(tensor, BLOCK)
        rounded, self.rate = with_residual(tensor, self.threshold)
        return rounded

    def adapt(self) -> None:
        """Raise the threshold where too many blocks fell back in the last forward, lower it where too few did."""
        self.history.append(self.rate)
        if self.rate > self.highest:
            self.threshold *= self.factor
        elif self.rate < self.lowest:
            self.threshold /= self.factor
