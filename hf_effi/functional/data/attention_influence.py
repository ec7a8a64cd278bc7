"""Which attention heads copy from the context, and how much worse a row gets without them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._checks import check_count, check_number, seeded


def copy_probe(num_rows: int, length: int, token_ids: Sequence[int], seed: int = 0) -> Tensor:
    """
    Return rows of `length` distinct random tokens, each followed by the same tokens again.

    Nothing but the context tells the second half, so that only heads that look back can predict it.

    Args:
        num_rows (`int`): Rows, at least 1.
        length (`int`): Tokens of one half, in `[2, len(token_ids)]`.
        token_ids (`Sequence[int]`): What to draw from, without replacement in a row.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Returns:
        `torch.Tensor`: Shape `(num_rows, 2 * length)`, int64.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> row = copy_probe(1, 3, range(10))[0]
    >>> row[:3].equal(row[3:]), row.unique().numel()
    (True, 3)
    ```
    """
    check_count("num_rows", num_rows)
    check_count("length", length, 2)
    tokens = torch.tensor(list(token_ids), dtype=torch.long)
    if length > tokens.numel():
        raise ValueError(f"length={length} exceeds the {tokens.numel()} token_ids. Lower it, or give more tokens.")
    generator = seeded(seed)
    half = torch.stack([tokens[torch.randperm(tokens.numel(), generator=generator)[:length]] for _ in range(num_rows)])
    return torch.cat([half, half], dim=1)


def copy_scores(attention: Tensor) -> Tensor:
    """
    Return the share of the second half in which a head attends most to the token that comes next.

    `1/(n-1) sum_t 1[argmax_j A_tj = t - n + 1]` over the positions `t` of the repeat but the last: the retrieval score
    of Wu et al. (2404.15574, section 2) on a [`copy_probe`], under teacher forcing.

    Args:
        attention (`torch.Tensor`): Weights on a probe, shape `(rows, heads, 2 * length, 2 * length)`.

    Returns:
        `torch.Tensor`: Mean over rows, shape `(heads,)`, float64, in `[0, 1]`.

    Raises:
        ValueError: another shape.

    Example:
    ```python
    >>> weights = torch.zeros(1, 1, 4, 4)
    >>> weights[0, 0, 2, 1] = 1.0  # the first token of the repeat looks at the second token
    >>> copy_scores(weights).tolist()
    [1.0]
    ```
    """
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3] or attention.shape[2] % 2:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}. Pass (rows, heads, 2 * length, 2 * length), the weights "
            "on a copy_probe."
        )
    length = attention.shape[2] // 2
    if length < 2:
        raise ValueError("A probe of 1 token has nothing to copy. Use length=2 or more.")
    looked_at = attention[:, :, length:-1].argmax(-1)
    wanted = torch.arange(1, length, device=attention.device)
    return (looked_at == wanted).double().mean((0, 2)).cpu()


def top_heads(scores: Mapping[tuple[int, int], float], share: float = 0.05) -> list[tuple[int, int]]:
    """
    Return the `max(1, floor(share * num_heads))` heads with the highest scores, sorted by layer and head.

    Ties go to the lower layer, then the lower head.

    Args:
        scores (`Mapping[tuple[int, int], float]`): Score of each `(layer, head)`.
        share (`float`, *optional*, defaults to 0.05): Share of the heads, in `(0, 1]`. The paper: 5 %.

    Raises:
        ValueError: no head, a NaN, or a share out of range.

    Example:
    ```python
    >>> top_heads({(0, 0): 0.1, (0, 1): 0.9, (1, 0): 0.9, (1, 1): 0.0}, share=0.5)
    [(0, 1), (1, 0)]
    ```
    """
    check_number("share", share, 0, 1, open_low=True)
    if not scores:
        raise ValueError("scores is empty: there is no attention head to choose.")
    for head, score in scores.items():
        if math.isnan(score):
            raise ValueError(f"The score of head {head} is NaN. Use a model in a precision that does not overflow.")
    count = max(1, math.floor(share * len(scores) + 1e-9))
    return sorted(sorted(scores, key=lambda head: (-scores[head], head))[:count])


def relative_increase(base: Tensor | Sequence[float], changed: Tensor | Sequence[float]) -> Tensor:
    """
    Return `(changed - base) / base` of two losses of each row: the score of AttentionInfluence (2505.07293).

    A base loss of 0, or a NaN on either side, gives NaN.

    Args:
        base (`torch.Tensor` or `Sequence[float]`): Loss under the model as it is, shape `(num_rows,)`, at least 0.
        changed (`torch.Tensor` or `Sequence[float]`): Loss under the model without its retrieval heads.

    Raises:
        ValueError: different lengths, or a negative loss.

    Example:
    ```python
    >>> relative_increase([1.0, 2.0], [1.5, 1.0]).tolist()
    [0.5, -0.5]
    ```
    """
    before, after = torch.as_tensor(base).double(), torch.as_tensor(changed).double()
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(
            f"base has shape {tuple(before.shape)} and changed {tuple(after.shape)}. Give both losses of the same "
            "rows."
        )
    if bool((before < 0).any()):
        raise ValueError(f"base={float(before.min())} is negative. Pass mean token losses in nats, in [0, inf).")
    return torch.where(before == 0, torch.nan, (after - before) / before)
