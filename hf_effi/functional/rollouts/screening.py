"""SPEED: which prompts are worth the rest of their rollouts, from the first few."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data import check_count, check_number


def check_screening_band(low: float, high: float) -> None:
    """Raise `ValueError` unless `0 <= low < high <= 1`."""
    check_number("low", low, 0, 1)
    check_number("high", high, 0, 1)
    if not low < high:
        raise ValueError(f"low={low!r} must be below high={high!r}, and both in [0, 1]. SPEED uses low=0.0, high=1.0.")


def qualifies(successes: Tensor, counts: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """
    Whether the pass rate of the screening rollouts lies strictly inside the band: `low < s / n < high`.

    Paper: [SPEED-RL](https://huggingface.co/papers/2506.09016).

    Args:
        successes (`torch.Tensor`): Right screening rollouts of each prompt, shape `(num_prompts,)`.
        counts (`torch.Tensor`): Scorable screening rollouts of each prompt, same shape; 0 = unscorable, which does not
            qualify.
        low, high (`float`, *optional*, default to 0 and 1): The band; its ends are outside.

    Returns:
        `torch.Tensor`: Boolean, shape `(num_prompts,)`.

    Example:
    ```python
    >>> qualifies(torch.tensor([0, 1, 4, 0]), torch.tensor([4, 4, 4, 0])).tolist()
    [False, True, False, False]
    ```
    """
    check_screening_band(low, high)
    successes, counts = _counted(successes, counts)
    rates = successes / counts  # NaN where nothing could be scored, which is in no band
    return (rates > low) & (rates < high)


def screen(successes: Tensor, counts: Tensor, low: float, high: float, wanted: int) -> list[int]:
    """
    Return which screened prompts get the rest of their rollouts, in the order of generation.

    These are the first `wanted` prompts that qualify, see [`qualifies`]. Where fewer do, the others fill up, the best
    bet first: a prompt whose estimated pass rate `(s + 1) / (n + 2)` (the mean of a Beta(1, 1) posterior) is nearest
    to the middle of the band, so that among dead prompts those seen least go first; unscorable prompts last; ties to
    the lower index. With `low=0, high=1` every prompt that was screened with equal counts and is dead is as good as
    another.

    Args:
        successes, counts (`torch.Tensor`): See [`qualifies`].
        low, high (`float`): The band, `0 <= low < high <= 1`.
        wanted (`int`): Prompts to return, in [1, num_prompts].

    Returns:
        `list[int]`: `wanted` different indices, ascending.

    Raises:
        ValueError: the band is empty, or more prompts are wanted than were screened.

    Example:
    ```python
    >>> successes, counts = torch.tensor([0, 1, 4, 2, 3]), torch.tensor([4, 4, 4, 4, 4])
    >>> screen(successes, counts, 0.0, 1.0, wanted=2)
    [1, 3]
    >>> screen(successes, counts, 0.0, 0.5, wanted=3)
    [0, 1, 3]
    ```
    """
    check_count("wanted", wanted)
    fits = qualifies(successes, counts, low, high)
    if wanted > len(fits):
        raise ValueError(f"wanted={wanted} prompts of {len(fits)} that were screened. Screen at least as many.")
    successes, counts = _counted(successes, counts)
    distance = ((successes + 1) / (counts + 2) - (low + high) / 2).abs()
    distance[counts == 0] = torch.inf
    distance[fits] = -1.0
    return sorted(torch.sort(distance, stable=True).indices[:wanted].tolist())


def screening_shares(wanted: int, group_size: int, initial: int, candidates: float) -> tuple[int, int, int]:
    """
    Return how many prompts are screened, how many rollouts a chosen one still gets, and all rollouts of both stages.

    `ceil(candidates * wanted)`, `group_size - initial`, and
    `ceil(candidates * wanted) * initial + wanted * (group_size - initial)`.

    Args:
        wanted (`int`): Prompts of a generation that are trained on.
        group_size (`int`): Completions of a trained group.
        initial (`int`): Screening rollouts of a prompt, in [1, group_size - 1].
        candidates (`float`): Prompts screened for each that is wanted, >= 1.

    Example:
    ```python
    >>> screening_shares(wanted=16, group_size=24, initial=8, candidates=4.0)
    (64, 16, 768)
    ```
    """
    if not 1 <= initial < group_size:
        raise ValueError(
            f"initial={initial!r} screening rollouts must be in [1, {group_size - 1}]: of the num_generations="
            f"{group_size} completions of a group at least one is generated after screening."
        )
    # The subtraction keeps 1.1 * 10 = 11.000000000000002 from being 12 prompts.
    screened = math.ceil(candidates * wanted - 1e-9)
    return screened, group_size - initial, screened * initial + wanted * (group_size - initial)


def _counted(successes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    successes, counts = (value.detach().to("cpu", torch.float64) for value in (successes, counts))
    if successes.shape != counts.shape or successes.ndim != 1:
        raise ValueError(
            f"successes {tuple(successes.shape)} and counts {tuple(counts.shape)} must hold one number per prompt."
        )
    if bool(((successes < 0) | (successes > counts)).any()):
        raise ValueError("successes must lie between 0 and counts for each prompt.")
    return successes, counts
