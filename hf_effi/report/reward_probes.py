"""Completions of which one knows what a reward should say: right, wrong, of another row, empty, cut, and others."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: how completions give an answer: name -> text with `{answer}`
FORMS: dict[str, str] = {
    "plain": "{answer}",
    "sentence": "Let me think. The answer is {answer}.",
    "hash": "Let me think.\n#### {answer}",
    "boxed": "Let me think. The answer is $\\boxed{{answer}}$.",
    "tags": "<think>\nLet me think.\n</think>\n<answer>{answer}</answer>",
    "lines of tags": "<think>\nLet me think.\n</think>\n<answer>\n{answer}\n</answer>",
    "fence": "Let me think.\n```\n{answer}\n```",
}
#: what is put in front of a right completion to make it long
_FILLER = "Let me think about it once more. "
#: characters that a model emits and few reward functions were tried on
_STRANGE = "\u202e\u00a0\x00\ufeff\U0001f9ee\u0301 \\ { } $ ` < > "


@dataclass(frozen=True)
class Probe:
    """
    Completions of one kind, for the rows that have one.

    Args:
        kind (`str`): What they are.
        rows (`list[int]`): The rows that they belong to.
        texts (`list[str]`): One per row.
    """

    kind: str
    rows: list[int]
    texts: list[str]


def fill(form: str, answer: str) -> str:
    """Return a form with an answer in it; other braces stay as they are."""
    return form.replace("{answer}", answer)


def wrong_answer(answer: str) -> str:
    """
    Return an answer of the same kind that is wrong: its last number plus 1, or the next letter for each letter.

    Example:
    ```python
    >>> wrong_answer("72"), wrong_answer("x = 9"), wrong_answer("B"), wrong_answer("Paris")
    ('73', 'x = 10', 'C', 'Qbsjt')
    ```
    """
    numbers = list(re.finditer(r"\d+", answer))
    if numbers:
        last = numbers[-1]
        # By digits: a number of a million digits is more than `int` takes.
        return answer[: last.start()] + _plus_one(last.group()) + answer[last.end() :]
    moved = "".join(_next_letter(letter) for letter in answer)
    return moved if moved != answer else f"{answer}x"


def _plus_one(digits: str) -> str:
    places = list(digits)
    for place in reversed(range(len(places))):
        places[place] = str((int(places[place]) + 1) % 10)
        if places[place] != "0":
            return "".join(places)
    return "1" + "".join(places)


def _next_letter(letter: str) -> str:
    if not letter.isascii() or not letter.isalpha():
        return letter
    first = "a" if letter.islower() else "A"
    return chr(ord(first) + (ord(letter) - ord(first) + 1) % 26)


def prompt_text(prompt: Any) -> str:
    """Return the text of a prompt, of messages that of the last one."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[-1], Mapping):
        content = prompt[-1].get("content")
        return content if isinstance(content, str) else ""
    return ""


def other_answers(answers: Sequence[str], seed: int) -> list[str | None]:
    """Return for each row the answer of another row that is not its own, `None` where all are the same."""
    draw = random.Random(seed)
    found: list[str | None] = []
    distinct = sorted(set(answers))
    for answer in answers:
        rest = [other for other in distinct if other.strip().casefold() != answer.strip().casefold()]
        found.append(draw.choice(rest) if rest else None)
    return found


def make_probes(
    rights: Sequence[str], answers: Sequence[str], form: str | None, prompts: Sequence[Any], seed: int = 0
) -> list[Probe]:
    """
    Return the probes of a reward function.

    Args:
        rights (`Sequence[str]`): A right completion per row.
        answers (`Sequence[str]`): The answers in them.
        form (`str`, *optional*): Text with `{answer}` that `rights` were made of; `None` where they are texts of the
            dataset, in which the last occurrence of the answer is replaced.
        prompts (`Sequence`): Texts or lists of messages.
        seed (`int`, *optional*): Of the answers of other rows.

    Returns:
        `list[Probe]`: `right`, `wrong`, `longer answer` (which contains the right one), `swapped` (the
            answer of another row), `empty`, `blank`, `truncated` (cut
        before the answer ends), `right then wrong`, `wrong then right`, `prompt` (copied), `long`, `strange`.
    """
    number = len(rights)
    everywhere = list(range(number))

    def put(row: int, answer: str) -> str | None:
        if form is not None:
            return fill(form, answer)
        place = rights[row].rfind(answers[row]) if answers[row] else -1
        return None if place < 0 else rights[row][:place] + answer + rights[row][place + len(answers[row]) :]

    wrongs = [put(row, wrong_answer(answers[row])) for row in everywhere]
    longer = [put(row, text + ("5" if text[-1:].isdigit() else "es")) for row, text in enumerate(answers)]
    others = other_answers(answers, seed)
    swapped = [None if other is None else put(row, other) for row, other in enumerate(others)]
    cut = [_cut(rights[row], answers[row]) for row in everywhere]
    first = [None if wrong is None else f"{right}\n{wrong}" for right, wrong in zip(rights, wrongs, strict=True)]
    last = [None if wrong is None else f"{wrong}\n{right}" for right, wrong in zip(rights, wrongs, strict=True)]
    kinds: dict[str, Sequence[str | None]] = {
        "right": rights,
        "wrong": wrongs,
        "longer answer": longer,
        "swapped": swapped,
        "empty": [""] * number,
        "blank": [" \n"] * number,
        "truncated": cut,
        "right then wrong": first,
        "wrong then right": last,
        "prompt": [prompt_text(prompt) or None for prompt in prompts],
        "long": [_FILLER * 30 + right for right in rights],
        "strange": [f"{_STRANGE}\n{right}" for right in rights],
    }
    return [
        Probe(kind, [row for row in everywhere if texts[row] is not None], [one for one in texts if one is not None])
        for kind, texts in kinds.items()
    ]


def _cut(right: str, answer: str) -> str | None:
    """Return a completion that the length limit cut inside of its answer; `None` where nothing is left."""
    place = right.rfind(answer) if answer else -1
    end = len(right) // 2 if place < 0 else place + len(answer) // 2
    return right[:end] or None
