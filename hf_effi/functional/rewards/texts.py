"""The text of a completion, for all that reads one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RewardError


def texts_of(completions: Sequence[Any], who: str = "a reward") -> list[str]:
    """
    Return the text of each completion.

    Args:
        completions (`Sequence`): As TRL passes them: texts, or lists of messages, of which the last message of the
            assistant counts. Of a content in parts the text parts are joined; no content, as beside a call of a tool,
            is an empty text.
        who (`str`, *optional*): Whose error it would be.

    Raises:
        RewardError: a completion is neither.

    Example:
    ```python
    >>> texts_of(["4", [{"role": "assistant", "content": "four"}]])
    ['4', 'four']
    ```
    """
    return [_text_of(one, place, who) for place, one in enumerate(completions)]


def _text_of(completion: Any, place: int, who: str) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        completion = [completion]
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        said = [message for message in completion if message.get("role", "assistant") == "assistant"]
        content = said[-1].get("content") if said else None
        if content is None or isinstance(content, str):
            return content or ""
        if isinstance(content, Sequence):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            return "".join(part for part in parts if isinstance(part, str))
    raise RewardError(
        f"{who} got {type(completion).__name__} as completion {place}. A completion is a text, or a list of messages "
        "with 'role' and 'content'."
    )
