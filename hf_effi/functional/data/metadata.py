"""Metadata beside the text (MeCo): which step still sees it, and where its tokens and labels go."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ._checks import check_count, check_number


def domain_of(url: str) -> str:
    """
    Return the host of a URL, in lower case and without port or user: what MeCo puts in front of a document.

    Example:
    ```python
    >>> [domain_of(url) for url in ("https://En.wikipedia.org:443/wiki/LR", "en.wikipedia.org/wiki", "")]
    ['en.wikipedia.org', 'en.wikipedia.org', '']
    ```
    """
    return urlsplit(url if "//" in url else f"//{url}").hostname or ""


def cooldown_step(total_steps: int, cooldown_fraction: float) -> int:
    """
    Return the first update that sees plain documents: `ceil((1 - f) T)`, counted from 0.

    Args:
        total_steps (`int`): Updates of the run, `T`, at least 0.
        cooldown_fraction (`float`): `f` in `[0, 1]`. 0 never switches, 1 never conditions.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> plans = [(40000, 0.1), (10, 0.7), (7, 0.1), (5, 0), (5, 1)]
    >>> [cooldown_step(total_steps, fraction) for total_steps, fraction in plans]
    [36000, 3, 7, 5, 0]
    ```
    """
    check_number("cooldown_fraction", cooldown_fraction, 0, 1)
    # The slack keeps 0.29 * 100 = 28.999999999999996 at 29.
    return check_count("total_steps", total_steps, 0) - int(cooldown_fraction * total_steps + 1e-9)


def join_metadata(
    input_ids: Tensor,
    labels: Tensor,
    text_lengths: Tensor,
    metadata_ids: Tensor,
    metadata_lengths: Tensor,
    where: Literal["prepend", "append"] = "prepend",
    *,
    pad_token_id: int = 0,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """
    Join right-padded documents and their metadata into right-padded rows.

    `prepend`: `BOS metadata text EOS`, no loss on BOS and metadata. `append`: `BOS text metadata EOS`, loss on the
    metadata. A row without metadata stays as it is. With `max_length` metadata is cut to a quarter of it, then the
    text to what is left; the end of each is cut off.

    Args:
        input_ids, labels (`torch.Tensor`): Documents, shape `(rows, tokens)`.
        text_lengths (`torch.Tensor`): Real tokens of each document, shape `(rows,)`.
        metadata_ids (`torch.Tensor`): Shape `(rows, metadata tokens)`; may have no column.
        metadata_lengths (`torch.Tensor`): Real tokens of each row's metadata, shape `(rows,)`; 0 is none.
        where (`str`, *optional*, defaults to `"prepend"`): `"prepend"` or `"append"`.
        pad_token_id (`int`, *optional*, defaults to 0): Fills up `input_ids`.
        bos_token_id, eos_token_id (`int`, *optional*): Stay first and last where a document has them.
        max_length (`int`, *optional*): Longest row, at least 4.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels`, shape `(rows, longest joined row)`.

    Raises:
        ValueError: another `where`, or `max_length` below 4.

    Example:
    ```python
    >>> ids, meta = torch.tensor([[1, 11, 12, 2]]), torch.tensor([[7, 8]])
    >>> joined = join_metadata(ids, ids, torch.tensor([4]), meta, torch.tensor([2]), bos_token_id=1)
    >>> joined["input_ids"].tolist(), joined["labels"].tolist()
    ([[1, 7, 8, 11, 12, 2]], [[-100, -100, -100, 11, 12, 2]])
    >>> joined = join_metadata(ids, ids, torch.tensor([4]), meta, torch.tensor([2]), "append", eos_token_id=2)
    >>> joined["labels"].tolist()
    [[1, 11, 12, 7, 8, 2]]
    ```
    """
    if where not in ("prepend", "append"):
        raise ValueError(f"where={where!r} is not known. Use 'prepend' or 'append'.")
    text, extra = text_lengths[:, None], metadata_lengths[:, None]
    if max_length is not None:
        extra = extra.clamp(max=check_count("max_length", max_length, 4) // 4)
        text = torch.minimum(text, max_length - extra)
    place = torch.arange(int((text + extra).max()), device=input_ids.device)[None]
    split = _split_point(input_ids, text, where, bos_token_id if where == "prepend" else eos_token_id)
    tokens = input_ids.shape[1]
    end = tokens + metadata_ids.shape[1]  # the column of padding behind documents and metadata
    source = torch.where(place < split, place, tokens + place - split)
    source = torch.where(place >= split + extra, place - extra, source)
    source = torch.where(place >= text + extra, end, source)
    loss_on = metadata_ids if where == "append" else torch.full_like(metadata_ids, -100)
    out = {
        "input_ids": _pick(input_ids, metadata_ids, pad_token_id, source),
        "attention_mask": (place < text + extra).long(),
        "labels": _pick(labels, loss_on, -100, source),
    }
    if where == "prepend":
        out["labels"] = out["labels"].masked_fill((place < split) & (extra > 0), -100)
    return out


def _split_point(input_ids: Tensor, text: Tensor, where: str, token: int | None) -> Tensor:
    """Return how many tokens of each document stand before its metadata, shape `(rows, 1)`."""
    edge = torch.zeros_like(text) if where == "prepend" else (text - 1).clamp(min=0)
    has = torch.zeros_like(text) if token is None else (input_ids.gather(1, edge) == token).long() * (text > 0).long()
    return has if where == "prepend" else text - has


def _pick(documents: Tensor, metadata: Tensor, fill: int, source: Tensor) -> Tensor:
    return torch.cat([documents, metadata, torch.full_like(documents[:, :1], fill)], dim=1).gather(1, source)
