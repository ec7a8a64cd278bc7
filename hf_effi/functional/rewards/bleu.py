"""BLEU on token ids, of a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: what is done about an order of n-grams without a match, as NLTK's method0 to method3 do it
SMOOTHINGS = ("none", "floor", "add_k", "exp")
#: how n-grams are told apart: as numbers, or as rows of ids
COUNTINGS = ("hash", "rows")
#: what the smoothings that have a number take by default
_SMOOTHING_VALUES = {"floor": 0.1, "add_k": 1.0}
_LARGEST, _LARGEST_VOCABULARY = 2**63 - 1, 2**31
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
#: longest n-grams that are counted: a table is made for each order
MOST_ORDERS = 64


def sentence_bleu(
    candidate_ids: Tensor,
    reference_ids: Tensor,
    pad_id: int,
    max_n: int = 4,
    weights: Sequence[float] | None = None,
    smoothing: str = "none",
    smoothing_value: float | None = None,
    counting: str = "hash",
) -> Tensor:
    """
    BLEU of each candidate with its own references, on token ids.

    `BLEU = BP exp(sum_n w_n log p_n)`, `p_n = sum_g min(c_g, max_r c_gr) / sum_g c_g` over the n-grams `g` of the
    candidate; `BP = 1` where it is longer than the reference of the closest length `r`, else `exp(1 - r / c)`. The
    n-grams of the whole batch are counted by one sort per order. Equal to NLTK's `sentence_bleu`.

    It depends on the tokenizer: a reward, and no figure to compare between models.

    Paper: [TensorBLEU](https://huggingface.co/papers/2510.05485).

    Args:
        candidate_ids (`torch.Tensor`): Integers >= 0, shape `(batch, tokens)`.
        reference_ids (`torch.Tensor`): Shape `(batch, tokens)`, or `(batch, references, tokens)`; a reference that is
            all padding is none.
        pad_id (`int`): Padding, anywhere in a row, may be negative. What touches it is no n-gram.
        max_n (`int`, *optional*, defaults to 4): Longest n-grams, 1 to 64.
        weights (`Sequence[float]`, *optional*): `w_n`, one for each order, >= 0. Defaults to `1 / max_n`.
        smoothing (`str`, *optional*, defaults to `"none"`): Of orders without a match: `"none"` leaves 0; `"floor"`
            counts `smoothing_value` matches; `"exp"` counts 1/2 in the first such order, 1/4 in the next; `"add_k"`
            adds `smoothing_value` to matches and n-grams of each order above 1. NLTK's method0, 1, 3 and 2. Without
            a token in common the result is 0 in any case.
        smoothing_value (`float`, *optional*): > 0, for `"floor"` (0.1) and `"add_k"` (1.0) only.
        counting (`str`, *optional*, defaults to `"hash"`): `"hash"` makes one integer of an n-gram, without
            collisions, and is faster; `"rows"` is the paper's `torch.unique(dim=0)`. The same result.

    Returns:
        `torch.Tensor`: float64 in [0, 1], shape `(batch,)`; 0 for an empty candidate, NaN without a reference.

    Raises:
        ValueError: a shape, id or argument is out of range, or `smoothing_value` would not be read.

    Example:
    ```python
    >>> candidates, references = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 1, 1, 0]]), torch.tensor([[5, 6, 7, 8, 9]] * 2)
    >>> sentence_bleu(candidates, references, pad_id=0).tolist()
    [1.0, 0.0]
    >>> [round(value, 4) for value in sentence_bleu(candidates, references, pad_id=0, smoothing="floor").tolist()]
    [1.0, 0.1323]
    ```
    """
    matches, totals, lengths, closest = _counted(candidate_ids, reference_ids, pad_id, max_n, counting)
    precisions = _smoothed(matches, totals, smoothing, smoothing_value)
    return _combined(precisions, matches[0], lengths, closest, _weights(weights, max_n))


def corpus_bleu(
    candidate_ids: Tensor,
    reference_ids: Tensor,
    pad_id: int,
    max_n: int = 4,
    weights: Sequence[float] | None = None,
    smoothing: str = "none",
    smoothing_value: float | None = None,
    counting: str = "hash",
) -> Tensor:
    """
    BLEU of all candidates as one text: matches, n-grams and lengths are added up first, see [`sentence_bleu`].

    Equal to NLTK's `corpus_bleu`, which counts an order of which a candidate is too short to have n-grams as one
    n-gram without a match.

    Args:
        candidate_ids, reference_ids, pad_id, max_n, weights, smoothing, smoothing_value, counting: As there. A
            candidate without a reference does not count.

    Returns:
        `torch.Tensor`: float64 in [0, 1], a single number; NaN where no candidate has a reference.

    Raises:
        ValueError: As there.

    Example:
    ```python
    >>> candidates, references = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 1, 1, 0]]), torch.tensor([[5, 6, 7, 8, 9]] * 2)
    >>> round(corpus_bleu(candidates, references, pad_id=0).item(), 4)
    0.6144
    ```
    """
    matches, totals, lengths, closest = _counted(candidate_ids, reference_ids, pad_id, max_n, counting)
    known = ~closest.isnan()
    sums = [torch.where(known, part, 0.0).sum(-1, keepdim=True) for part in (matches, totals, lengths)]
    near = closest.nansum(-1, keepdim=True)
    near = torch.where(known.any(), near, torch.full_like(near, math.nan))
    precisions = _smoothed(sums[0], sums[1], smoothing, smoothing_value)
    return _combined(precisions, sums[0][0], sums[2], near, _weights(weights, max_n)).squeeze(0)


# --- counting --------------------------------------------------------------------------------------------------------


def _counted(
    candidates: Tensor, references: Tensor, pad_id: int, max_n: int, counting: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return matches and n-grams, shape `(max_n, batch)`, and the lengths of candidates and of their references."""
    _check_orders(max_n)
    if counting not in COUNTINGS:
        raise ValueError(f"counting must be one of {COUNTINGS}, got {counting!r}.")
    if references.ndim == 2:
        references = references.unsqueeze(1)
    fits = candidates.ndim == 2 and references.ndim == 3 and len(references) == len(candidates)
    if not fits or candidates.dtype not in _INTEGERS or references.dtype not in _INTEGERS:
        raise ValueError(
            "candidate_ids must be integers of shape (batch, tokens), reference_ids of shape (batch, tokens) or "
            f"(batch, references, tokens), got {candidates.dtype} {tuple(candidates.shape)} and {references.dtype} "
            f"{tuple(references.shape)}."
        )
    tokens, documents = _beside(candidates, references, pad_id)
    real = tokens != pad_id
    tokens = tokens.masked_fill(~real, 0)
    if tokens.numel() and int(tokens.amin()) < 0:
        raise ValueError(f"Token ids must be >= 0, or pad_id={pad_id}; got {int(tokens.amin())}.")
    number, batch = references.size(1) + 1, len(tokens)
    lengths = tokens.new_zeros(batch, number).index_add_(1, documents, real.long())
    matches = torch.zeros(max_n, batch, dtype=torch.double, device=tokens.device)
    totals = torch.zeros_like(matches)
    own = whole = real[:, : candidates.size(1)]
    for order in range(min(max_n, candidates.size(1))):
        if order:
            whole = whole[:, :-1] & own[:, order:]
        totals[order] = whole.sum(1)
    met = _hashed if counting == "hash" else _by_rows
    for order, (sentences, clipped) in enumerate(met(tokens, real, documents, number, max_n)):
        matches[order] = torch.bincount(sentences, weights=clipped.double(), minlength=batch)
    return matches, totals.clamp(min=1.0), lengths[:, 0].double(), _closest(lengths[:, 0], lengths[:, 1:])


def _beside(candidates: Tensor, references: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return candidate and references of each sentence in one row, a pad after each, and whose each column is."""
    batch, number, width = references.shape
    gap = candidates.new_full((batch, 1), pad_id, dtype=torch.long)
    parts = [candidates.long(), gap]
    for one in references.to(candidates.device).unbind(1):
        parts += [one.long(), gap]
    sizes = torch.tensor([candidates.size(1) + 1] + [width + 1] * number, device=candidates.device)
    return torch.cat(parts, 1), torch.arange(1 + number, device=candidates.device).repeat_interleave(sizes)


def _closest(lengths: Tensor, of_references: Tensor) -> Tensor:
    """Return the length of the reference that is nearest, the shorter of two; NaN without one."""
    if not of_references.size(1):
        return torch.full_like(lengths, math.nan, dtype=torch.double)
    far = (of_references - lengths.unsqueeze(1)).abs() * 2 + (of_references > lengths.unsqueeze(1))
    best, place = far.masked_fill(of_references == 0, _LARGEST).min(1)
    found = of_references.gather(1, place.unsqueeze(1)).squeeze(1).double()
    return found.masked_fill(best == _LARGEST, math.nan)


def _hashed(
    tokens: Tensor, real: Tensor, documents: Tensor, number: int, max_n: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Yield for each order the sentence of each n-gram that both sides have, and how often it counts there.

    An n-gram is one integer, the number of its first `n - 1` tokens times the size of the vocabulary plus its last
    token. They are numbered by one sort, the sentence with them, so that there are no more numbers than tokens and the
    integer fits 63 bits. Where a beginning has no match, nothing that begins so has, and only the others go on.
    """
    width = tokens.size(1)
    radix = int(tokens.amax()) + 1 if tokens.numel() else 1
    if radix > _LARGEST_VOCABULARY:
        kept, tokens = torch.unique(tokens, return_inverse=True)
        radix = len(kept)
    flat = tokens.masked_fill(~real, -1).reshape(-1)
    whose = documents.expand_as(tokens).reshape(-1)
    places = real.reshape(-1).nonzero().squeeze(1)
    keys = places.div(width, rounding_mode="floor") * radix + flat.index_select(0, places)
    for order in range(max_n):
        ordered, by = keys.sort()
        places = places.index_select(0, by)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        groups = first.cumsum(0) - 1
        clipped = _clipped(torch.bincount(groups * number + whose.index_select(0, places)), number)
        met = clipped.nonzero().squeeze(1)
        begin = places.index_select(0, first.nonzero().squeeze(1).index_select(0, met))
        yield begin.div(width, rounding_mode="floor"), clipped.index_select(0, met)
        if order + 1 < max_n:
            # A pad after each document keeps what follows inside of the row.
            following = flat.index_select(0, places + order + 1)
            on = ((following >= 0) & (clipped > 0).index_select(0, groups)).nonzero().squeeze(1)
            places, groups = places.index_select(0, on), groups.index_select(0, on)
            keys = groups * radix + following.index_select(0, on)


def _by_rows(
    tokens: Tensor, real: Tensor, documents: Tensor, number: int, max_n: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same, with an n-gram as a row `(sentence, t_1, t_2, ...)`, numbered by `torch.unique(dim=0)`."""
    sentences = torch.arange(len(tokens), device=tokens.device).unsqueeze(1).expand_as(tokens)
    whose = documents.expand_as(tokens)
    for order in range(min(max_n, tokens.size(1))):
        width = tokens.size(1) - order
        whole = torch.stack([real[:, at : at + width] for at in range(order + 1)]).all(0)
        columns = [sentences[:, :width], *(tokens[:, at : at + width] for at in range(order + 1))]
        rows, groups = torch.unique(torch.stack([part[whole] for part in columns], 1), dim=0, return_inverse=True)
        yield rows[:, 0], _clipped(torch.bincount(groups * number + whose[:, :width][whole]), number)


def _clipped(counts: Tensor, number: int) -> Tensor:
    """Return what counts of each n-gram: `min(in the candidate, most in a reference)`, from counts by document."""
    counts = torch.nn.functional.pad(counts, (0, -len(counts) % number)).view(-1, number)
    if number == 1:
        return torch.zeros_like(counts[:, 0])
    return torch.minimum(counts[:, 0], counts[:, 1] if number == 2 else counts[:, 1:].amax(1))


# --- from counts to the score ----------------------------------------------------------------------------------------


def _smoothed(matches: Tensor, totals: Tensor, smoothing: str, value: float | None) -> Tensor:
    """Return `p_n`, shape `(max_n, batch)`."""
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing must be one of {SMOOTHINGS}, got {smoothing!r}.")
    if value is not None and smoothing not in _SMOOTHING_VALUES:
        raise ValueError(
            f"smoothing_value={value!r} would not be read: smoothing={smoothing!r} has no number. Leave it out, or "
            f"take one of {tuple(_SMOOTHING_VALUES)}."
        )
    number = _SMOOTHING_VALUES.get(smoothing, 0.0) if value is None else value
    if value is not None and (not isinstance(value, (int, float)) or not 0 < value < math.inf):
        raise ValueError(f"smoothing_value={value!r} must be a number above 0.")
    if smoothing == "add_k":
        extra = torch.full_like(totals, number)
        extra[0] = 0.0
        return (matches + extra) / (totals + extra)
    missed = matches == 0
    if smoothing == "exp":
        return torch.where(missed, 0.5 ** missed.cumsum(0), matches) / totals
    return torch.where(missed, number, matches) / totals


def _check_orders(max_n: int) -> None:
    if isinstance(max_n, bool) or not isinstance(max_n, int) or not 1 <= max_n <= MOST_ORDERS:
        raise ValueError(f"max_n={max_n!r} must be an integer from 1 to {MOST_ORDERS}.")


def _weights(weights: Sequence[float] | None, max_n: int) -> list[float]:
    _check_orders(max_n)
    found = [1.0 / max_n] * max_n if weights is None else list(weights)
    good = all(isinstance(w, (int, float)) and not isinstance(w, bool) and 0 <= w < math.inf for w in found)
    if not good or len(found) != max_n or not sum(found):
        raise ValueError(f"weights={weights!r} must be {max_n} numbers >= 0 (max_n={max_n}), not all of them 0.")
    return found


def _combined(precisions: Tensor, unigrams: Tensor, lengths: Tensor, closest: Tensor, weights: list[float]) -> Tensor:
    used = [(w, p) for w, p in zip(weights, precisions, strict=True) if w]
    logs = torch.stack([w * p.log() for w, p in used]).sum(0)
    penalty = (1.0 - closest / lengths.clamp(min=1.0)).clamp(max=0.0)
    score = torch.where(unigrams > 0, (logs + penalty).exp(), 0.0)
    return torch.where(closest.isnan(), torch.full_like(score, math.nan), score)
