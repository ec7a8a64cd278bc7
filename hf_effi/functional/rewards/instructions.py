"""
Constraints on a text that a program can check, by the names and arguments of IFEval's data.

From [2311.07911](https://huggingface.co/papers/2311.07911). Each check is a small function of the text and of named
arguments that returns whether the text keeps the constraint. They take any text, and time linear in its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .matching import without_fence

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "less than": lambda count, wanted: count < wanted,
    "at least": lambda count, wanted: count >= wanted,
    "at most": lambda count, wanted: count <= wanted,
    "more than": lambda count, wanted: count > wanted,
    "exactly": lambda count, wanted: count == wanted,
}
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile("(?<![.!?])[.!?]++[\"')\\]\u201d\u2019]*+(?=\\s|$)|[\u3002\uff01\uff1f]++")
#: what ends in a period and does not end a sentence
_SHORT = re.compile(r"(?:\b(?i:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|cf|fig|approx)|\b[A-HJ-Z])$")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compare(count: float, wanted: Any, relation: Any) -> bool:
    if relation not in _RELATIONS:
        raise ValueError(f"relation {relation!r} is none of {', '.join(_RELATIONS)}.")
    return _RELATIONS[relation](count, _number(wanted))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{value!r} must be a number.")
    return value


def _phrase(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} must be a text.")
    return value.strip()


def _phrases(values: Any) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{values!r} must be a list of texts.")
    return [_phrase(value) for value in values]


# --- keywords and letters --------------------------------------------------------------------------------------------


def _existence(text: str, keywords: Any) -> bool:
    lower = text.lower()
    return all(word.lower() in lower for word in _phrases(keywords))


def _frequency(text: str, keyword: Any, frequency: Any, relation: Any) -> bool:
    return _compare(text.lower().count(_phrase(keyword).lower()), frequency, relation)


def _forbidden(text: str, forbidden_words: Any) -> bool:
    words = _phrases(forbidden_words)
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in words)


def _letters(text: str, letter: Any, let_frequency: Any, let_relation: Any) -> bool:
    if len(_phrase(letter)) != 1:
        raise ValueError(f"letter {letter!r} must be one character.")
    return _compare(text.lower().count(_phrase(letter).lower()), let_frequency, let_relation)


def _capital_words(text: str, capital_frequency: Any, capital_relation: Any) -> bool:
    return _compare(sum(word.isupper() for word in _WORD.findall(text)), capital_frequency, capital_relation)


def _capital(text: str) -> bool:
    return text.isupper()


def _lowercase(text: str) -> bool:
    return text.islower()


def _no_comma(text: str) -> bool:
    return not any(comma in text for comma in ",\uff0c\u3001\u060c")


# --- lengths ---------------------------------------------------------------------------------------------------------


def count_sentences(text: str) -> int:
    """
    Return the number of sentences: what ends in `.`, `!`, `?` or their CJK forms, and what is left at the end.

    An abbreviation such as "Dr." or "e.g.", an initial and a decimal point end none.

    Example:
    ```python
    >>> count_sentences("Dr. Who paid 3.50. Why?! Nobody knows")
    3
    ```
    """
    count, start = 0, 0
    for found in _SENTENCE.finditer(text):
        if found[0] == "." and _SHORT.search(text, max(start, found.start() - 8), found.start()):
            continue
        if _WORD.search(text, start, found.start()):
            count += 1
        start = found.end()
    return count + (_WORD.search(text, start) is not None)


def _words(text: str, num_words: Any, relation: Any) -> bool:
    return _compare(len(_WORD.findall(text)), num_words, relation)


def _sentences(text: str, num_sentences: Any, relation: Any) -> bool:
    return _compare(count_sentences(text), num_sentences, relation)


def _parts(text: str, separator: str) -> list[str] | None:
    """Split; a part at either end may be empty and is left out, one in the middle may not."""
    parts = [part.strip() for part in text.split(separator)]
    if any(not part for part in parts[1:-1]):
        return None
    return [part for part in parts if part]


def _paragraphs(text: str, num_paragraphs: Any) -> bool:
    parts = _parts(text, "***")
    return parts is not None and len(parts) == _number(num_paragraphs)


def _first_word(text: str, num_paragraphs: Any, nth_paragraph: Any, first_word: Any) -> bool:
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    nth = _number(nth_paragraph)
    if len(parts) != _number(num_paragraphs) or not 1 <= nth <= len(parts):
        return False
    found = _WORD.search(parts[int(nth) - 1].split(None, 1)[0])
    return found is not None and found[0].lower() == _phrase(first_word).lower()


# --- content and format ----------------------------------------------------------------------------------------------


def _placeholders(text: str, num_placeholders: Any) -> bool:
    return len(re.findall(r"\[[^\[\]\n]++\]", text)) >= _number(num_placeholders)


def _postscript(text: str, postscript_marker: Any) -> bool:
    marker = re.escape(_phrase(postscript_marker)).replace(r"\.", r"\.\s?")
    return re.search(rf"(?<!\w){marker}[ \t:]*+\S", text, re.IGNORECASE) is not None


def _bullets(text: str, num_bullets: Any) -> bool:
    return len(re.findall(r"^[ \t]*+(?:\*(?!\*)|-)[ \t]*+[^\s*-]", text, re.MULTILINE)) == _number(num_bullets)


def _constrained(text: str) -> bool:
    return any(answer in text for answer in _CONSTRAINED)


def _highlights(text: str, num_highlights: Any) -> bool:
    double = re.findall(r"\*\*([^\n*]++)\*\*", text)
    single = re.findall(r"(?<!\*)\*([^\n*]++)\*(?!\*)", text)
    return sum(bool(part.strip()) for part in (*double, *single)) >= _number(num_highlights)


def _sections(text: str, section_spliter: Any, num_sections: Any) -> bool:
    found = re.findall(rf"(?<!\w){re.escape(_phrase(section_spliter))}\s?[0-9]++", text)
    return len(found) >= _number(num_sections)


def _json(text: str) -> bool:
    try:
        json.loads(without_fence(text).strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start:end].strip("<> \t"):
            return True
    return False


def _two_responses(text: str) -> bool:
    parts = _parts(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _repeat_prompt(text: str, prompt_to_repeat: Any) -> bool:
    return text.strip().lower().startswith(_phrase(prompt_to_repeat).lower())


def _ends_with(text: str, end_phrase: Any) -> bool:
    return text.strip().strip('"').lower().endswith(_phrase(end_phrase).lower())


def _starts_with(text: str, start_phrase: Any) -> bool:
    return text.strip().strip('"').lower().startswith(_phrase(start_phrase).lower())


def _quotation(text: str) -> bool:
    plain = text.strip()
    return len(plain) > 2 and (plain[0], plain[-1]) in (('"', '"'), ("\u201c", "\u201d"))


#: id -> check; the names of its arguments after the text are those of IFEval's `kwargs`
_CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_words": _words,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _ends_with,
    "startend:start_checker": _starts_with,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
}
#: ids that [`check_instruction`] knows
INSTRUCTIONS = tuple(_CHECKS)


def _names_of(check: Callable[..., bool]) -> tuple[str, ...]:
    code = check.__code__
    return tuple(code.co_varnames[1 : code.co_argcount])


def check_instruction(text: str, instruction: str, arguments: Mapping[str, Any] | None = None) -> bool:
    """
    Return whether a text keeps a constraint.

    Args:
        text (`str`): Any text. One of white space alone keeps none.
        instruction (`str`): An id of IFEval's data, one of `INSTRUCTIONS`, such as `"punctuation:no_comma"`. All of
            IFEval but `language:response_language`; and `startend:start_checker`, with `start_phrase`, which is ours.
        arguments (`Mapping`, *optional*): Its arguments, as in the column `kwargs` of the data. Those that are `None`
            count as absent; those of other constraints, which `datasets` fills in, are left out.

    Raises:
        ValueError: there is no such constraint, or an argument is missing or not of its kind.

    Example:
    ```python
    >>> check_instruction("one two three", "length_constraints:number_words", {"num_words": 3, "relation": "at least"})
    True
    ```
    """
    check = _CHECKS.get(instruction)
    if check is None:
        raise ValueError(f"there is no instruction {instruction!r}. Known: {', '.join(_CHECKS)}.")
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    missing = [name for name in _names_of(check) if name not in given]
    if missing:
        raise ValueError(f"instruction {instruction!r} needs {', '.join(missing)} in its kwargs, got {given}.")
    try:
        kept = check(text, *(given[name] for name in _names_of(check)))
    except ValueError as error:
        raise ValueError(f"instruction {instruction!r}: {error}") from None
    return kept and bool(text.strip())


def loose_forms(text: str) -> list[str]:
    """
    Return the forms of a text of which one has to keep a constraint under IFEval's loose rule, each once.

    The text, without its first line, without its last one, without both; each also without stars.

    Example:
    ```python
    >>> loose_forms("Sure:\\n**yes**")
    ['Sure:\\n**yes**', '**yes**', 'Sure:', '', 'Sure:\\nyes', 'yes']
    ```
    """
    first, last = text.find("\n"), text.rfind("\n")
    after = "" if first < 0 else text[first + 1 :]
    before = "" if last < 0 else text[:last]
    both = text[first + 1 : last] if first < last else ""
    forms = [form.strip() if place else form for place, form in enumerate((text, after, before, both))]
    return list(dict.fromkeys([*forms, *(form.replace("*", "") for form in forms)]))
