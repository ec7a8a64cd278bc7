"""Completions of an earlier pass over the prompts, and what is known of the policy that they were drawn from."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import BrokenFileError

#: dtype and dimensions of the tensors of a stored state
_FORM = {
    "lengths": (torch.int64, 1),
    "widths": (torch.int64, 1),
    "tokens": (torch.int32, 1),
    "stored": (torch.float32, 1),
    "stored_tokens": (torch.int32, 1),
}


@dataclass(frozen=True)
class Draft:
    """
    One completion on the CPU.

    Args:
        tokens (`torch.Tensor`): int32, shape `(length,)`.
        stored, stored_tokens (`torch.Tensor`): Log-probs and numbers of the tokens that are known at each position,
            from [`keep_top`]: float32 and int32, shape `(length, k)`.
    """

    tokens: Tensor
    stored: Tensor
    stored_tokens: Tensor

    def numbers(self) -> list[Tensor]:
        """Return what holds numbers of tokens, without what is empty."""
        return [part for part in (self.tokens, self.stored_tokens) if part.numel()]


def number_rows(hashes: Iterable[str], seen: Counter[str]) -> list[str]:
    """
    Name each row by the hash of its prompt and by how many rows before it have the same.

    Args:
        hashes (`Iterable[str]`): One per row.
        seen (`Counter`): How many rows of each prompt came before; these are counted in it.

    Example:
    ```python
    >>> seen = Counter()
    >>> number_rows(["a", "b", "a"], seen), number_rows(["a"], seen)
    (['a-0', 'b-0', 'a-1'], ['a-2'])
    ```
    """
    keys = []
    for name in hashes:
        keys.append(f"{name}-{seen[name]}")
        seen[name] += 1
    return keys


def hash_tokens(ids: Sequence[int]) -> str:
    """Return 128 bits of a hash of token ids, in hexadecimal: the same on every rank and in every run."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).hexdigest()


class DraftStore:
    """
    The newest draft of each row, up to a number of them; the oldest are dropped.

    A draft is taken out when it is used. Which ones are dropped depends on how many came later and not on what they
    say: a rule that dropped long ones would leave the short ones over-represented.

    Args:
        capacity (`int`): Most drafts.

    Example:
    ```python
    >>> store, empty = DraftStore(capacity=2), torch.zeros(0, 1)
    >>> for key in ("a", "b", "c"):
    ...     store.put(key, Draft(torch.zeros(0, dtype=torch.int32), empty, empty.int()))
    >>> store.take("a"), store.take("b") is None, len(store)
    (None, False, 1)
    ```
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._drafts: dict[str, Draft] = {}

    def __len__(self) -> int:
        return len(self._drafts)

    def put(self, key: str, draft: Draft) -> None:
        """Keep a draft in place of an older one of the same row."""
        self._drafts.pop(key, None)
        self._drafts[key] = draft
        while len(self._drafts) > self.capacity:
            del self._drafts[next(iter(self._drafts))]

    def take(self, key: str) -> Draft | None:
        """Return a draft and forget it."""
        return self._drafts.pop(key, None)

    def state_dict(self) -> dict[str, Any]:
        """Return keys and tensors; the oldest draft comes first."""
        drafts = list(self._drafts.values())

        def joined(name: str, dtype: torch.dtype) -> Tensor:
            return torch.cat([torch.zeros(0, dtype=dtype), *(getattr(draft, name).reshape(-1) for draft in drafts)])

        return {
            "keys": list(self._drafts),
            "lengths": torch.tensor([len(draft.tokens) for draft in drafts], dtype=torch.int64),
            "widths": torch.tensor([draft.stored.size(1) for draft in drafts], dtype=torch.int64),
            "tokens": joined("tokens", torch.int32),
            "stored": joined("stored", torch.float32),
            "stored_tokens": joined("stored_tokens", torch.int32),
        }

    def load_state_dict(
        self, *states: dict[str, Any], vocabulary: int | None = None, part: int = 0, parts: int = 1
    ) -> None:
        """
        Hold what one or several stores held, or every `parts`-th draft of it.

        Args:
            states (`dict`): From `state_dict`, of all processes where their number changed.
            vocabulary (`int`, *optional*): Tokens of the model; drafts may have no others.
            part (`int`, *optional*, defaults to 0): Number of the first draft that is taken.
            parts (`int`, *optional*, defaults to 1): How many stores share the drafts.

        Raises:
            BrokenFileError: a state is not what this class stores, or has tokens that the model does not.
        """
        found = [pair for state in states for pair in _drafts_of(state)]
        largest = max((int(part.max()) for _, draft in found for part in draft.numbers()), default=-1)
        if vocabulary is not None and largest >= vocabulary:
            raise BrokenFileError(
                f"the stored drafts of rollouts have token {largest}, and the model has {vocabulary} tokens. Resume "
                "from another checkpoint, or with the model of that run."
            )
        self._drafts = {}
        for key, draft in found[part::parts]:
            self.put(key, draft)


def _drafts_of(state: dict[str, Any]) -> list[tuple[str, Draft]]:
    keys: Any = state.get("keys")
    parts: list[Any] = [state.get(name) for name in _FORM]
    well_formed = isinstance(keys, list) and all(
        isinstance(part, Tensor) and (part.dtype, part.ndim) == form
        for part, form in zip(parts, _FORM.values(), strict=True)
    )
    if not well_formed or not _fits(keys, *parts):
        raise BrokenFileError("the stored drafts of rollouts are damaged. Resume from another checkpoint.")
    lengths, widths, tokens, stored, named = parts
    counts, areas = lengths.tolist(), (lengths * widths).tolist()
    shapes = list(zip(counts, widths.tolist(), strict=True))
    values = [part.view(shape) for part, shape in zip(stored.split(areas), shapes, strict=True)]
    names = [part.view(shape) for part, shape in zip(named.split(areas), shapes, strict=True)]
    of_keys = zip(tokens.split(counts), values, names, strict=True)
    return [(str(key), Draft(*(part.clone() for part in of_key))) for key, of_key in zip(keys, of_keys, strict=True)]


def _fits(keys: Any, lengths: Tensor, widths: Tensor, tokens: Tensor, stored: Tensor, named: Tensor) -> bool:
    if not len(keys) == len(lengths) == len(widths):
        return False
    # Python's numbers: products and sums of what somebody else has written may overflow those of a tensor.
    shapes = list(zip(lengths.tolist(), widths.tolist(), strict=True))
    if any(length < 0 or width < 0 for length, width in shapes):
        return False
    numbers = sum(length * width for length, width in shapes)
    if sum(length for length, _ in shapes) != len(tokens) or not numbers == len(stored) == len(named):
        return False
    log_probs = not len(stored) or bool((stored <= 1e-3).all())  # false for NaN too
    return log_probs and (not len(tokens) or int(tokens.min()) >= 0) and (not len(named) or int(named.min()) >= -1)
