"""Random layerwise token dropping: how many tokens a layer keeps, which ones, and what that costs."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def kept_tokens(step: int, ramp_steps: int, min_tokens: int, max_tokens: int, multiple: int = 16) -> int:
    """
    Return how many tokens of a sequence a dropping layer keeps at `step`.

    `v = floor(min + (max - min) step / ramp_steps)`, down to a multiple; `max_tokens` from `ramp_steps` on. The linear
    schedule of random-LTD, arXiv:2211.11586.

    Args:
        step (`int`): Finished updates, at least 0.
        ramp_steps (`int`): Updates until no token is dropped; 0 drops none.
        min_tokens (`int`): Tokens kept at step 0, from `multiple` to `max_tokens`.
        max_tokens (`int`): The length of the sequences.
        multiple (`int`, *optional*, defaults to `16`): Grid of the values.

    Raises:
        ValueError: a value out of range.

    Example:
    ```python
    >>> [kept_tokens(step, 100, 128, 2048) for step in (0, 1, 50, 99, 100)]
    [128, 144, 1088, 2016, 2048]
    ```
    """
    check_range(min_tokens, max_tokens, multiple)
    if step < 0 or ramp_steps < 0:
        raise ValueError(f"step={step!r} and ramp_steps={ramp_steps!r} must be at least 0.")
    if step >= ramp_steps:
        return max_tokens
    value = min_tokens + (max_tokens - min_tokens) * step // ramp_steps
    return value - value % multiple if value < max_tokens else max_tokens


def check_range(min_tokens: int, max_tokens: int, multiple: int) -> None:
    """Raise unless `1 <= multiple <= min_tokens <= max_tokens`, all whole numbers."""
    values = {"multiple": multiple, "min_tokens": min_tokens, "max_tokens": max_tokens}
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    if not multiple <= min_tokens <= max_tokens:
        raise ValueError(
            f"min_tokens={min_tokens} is outside [multiple={multiple}, max_tokens={max_tokens}]. max_tokens is the "
            "length of the sequences; a quarter of it is a careful min_tokens."
        )


def draw_kept(scores: Tensor, kept: int, real: Tensor | None = None) -> Tensor:
    """
    Return the positions of the `kept` lowest scores of each row, in rising order; padding only where real tokens end.

    With uniform scores this is a uniform subset of the real tokens, without replacement.

    Args:
        scores (`torch.Tensor`): Of shape `(batch, length)`, in `[0, 1)`.
        kept (`int`): From 1 to `length`.
        real (`torch.Tensor`, *optional*): Booleans of the same shape, false for padding.

    Returns:
        `torch.Tensor`: Indices of shape `(batch, kept)`.

    Example:
    ```python
    >>> draw_kept(torch.tensor([[0.7, 0.1, 0.9, 0.3]]), 2).tolist()
    [[1, 3]]
    >>> draw_kept(torch.tensor([[0.7, 0.1, 0.9, 0.3]]), 2, torch.tensor([[True, False, True, False]])).tolist()
    [[0, 2]]
    ```
    """
    if not 1 <= kept <= scores.shape[1]:
        raise ValueError(f"kept={kept} is outside [1, {scores.shape[1]}], the length of a row.")
    if real is not None:
        scores = scores + (~real).to(scores.dtype)
    return scores.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values


def uniform_scores(batch: int, length: int, *key: int) -> Tensor:
    """
    Return uniform numbers of shape `(batch, length)` that depend on `key` only; the global random state is left alone.

    Example:
    ```python
    >>> bool((uniform_scores(2, 3, 42, 7) == uniform_scores(2, 3, 42, 7)).all())
    True
    ```
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))


def layer_tokens(batch: int, length: int, kept: int, num_layers: int, num_dropping: int) -> int:
    """
    Return the layer-tokens of a batch: each layer counts the tokens that it processes.

    `batch (kept num_dropping + length (num_layers - num_dropping))`, with `kept` at most `length`.

    Example:
    ```python
    >>> layer_tokens(8, 128, 64, num_layers=12, num_dropping=10)  # all 12 with 128 tokens: 12288
    7168
    ```
    """
    return batch * (min(kept, length) * num_dropping + length * (num_layers - num_dropping))


def ramp_length(max_steps: int, fraction: float) -> int:
    """Return the updates of a run in which tokens are dropped: `ceil(fraction max_steps)`."""
    return math.ceil(fraction * max_steps)
