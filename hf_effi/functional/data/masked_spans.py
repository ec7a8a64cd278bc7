"""Spans of words that are masked in a text, for prompts whose answer is the span."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

import torch

from ._checks import check_count

_WORD = re.compile(r"\S+")
_SPACES = re.compile(r"\s+")
_PUNCTUATION = {ord(sign): None for sign in string.punctuation}


def plain_span(text: str) -> str:
    """
    Return a text as spans are compared: case folded, without ASCII punctuation, one space between words.

    Example:
    ```python
    >>> plain_span("  The U.S.,\\nin 1969 ")
    'the us in 1969'
    ```
    """
    return _SPACES.sub(" ", text.casefold().translate(_PUNCTUATION)).strip()


@dataclass(frozen=True)
class MaskedSpan:
    """
    A span of a text.

    Args:
        text (`str`): The whole text.
        start, end (`int`): Characters of the span, `text[start:end]`.
    """

    text: str
    start: int
    end: int

    @property
    def answer(self) -> str:
        """The span."""
        return self.text[self.start : self.end]

    def masked(self, mask: str) -> str:
        """Return the text with `mask` in the place of the span; putting the answer there gives the text again."""
        return self.text[: self.start] + mask + self.text[self.end :]


def word_span(text: str, first: int, count: int) -> MaskedSpan | None:
    """
    Return the span of `count` words from word `first` on, without the punctuation at its ends; `None` if none is left.

    Words are what stands between white space.

    Example:
    ```python
    >>> word_span('He said "two words", then left.', 2, 2).answer
    'two words'
    ```
    """
    words = list(_WORD.finditer(text))[first : first + count]
    return _trimmed(text, words[0].start(), words[-1].end()) if len(words) == count else None


def draw_span(
    text: str,
    words: tuple[int, int],
    generator: torch.Generator,
    *,
    min_context: int = 8,
    hidden_in: str | None = None,
    mask: str = "[mask]",
) -> MaskedSpan | None:
    """
    Draw a span of words: its length first, uniformly, then its place, uniformly among those that fit.

    Args:
        text (`str`): A paragraph.
        words (`tuple[int, int]`): Fewest and most words of the span, at least 1.
        generator (`torch.Generator`): Of the draws, on the CPU.
        min_context (`int`, *optional*, defaults to 8): Words of the text that must stay, at least 0.
        hidden_in (`str`, *optional*): What else stands in the prompt. Where it is given, a span that occurs, as
            [`plain_span`] makes it, in the rest of the text or in this is not taken.
        mask (`str`, *optional*, defaults to `"[mask]"`): What stands in its place.

    Returns:
        [`MaskedSpan`] or `None`: `None` where no span fits, and for a text in which `mask` stands already.

    Example:
    ```python
    >>> from hf_effi.functional.data import seeded
    >>> span = draw_span("the cat saw the dog", (1, 1), seeded(4), min_context=2, hidden_in="")
    >>> span.answer in ("cat", "saw", "dog"), span.masked("[mask]").count("[mask]")
    (True, 1)
    ```
    """
    low, high = check_count("words[0]", words[0]), check_count("words[1]", words[1])
    if low > high:
        raise ValueError(f"words={words!r} must be the fewest and the most words of a span, e.g. (1, 4).")
    check_count("min_context", min_context, 0)
    found = list(_WORD.finditer(text))
    if mask in text or len(found) < low + min_context:
        return None
    most = min(high, len(found) - min_context)
    lengths = (low + torch.randperm(most - low + 1, generator=generator)).tolist()
    for length in lengths:
        for first in torch.randperm(len(found) - length + 1, generator=generator).tolist():
            span = _trimmed(text, found[first].start(), found[first + length - 1].end())
            if span is not None and (hidden_in is None or not _shows(span, hidden_in, mask)):
                return span
    return None


def _trimmed(text: str, start: int, end: int) -> MaskedSpan | None:
    while start < end and text[start] in string.punctuation:
        start += 1
    while start < end and text[end - 1] in string.punctuation:
        end -= 1
    return MaskedSpan(text, start, end) if plain_span(text[start:end]) else None


def _shows(span: MaskedSpan, beside: str, mask: str) -> bool:
    """Return whether the answer stands in the masked text or beside it, as whole words."""
    # The mask must not join the words at its sides, nor be a word of the answer itself.
    left, right = span.text[: span.start], span.text[span.end :]
    wanted = f" {plain_span(span.answer)} "
    return any(wanted in f" {plain_span(part)} " for part in (left, right, beside, mask))
