"""Angles between the hidden states of a prompt, and the walk along the order that they give."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_cosine(states: Tensor) -> Tensor:
    """
    Return the mean cosine of the pairs of different tokens.

    `C = 1 / (n (n - 1)) sum_{i != j} cos(h_i, h_j) = (|sum_i u_i|^2 - n) / (n (n - 1))`, `u_i = h_i / |h_i|`: the mean
    of the lower triangle of the matrix of cosines, in linear time.

    Args:
        states (`torch.Tensor`): Hidden states, not zero, shape `(tokens, width)`, at least one token.

    Returns:
        `torch.Tensor`: A scalar in [-1, 1]; 1 for a single token.

    Example:
    ```python
    >>> mean_cosine(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])).item()  # cosines 0, 1, 0
    0.3333333432674408
    ```
    """
    count = len(states)
    if count == 1:
        return states.new_ones(())
    total = F.normalize(states, dim=-1).sum(0)
    return (total.square().sum() - count) / (count * (count - 1))


def angle_score(states: Tensor, prefix: int, suffix: int = 0, inter_weight: float = 8.0) -> Tensor:
    """
    Return the angle score of one prompt: high where the model sees its tokens in like directions.

    `C_intra + inter_weight * C_inter`: the mean cosine of the pairs of question tokens, and that of the question
    tokens with the tokens of a prefix that all prompts have
    ([2506.02281](https://huggingface.co/papers/2506.02281)).

    Args:
        states (`torch.Tensor`): What the MLP of the last layer reads, shape `(tokens, width)`.
        prefix, suffix (`int`): Tokens before and after the question. Without a prefix `C_inter` is 0.
        inter_weight (`float`, *optional*, defaults to 8): The released code has 8.

    Raises:
        ValueError: no token is left for the question.

    Example:
    ```python
    >>> states = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> angle_score(states, prefix=1, inter_weight=2.0).item()  # intra 0, inter (1 + 0) / 2
    1.0
    ```
    """
    question = states[prefix : len(states) - suffix]
    if not len(question):
        raise ValueError(
            f"a prompt of {len(states)} tokens has no question between a prefix of {prefix} and a suffix of {suffix} "
            "tokens. Lower prefix_tokens and suffix_tokens, or leave them out: what all prompts share is then found."
        )
    intra = mean_cosine(question)
    if prefix == 0:
        return intra
    means = [F.normalize(part, dim=-1).mean(0) for part in (question, states[:prefix])]
    return intra + inter_weight * (means[0] @ means[1])


def shared_ends(prompts: Sequence[Sequence[int]], ends: tuple[int, int] | None = None) -> tuple[int, int]:
    """
    Return how many tokens all prompts share at their beginning and at their end.

    At least one token of the shortest prompt is in neither.

    Args:
        prompts (`Sequence[Sequence[int]]`): Token ids, at least one prompt.
        ends (`tuple[int, int]`, *optional*): The most that is asked for, where it is known.

    Example:
    ```python
    >>> shared_ends([[1, 2, 5, 9], [1, 2, 7, 8, 9], [1, 2, 6, 5, 9]])
    (2, 1)
    ```
    """
    first, shortest = prompts[0], min(map(len, prompts))
    prefix, suffix = (shortest, shortest) if ends is None else ends
    for prompt in prompts:
        prefix = _common(first, prompt, min(prefix, shortest - 1))
        suffix = _common(first[::-1], prompt[::-1], min(suffix, shortest - 1))
    return prefix, min(suffix, shortest - 1 - prefix)


def _common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    return next((i for i in range(most) if one[i] != other[i]), max(0, most))


def gaussian_weights(size: int, mean: float, width: float) -> Tensor:
    """
    Return `exp(-1/2 ((i - mean) / width)^2)` for each rank `i`, float64, shape `(size,)`.

    Example:
    ```python
    >>> [round(w, 4) for w in gaussian_weights(4, mean=1.0, width=1.0).tolist()]
    [0.6065, 1.0, 0.6065, 0.1353]
    ```
    """
    return torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - mean) / width) ** 2)


def draw_by_gaussian(size: int, mean: float, width: float, count: int, generator: torch.Generator) -> list[int]:
    """
    Draw ranks without replacement, each with a chance in proportion to its Gaussian weight among those that are left.

    By the `count` largest of `log w_i + g_i` with Gumbel noise `g`, which no weight is too small for.

    Args:
        size (`int`): Ranks.
        mean, width (`float`): Of [`gaussian_weights`].
        count (`int`): In [0, size].
        generator (`torch.Generator`): On the CPU.

    Returns:
        `list[int]`: Distinct ranks, in the order in which they were drawn.

    Example:
    ```python
    >>> draw_by_gaussian(100, 50.0, 0.1, 3, torch.Generator().manual_seed(0))
    [50, 49, 51]
    ```
    """
    uniform = torch.rand(size, dtype=torch.float64, generator=generator).clamp_(min=1e-300)
    keys = -0.5 * ((torch.arange(size, dtype=torch.float64) - mean) / width) ** 2 - torch.log(-torch.log(uniform))
    return torch.sort(keys, descending=True, stable=True).indices[:count].tolist()


def next_mean(
    mean: float,
    accuracy: float,
    angle: float,
    step: float,
    *,
    accuracy_gain: float = 2.0,
    accuracy_target: float = 0.5,
    angle_gain: float = 0.5,
) -> float:
    """
    Return where the Gaussian stands next: further along the order, the better the model does.

    `mean + clip(step tanh(accuracy_gain (accuracy - accuracy_target)) + step tanh(angle_gain * angle), 0, 2 step)`.

    Args:
        mean (`float`): Where it stands, a rank.
        accuracy (`float`): Share of right answers, in [0, 1].
        angle (`float`): Mean cosine, in [-1, 1].
        step (`float`): `n` of the paper, in ranks.

    Example:
    ```python
    >>> round(next_mean(100.0, accuracy=0.5, angle=0.5, step=500.0), 2)
    222.46
    >>> next_mean(100.0, accuracy=0.0, angle=0.5, step=500.0)  # never back
    100.0
    ```
    """
    moved = step * math.tanh(accuracy_gain * (accuracy - accuracy_target)) + step * math.tanh(angle_gain * angle)
    return mean + min(max(moved, 0.0), 2 * step)
