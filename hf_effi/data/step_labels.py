"""Rows of steps with a label each, for a process reward model on a stock Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..functional.data import check_count


class StepLabelCollator:
    """
    Token classification of steps: the label of a step at its last token, -100 everywhere else.

    For `AutoModelForTokenClassification` on a `Trainer` with `remove_unused_columns=False`, which would else drop the
    columns that this reads. A row has the columns that TRL's data sets of steps have: `prompt` (a text), `completions`
    (a list of steps) and `labels` (a list of whole numbers or booleans, `None` for a step without one).

    From [GroundedPRM](https://huggingface.co/papers/2510.14942), which trains on 40,000 labelled solutions.

    Args:
        tokenizer: With a pad token; begins a row with its beginning-of-text token if it has one.
        max_length (`int`, *optional*): Rows are cut off there; a step whose last token is cut off has no label.
        separator (`str`, *optional*, defaults to `"\\n"`): Stands behind each step and belongs to it, so that the
            label is at its last token; `""` for none.

    Raises:
        ValueError: an argument out of range, or a row that has no label for each step.

    Example:
    ```python
    >>> from hf_effi.demo import toy
    >>> collator = StepLabelCollator(toy().tokenizer, separator=";")
    >>> collator([{"prompt": "1+1=", "completions": ["1+1", "2"], "labels": [True, False]}])["labels"].tolist()
    [[-100, -100, -100, -100, -100, -100, -100, 1, -100, 0]]
    ```
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None, separator: str = "\n") -> None:
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError("The tokenizer has no pad token. Set tokenizer.pad_token, e.g. to its eos_token.")
        if not isinstance(separator, str):
            raise ValueError(f"separator={separator!r} must be a text.")
        self.max_length = None if max_length is None else check_count("max_length", max_length)
        self.tokenizer, self.separator = tokenizer, separator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self._row(feature) for feature in features]
        width = max(len(ids) for ids, _ in rows)
        left = self.tokenizer.padding_side == "left"

        def padded(values: list[int], fill: int) -> list[int]:
            gap = [fill] * (width - len(values))
            return gap + values if left else values + gap

        return {
            "input_ids": torch.tensor([padded(ids, self.tokenizer.pad_token_id) for ids, _ in rows]),
            "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
            "labels": torch.tensor([padded(labels, -100) for _, labels in rows]),
        }

    def _row(self, feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        missing = [name for name in ("prompt", "completions", "labels") if name not in feature]
        if missing:
            raise ValueError(
                f"A row has no {', '.join(missing)}, only {', '.join(feature) or 'nothing'}. Set "
                "remove_unused_columns=False, or rename the columns."
            )
        steps, marks = feature["completions"], feature["labels"]
        if len(steps) != len(marks):
            raise ValueError(f"A row has {len(marks)} labels for {len(steps)} steps.")
        first = self.tokenizer.bos_token_id
        ids = ([] if first is None else [first]) + self._ids(feature["prompt"])
        labels = [-100] * len(ids)
        for step, mark in zip(steps, marks, strict=True):
            more = self._ids(step + self.separator)
            if not more:
                raise ValueError(f"The step {step!r} has no token.")
            ids += more
            labels += [-100] * (len(more) - 1) + [-100 if mark is None else int(mark)]
        return ids[: self.max_length], labels[: self.max_length]

    def _ids(self, text: str) -> list[int]:
        tokenizer = self.tokenizer
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
