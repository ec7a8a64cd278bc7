"""CyclicReflex: more and fewer second thoughts by turns, in evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from ..errors import RefusedError
from ..functional.data import check_count, check_number
from ..functional.rollouts import reflection_bonus

#: words of the authors' code
REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")


class CyclicalReflection(LogitsProcessor):
    """
    Adds a triangle wave to the logits of words that begin a second thought. For evaluation only.

    See [`~hf_effi.functional.rollouts.reflection_bonus`]; paper:
    [2506.11077](https://huggingface.co/papers/2506.11077). The wave is over the tokens that a row has generated, and
    ends for a row with `</think>`. It changes what is sampled from, so that GRPO's log-probs would be of another
    policy: `EffiGRPOTrainer` refuses it where it can see it.

    An object is for one call of `generate` with prompts of one length or padded on the left: `prompt_length` is where
    their completions begin.

    Args:
        tokenizer: Of the model. Each word is looked up alone and after a space: those of the two that are one token
            count.
        prompt_length (`int`): Columns of the padded prompts, `input_ids.shape[1]`.
        amplitude, period, shift: As in [`~hf_effi.functional.rollouts.reflection_bonus`].
        words (`Sequence[str]`, *optional*): Those of the authors' code.
        end (`str`, *optional*, defaults to `"</think>"`): Text after which a row is left alone; of one token or more.
            `None` never ends.

    Attributes:
        token_ids (`list[int]`): The tokens whose logits change.

    Raises:
        ValueError: an argument out of range, no word is one token of the tokenizer, or `end` has an unknown token.

    Example:
    ```python
    inputs = tokenizer(prompt, return_tensors="pt")
    reflect = CyclicalReflection(tokenizer, inputs["input_ids"].shape[1], amplitude=5.0, period=600)
    model.generate(**inputs, logits_processor=[reflect], max_new_tokens=8192)
    ```
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_length: int,
        *,
        amplitude: float = 5.0,
        period: int = 600,
        shift: float = 0.0,
        words: Sequence[str] = REFLECTION_WORDS,
        end: str | None = "</think>",
    ) -> None:
        self.prompt_length = check_count("prompt_length", prompt_length, 0)
        self.amplitude, self.period = check_number("amplitude", amplitude, 0.0), check_count("period", period)
        self.shift = check_number("shift", shift, 0.0, 1.0)
        if isinstance(words, str) or not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"words={words!r} must be a list of words.")
        self.token_ids = sorted({ids[0] for word in words for ids in _spellings(tokenizer, word) if len(ids) == 1})
        if not self.token_ids:
            raise ValueError(
                f"none of the words {list(words)} is one token of this tokenizer, with or without a space before it. "
                "Pass words= that are."
            )
        self.end = [] if end is None else _ids(tokenizer, end)
        if end is not None and (not self.end or tokenizer.unk_token_id in self.end):
            raise ValueError(
                f"end={end!r} is no text that this tokenizer knows. Pass another one, or None for no end."
            )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        written = input_ids[:, self.prompt_length :]
        bonus = reflection_bonus(written.shape[1], self.amplitude, self.period, self.shift)
        ids = torch.tensor(self.token_ids, device=scores.device)
        added = bonus * (~self._ended(written)).to(scores.dtype)
        return scores.index_add(1, ids, added.unsqueeze(1).expand(-1, len(ids)))  # type: ignore[return-value]

    def _ended(self, written: torch.Tensor) -> torch.Tensor:
        """Return which rows have written the end, shape `(rows,)`."""
        size = len(self.end)
        if not size or written.shape[1] < size:
            return torch.zeros(len(written), dtype=torch.bool, device=written.device)
        windows = written.unfold(1, size, 1)
        return (windows == torch.tensor(self.end, device=written.device)).all(-1).any(-1)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _spellings(tokenizer: Any, word: str) -> list[list[int]]:
    unknown = tokenizer.unk_token_id
    found = [_ids(tokenizer, word.strip()), _ids(tokenizer, " " + word.strip())]
    return [ids for ids in found if unknown is None or unknown not in ids]


def refuse_in_training(model: Any, generation_kwargs: Any) -> None:
    """
    Refuse a [`CyclicalReflection`] in what GRPO generates with.

    It is looked for in `generation_kwargs`, and in the arguments that a `functools.partial` in the place of
    `model.generate` holds. What a `rollout_func` does inside of itself cannot be seen.

    Args:
        model: That generates; a name, which is loaded later, holds none.
        generation_kwargs: Of the config, `None` for none.

    Raises:
        RefusedError: it is there.
    """
    wrapped = getattr(getattr(model, "generate", None), "keywords", None)
    for where, held in (("generation_kwargs", generation_kwargs), ("model.generate", wrapped)):
        if _holds(held):
            raise RefusedError(
                f"{where} has a CyclicalReflection, which is for evaluation only: completions would be drawn from "
                "another policy than the one whose log-probs GRPO computes. Take it out, and pass it to "
                "model.generate(...) when you evaluate."
            )


def _holds(value: Any) -> bool:
    if isinstance(value, CyclicalReflection):
        return True
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(map(_holds, value))
