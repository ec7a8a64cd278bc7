"""Span corruption and prefix language modelling as one family of denoisers (T5, UL2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_count, check_number


@dataclass(frozen=True)
class Denoiser:
    """
    One way to corrupt a row.

    Args:
        mode (`str`): Name of the mode, such as `"R"`, `"X"` or `"S"`.
        density (`float`): Share of the tokens that are hidden, in `(0, 1)`.
        mean_span (`float`, *optional*): Mean length of the hidden spans, at least 1. `None`: one span, the end of the
            row (prefix language modelling).
        weight (`float`, *optional*, defaults to 1.0): Share in a mixture, before normalising. Positive.

    Raises:
        ValueError: an argument out of range.
    """

    mode: str
    density: float
    mean_span: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("density", self.density, 0, 1, open_low=True, open_high=True)
        check_number("weight", self.weight, 0, open_low=True)
        if self.mean_span is not None:
            check_number("mean_span", self.mean_span, 1)


#: The seven denoisers of UL2, table 1. The shares of the modes, 0.4, 0.4 and 0.2, are those of public ports.
UL2_DENOISERS = (
    Denoiser("R", 0.15, 3, 0.2),
    Denoiser("R", 0.15, 8, 0.2),
    Denoiser("X", 0.5, 3, 0.1),
    Denoiser("X", 0.5, 8, 0.1),
    Denoiser("X", 0.15, 64, 0.1),
    Denoiser("X", 0.5, 64, 0.1),
    Denoiser("S", 0.25, None, 0.2),
)

#: The four of UL2R (2210.11399), for continuing to train a causal model; equal shares, as in a public port.
UL2R_DENOISERS = (Denoiser("R", 0.15, 3), Denoiser("X", 0.15, 32), Denoiser("X", 0.5, 3), Denoiser("S", 0.25))


def noise_counts(length: int, denoiser: Denoiser) -> tuple[int, int]:
    """
    Return how many tokens of a row are hidden, and in how many spans: the same for every draw.

    `n = round(length density)` in `[1, length - 1]`, `s = round(n / mean_span)` in `[1, min(n, length - n)]`.

    Args:
        length (`int`): Tokens of the row, at least 2.
        denoiser (`Denoiser`): What hides them.

    Raises:
        ValueError: a shorter row.

    Example:
    ```python
    >>> [noise_counts(512, denoiser) for denoiser in UL2_DENOISERS[:3]], noise_counts(2, UL2_DENOISERS[0])
    ([(77, 26), (77, 10), (256, 85)], (1, 1))
    ```
    """
    check_count("length", length, 2)
    noise = min(max(round(length * denoiser.density), 1), length - 1)
    spans = 1 if denoiser.mean_span is None else round(noise / denoiser.mean_span)
    return noise, min(max(spans, 1), noise, length - noise)


def span_mask(length: int, denoiser: Denoiser, generator: torch.Generator) -> Tensor:
    """
    Draw which tokens of a row are hidden.

    Plain and hidden spans take turns, a plain one first and a hidden one last; all such splits into [`noise_counts`]
    are equally likely.

    Args:
        length (`int`): Tokens of the row, at least 2.
        denoiser (`Denoiser`): What hides them.
        generator (`torch.Generator`): On the CPU; the only source of chance.

    Returns:
        `torch.Tensor`: Boolean, shape `(length,)`.

    Raises:
        ValueError: a shorter row.

    Example:
    ```python
    >>> span_mask(8, Denoiser("S", 0.25), torch.Generator()).tolist()
    [False, False, False, False, False, False, True, True]
    ```
    """
    noise, spans = noise_counts(length, denoiser)
    turns = torch.stack([_cut(length - noise, spans, generator), _cut(noise, spans, generator)], dim=1)
    return torch.tensor([False, True]).repeat(spans).repeat_interleave(turns.flatten())


def _cut(total: int, parts: int, generator: torch.Generator) -> Tensor:
    """Return `parts` positive lengths that sum to `total`, all such lists equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    return torch.cat([cuts, torch.tensor([total])]).diff(prepend=torch.tensor([0]))


def split_spans(ids: Tensor, hidden: Tensor, sentinel_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """
    Return what is left of a row, and what was hidden: each span is replaced by a sentinel, which then stands before
    it.

    Every token is in exactly one of the two.

    Args:
        ids (`torch.Tensor`): A row, shape `(tokens,)`.
        hidden (`torch.Tensor`): Boolean, same shape.
        sentinel_ids (`Sequence[int]`): One for each span, in their order; more are not used.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: inputs and targets.

    Raises:
        ValueError: fewer sentinels than spans.

    Example:
    ```python
    >>> hidden = torch.tensor([False, True, True, False, True])
    >>> split_spans(torch.tensor([10, 11, 12, 13, 14]), hidden, [90, 91])
    (tensor([10, 90, 13, 91]), tensor([90, 11, 12, 91, 14]))
    ```
    """
    begins = hidden & ~torch.cat([torch.tensor([False]), hidden[:-1]])
    spans = int(begins.sum())
    if spans > len(sentinel_ids):
        raise ValueError(f"{spans} spans are hidden, and there are {len(sentinel_ids)} sentinel_ids. Pass more.")
    sentinel = torch.tensor([*sentinel_ids[:spans], 0], dtype=ids.dtype)[begins.long().cumsum(0) - 1]
    inputs = torch.where(begins, sentinel, ids)[begins | ~hidden]
    both = torch.stack([sentinel, ids], dim=1)
    return inputs, both[torch.stack([begins, hidden], dim=1)]


def denoised_lengths(length: int, denoiser: Denoiser) -> tuple[int, int]:
    """
    Return the tokens of inputs and targets that a row turns into, sentinels included: the same for every draw.

    Raises:
        ValueError: a row of fewer than 2 tokens.

    Example:
    ```python
    >>> denoised_lengths(512, Denoiser("R", 0.15, 3))
    (461, 103)
    ```
    """
    noise, spans = noise_counts(length, denoiser)
    return length - noise + spans, noise + spans


def fitting_length(denoisers: Sequence[Denoiser], max_length: int, max_target_length: int | None = None) -> int:
    """
    Return the longest row that fits after every denoiser, so that nothing is cut off.

    Args:
        denoisers (`Sequence[Denoiser]`): The mixture.
        max_length (`int`): Room for the inputs; for inputs and targets together without `max_target_length`.
        max_target_length (`int`, *optional*): Room for the targets.

    Raises:
        ValueError: no denoiser, or no row of 2 tokens fits.

    Example:
    ```python
    >>> fitting_length([Denoiser("R", 0.15, 3)], 511, 113), fitting_length([Denoiser("R", 0.15, 3)], 512)
    (568, 466)
    ```
    """
    if not denoisers:
        raise ValueError("denoisers is empty. Pass at least one, such as UL2_DENOISERS.")

    def fits(length: int) -> bool:
        for denoiser in denoisers:
            inputs, targets = denoised_lengths(length, denoiser)
            room = (max_length,) if max_target_length is None else (max_length, max_target_length)
            need = (inputs + targets,) if max_target_length is None else (inputs, targets)
            if any(n > m for n, m in zip(need, room, strict=True)):
                return False
        return True

    longest = max_length + (max_target_length or 0)
    found = next((length for length in range(longest, 1, -1) if fits(length)), None)
    if found is None:
        raise ValueError(
            f"No row of 2 tokens fits into max_length={max_length}, max_target_length={max_target_length}. Raise them."
        )
    return found
