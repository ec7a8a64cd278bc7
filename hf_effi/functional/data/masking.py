"""Masked language modelling with a masking ratio that depends on progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..options import refuse_idle
from ._checks import check_count, check_number


def masking_ratio(
    progress: float,
    start: float = 0.3,
    end: float = 0.15,
    *,
    warmup_fraction: float = 0.0,
    warmup_from: float = 0.15,
) -> float:
    """
    Return the masking ratio: linear from `start` to `end`, after an optional linear rise to `start`.

    `start + (end - start) (p - w) / (1 - w)` for `p >= w`, `warmup_from + (start - warmup_from) p / w` before.

    Args:
        progress (`float`): Share of the run done, `p`, clamped to `[0, 1]`.
        start (`float`, *optional*, defaults to 0.3): In `(0, 1]`.
        end (`float`, *optional*, defaults to 0.15): In `(0, 1]`.
        warmup_fraction (`float`, *optional*, defaults to 0.0): `w` in `[0, 1)`.
        warmup_from (`float`, *optional*, defaults to 0.15): In `(0, 1]`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> [round(masking_ratio(p), 4) for p in (-1, 0, 0.5, 1, 2)]
    [0.3, 0.3, 0.225, 0.15, 0.15]
    >>> [round(masking_ratio(p, warmup_fraction=0.05), 4) for p in (0, 0.025, 0.05, 0.525, 1)]
    [0.15, 0.225, 0.3, 0.225, 0.15]
    ```
    """
    for name, value in (("start", start), ("end", end), ("warmup_from", warmup_from)):
        check_number(name, value, 0, 1, open_low=True)
    rise = check_number("warmup_fraction", warmup_fraction, 0, 1, open_high=True)
    refuse_idle("warmup_from", warmup_from, 0.15, rise > 0, "with a warmup_fraction above 0")
    done = min(max(check_number("progress", progress, -math.inf), 0.0), 1.0)
    if done < rise:
        return warmup_from + (start - warmup_from) * done / rise
    return start + (end - start) * (done - rise) / (1 - rise)


def continues_word(tokens: Sequence[str], style: Literal["##", "prefix"] = "##") -> Tensor:
    """
    Return which tokens of a vocabulary continue a word, for whole-word masking.

    Args:
        tokens (`Sequence[str]`): In the order of their ids: `tokenizer.convert_ids_to_tokens(range(len(tokenizer)))`.
        style (`str`, *optional*, defaults to `"##"`): `"##"` marks continuations (WordPiece). `"prefix"`: the first
            piece of a word begins with a marker of the space before it (byte-level BPE, SentencePiece); all others
            continue.

    Returns:
        `torch.Tensor`: Boolean, shape `(vocabulary,)`.

    Raises:
        ValueError: another style, or no token is marked in this style.

    Example:
    ```python
    >>> continues_word(["[CLS]", "play", "##ing"]).tolist()
    [False, False, True]
    ```
    """
    if style not in ("##", "prefix"):
        raise ValueError(f"style={style!r} is not known. Use '##' or 'prefix'.")
    marks = ("##",) if style == "##" else ("\u0120", "\u2581")
    marked = torch.tensor([token.startswith(marks) for token in tokens], dtype=torch.bool)
    if not bool(marked.any()):
        raise ValueError(f"No token of the vocabulary is marked in style={style!r}. Try the other, or mask tokens.")
    return marked if style == "##" else ~marked


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    ratio: float,
    generator: torch.Generator,
    *,
    mask_token_id: int,
    vocab_size: int,
    continues: Tensor | None = None,
    random_share: float = 0.1,
    keep_share: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """
    Mask words at random, each with probability `ratio`, and at least one in each row that has any.

    Args:
        input_ids (`torch.Tensor`): Shape `(rows, tokens)`.
        maskable (`torch.Tensor`): Boolean, same shape: neither special nor padding.
        ratio (`float`): In `(0, 1]`.
        generator (`torch.Generator`): On the CPU; the only source of chance.
        mask_token_id (`int`): What a masked token becomes.
        vocab_size (`int`): Random tokens are drawn below it.
        continues (`torch.Tensor`, *optional*): From [`continues_word`]: all pieces of a word are masked, or none.
        random_share, keep_share (`float`, *optional*, default to 0.1): Share of the chosen tokens that becomes a
            random token, or stays; the rest becomes the mask. 0 and 0 is all masks.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the new `input_ids`, and `labels` with -100 where nothing was chosen.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> ids = torch.tensor([[1, 7, 8, 2]])
    >>> mask_tokens(ids, ids > 2, 1.0, torch.Generator(), mask_token_id=0, vocab_size=9, random_share=0, keep_share=0)
    (tensor([[1, 0, 0, 2]]), tensor([[-100,    7,    8, -100]]))
    ```
    """
    check_number("ratio", ratio, 0, 1, open_low=True)
    check_number("random_share", random_share, 0, 1)
    check_number("keep_share", keep_share, 0, 1 - random_share)
    check_count("vocab_size", vocab_size)
    device, shape = input_ids.device, input_ids.shape
    draw, fate = torch.rand((2, *shape), generator=generator, dtype=torch.float64).to(device)
    other = torch.randint(vocab_size, shape, generator=generator).to(device)
    if continues is not None:
        # A special token ends a word, so a piece behind it begins one.
        joins = continues.to(device)[input_ids] & maskable
        joins[:, 1:] &= maskable[:, :-1]
        joins[:, :1] = False
        draw = draw.gather(1, (~joins).long().cumsum(dim=1) - 1)
    draw = draw.masked_fill(~maskable, 2.0)
    chosen = ((draw < ratio) | (draw == draw.amin(dim=1, keepdim=True))) & maskable
    masked = torch.where(fate < 1 - random_share - keep_share, torch.full_like(input_ids, mask_token_id), input_ids)
    masked = torch.where((fate >= 1 - random_share - keep_share) & (fate < 1 - keep_share), other, masked)
    return torch.where(chosen, masked, input_ids), input_ids.masked_fill(~chosen, -100)
