"""Prompts for reinforcement learning out of plain text: a span of words is masked, and asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ..functional.data import check_count, draw_span, seeded

logger = logging.getLogger(__name__)

#: what is asked; `{text}` is the masked text and `{mask}` what stands in the place of the span
TEMPLATE = (
    "What does {mask} stand for in the text below? Think first, then write what is missing in \\boxed{}.\n\n{text}"
)


class MaskedSpanPrompts:
    r"""
    Makes rows `prompt`, `answer`, `row` for GRPO out of texts, with spans that are drawn at random.

    This is the random-span form of reinforcement pre-training that
    [PretrainZero](https://huggingface.co/papers/2512.03442) compares itself with. Score with
    [`~hf_effi.rewards.ExactSpanReward`]; with `difficulty_range=(0, 1)` only spans are trained on that the policy
    finds sometimes. Draws are a function of the seed, the number of the text and the number of the span.

    Args:
        words (`tuple[int, int]`, *optional*, defaults to `(1, 4)`): Fewest and most words of a span.
        per_text (`int`, *optional*, defaults to 1): Spans of each text, each a row of its own with one mask; two of
            one text may overlap. At least 1.
        min_context (`int`, *optional*, defaults to 8): Words of the text that stay, at least 0.
        hidden (`bool`, *optional*, defaults to `True`): Take no span that stands elsewhere in the prompt, whatever its
            case and punctuation: it could be copied.
        column (`str`, *optional*, defaults to `"text"`): Column with the texts.
        template (`str`, *optional*): Prompt with `{text}` in it, and `{mask}` where it is named; other braces stay.
        mask (`str`, *optional*, defaults to `"[mask]"`): What stands in the place of the span. A text in which it
            stands already is left out.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> make = MaskedSpanPrompts(words=(1, 2), min_context=3, template="{text}")
    >>> rows = make([{"text": "Neil Armstrong walked on the moon in 1969."}])
    >>> rows[0]["prompt"].replace("[mask]", rows[0]["answer"])
    'Neil Armstrong walked on the moon in 1969.'
    ```
    """

    def __init__(
        self,
        words: tuple[int, int] = (1, 4),
        per_text: int = 1,
        min_context: int = 8,
        *,
        hidden: bool = True,
        column: str = "text",
        template: str = TEMPLATE,
        mask: str = "[mask]",
        seed: int = 0,
    ) -> None:
        if not isinstance(words, (tuple, list)) or len(words) != 2:
            raise ValueError(f"words={words!r} must be the fewest and the most words of a span, e.g. (1, 4).")
        if check_count("words[0]", words[0]) > check_count("words[1]", words[1]):
            raise ValueError(f"words={words!r}: the fewest words of a span are more than the most.")
        for name, value in (("column", column), ("mask", mask), ("template", template)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name}={value!r} must be a text.")
        if template.count("{text}") != 1:
            raise ValueError(f"template must have {{text}} in it once, for the masked text, got {template!r}.")
        if mask in template:
            raise ValueError(f"template has the mask {mask!r} in it. Write {{mask}} there.")
        if not isinstance(hidden, bool):
            raise ValueError(f"hidden={hidden!r} must be True or False.")
        self.words, self.per_text = (words[0], words[1]), check_count("per_text", per_text)
        self.min_context, self.seed = check_count("min_context", min_context, 0), check_count("seed", seed, 0)
        self.hidden, self.column, self.template, self.mask = hidden, column, template, mask

    def rows_of(self, text: str, number: int = 0) -> list[dict[str, Any]]:
        """
        Return the rows of one text, at most `per_text`, none twice; an empty list where no span fits.

        Args:
            text (`str`): A paragraph.
            number (`int`, *optional*, defaults to 0): Of the text in its dataset, at least 0.
        """
        beside = self.template.replace("{text}", " ").replace("{mask}", " ")
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for place in range(self.per_text):
            span = draw_span(
                text,
                self.words,
                seeded(self.seed, number, place),
                min_context=self.min_context,
                hidden_in=beside if self.hidden else None,
                mask=self.mask,
            )
            if span is not None:
                # The text last: what stands in it is no part of the template.
                before, after = (part.replace("{mask}", self.mask) for part in self.template.split("{text}"))
                prompt = before + span.masked(self.mask) + after
                rows.setdefault((span.start, span.end), {"prompt": prompt, "answer": span.answer, "row": number})
        return list(rows.values())

    def __call__(self, dataset: Iterable[Mapping[str, Any]]) -> Any:
        """
        Return the rows of all texts.

        Args:
            dataset (`datasets.Dataset` or `Iterable[Mapping]`): Rows with the column.

        Returns:
            `datasets.Dataset`: Columns `prompt`, `answer` and `row`, the number of the text.

        Raises:
            ValueError: a row without the column or whose text is no text, or not one text with a span that fits.
        """
        from datasets import Dataset

        found: list[dict[str, Any]] = []
        texts = empty = 0
        for number, row in enumerate(dataset):
            text = row.get(self.column) if isinstance(row, Mapping) else None
            if not isinstance(text, str):
                raise ValueError(
                    f"row {number} has no text in the column {self.column!r}: {text!r}. Name it: column=."
                )
            made = self.rows_of(text, number)
            texts, empty = texts + 1, empty + (not made)
            found += made
        if not found:
            raise ValueError(
                f"no span of {self.words[0]} to {self.words[1]} words fits in any of {texts} texts: they are shorter "
                f"than that and min_context={self.min_context}, have {self.mask!r} in them, or show every span twice. "
                "Give longer texts, or lower min_context."
            )
        if empty:
            logger.warning(f"MaskedSpanPrompts left out {empty} of {texts} texts, in which no span fits.")
        return Dataset.from_list(found)
