"""
Where the answer stands in a completion: after a mark, in a box, between dollars, in a tag, as a letter.

All functions take any text, never raise for what is written in it, and take time linear in its length.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from .numbers import plain_characters

#: characters that are looked at after a mark, and of a formula between dollars
LONGEST_ANSWER = 300
#: marks and boxes of one text that are looked at, from the end
MOST_ANSWERS = 256
#: marks of an answer that [`marked_answers`] looks for unless told otherwise
MARKS = ("####", "answer is", "answer:")

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
_END = re.compile(r"\n|\.(?=\s|$)|\bI hope\b")
_MINERVA = re.compile(r"final\s{1,3}answer\s{1,3}is[\s:*]*+", re.IGNORECASE)
_DOLLARS = re.compile(r"(?<!\\)\$\$?")
_BRACKETS = re.compile(r"\\[()\[\]]")


def boxed_answers(text: str) -> list[str | None]:
    r"""
    Return what stands in each `\boxed{...}` of a text, in order; `None` for one that is not closed.

    Braces may be nested, and `\{` is no brace. Of a box in a box the outer one counts, and of more than 256
    the last ones.

    Example:
    ```python
    >>> boxed_answers("\\boxed{\\frac{1}{2}} or \\boxed{\\{1, 2\\}}, no: \\boxed{3")
    ['\\frac{1}{2}', '\\{1, 2\\}', None]
    ```
    """
    if "boxed" not in text and "fbox" not in text:
        return []
    opened: list[int] = []  # where the content of a box begins, -1 for another brace
    boxes: list[tuple[int, int]] = []
    for found in _BRACES.finditer(text):
        token = found[0]
        if token[-1] == "{" and (token == "{" or len(token) > 2):
            opened.append(-1 if token == "{" else found.end())
        elif token == "}" and opened and (start := opened.pop()) >= 0:
            boxes.append((start, found.start()))
    boxes += [(start, -1) for start in opened if start >= 0]
    outer: list[tuple[int, int]] = []
    reached = -1
    for start, end in sorted(boxes):
        if start >= reached:
            outer.append((start, end))
            reached = max(reached, end)
    return [None if end < 0 else text[start:end] for start, end in outer[-MOST_ANSWERS:]]


def marked_answers(text: str, marks: Sequence[str] = MARKS) -> list[str]:
    """
    Return what follows each mark, up to the end of the sentence or line; at most 300 characters.

    Of more than 256 marks the last ones count.

    Args:
        text (`str`): Any text.
        marks (`Sequence[str]`, *optional*): Texts, in any case. A colon, stars of Markdown and a new line may follow.

    Example:
    ```python
    >>> marked_answers("So 6 * 12 it is. The answer is: **72** apples. Or #### 71")
    ['72** apples', '71']
    ```
    """
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    found = re.finditer(rf"(?:{pattern})[\s:*=]*+", text, re.IGNORECASE)
    return [_sentence(text, mark.end()) for mark in deque(found, maxlen=MOST_ANSWERS)]


def _sentence(text: str, start: int) -> str:
    part = text[start : start + LONGEST_ANSWER]
    end = _END.search(part)
    return (part if end is None else part[: end.start()]).strip()


def minerva_answer(text: str) -> str | None:
    """
    Return what follows the last "final answer is", the form of Minerva's prompts; `None` without it.

    Example:
    ```python
    >>> minerva_answer("Final Answer: The final answer is $42$. I hope it is correct.")
    '$42$'
    ```
    """
    found = deque(_MINERVA.finditer(text), maxlen=1)
    return _sentence(text, found[0].end()) or None if found else None


def last_formula(text: str) -> str | None:
    r"""
    Return the last formula between `$`, `$$`, `\(` and `\)` or `\[` and `\]`; `None` without one.

    A formula has at most 300 characters. As the prices in a text have dollars too, the last two dollars count.

    Example:
    ```python
    >>> last_formula("It costs \\$3, so $x = 4$ of \\(y\\).")
    'y'
    ```
    """
    last: tuple[int, int] | None = None
    previous: re.Match[str] | None = None
    for found in _DOLLARS.finditer(text):
        if previous is not None and 0 < found.start() - previous.end() <= LONGEST_ANSWER:
            last = previous.end(), found.start()
        previous = found
    opening: re.Match[str] | None = None
    for found in _BRACKETS.finditer(text):
        if found[0] in ("\\(", "\\["):
            opening = found
        elif opening is not None and found.start() - opening.end() <= LONGEST_ANSWER:
            if last is None or found.start() > last[1]:
                last = opening.end(), found.start()
            opening = None
    return None if last is None else text[last[0] : last[1]].strip() or None


def text_after(text: str, mark: str) -> str | None:
    """
    Return what follows the last `mark`; `None` without one, as in a completion that ends inside of its reasoning.

    Example:
    ```python
    >>> text_after("<think>2 or 3</think>3", "</think>"), text_after("<think>2 or", "</think>")
    ('3', None)
    ```
    """
    _, found, rest = text.rpartition(mark)
    return rest if found else None


def text_within(text: str, tag: str) -> str | None:
    """
    Return the content of the last closed `<tag>`; `None` without one.

    Example:
    ```python
    >>> text_within("<answer>2</answer> no, <answer>3</answer>", "answer"), text_within("<answer>2", "answer")
    ('3', None)
    ```
    """
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if end < 0 or start < 0 else text[start + len(tag) + 2 : end]


# --- choices ---------------------------------------------------------------------------------------------------------

_WRAP = r"(?:\\(?:text|textbf|mathrm|mathbf|boldsymbol|boxed)\s?\{|[\s*_$`\"'(\[{<:=#]|\\\(|\\\[){0,12}+"
_NAME = r"(?:(?:option|choice|letter|answer)\b[\s:*]{0,4}+)?+"
_LETTER = re.compile(rf"{_WRAP}{_NAME}{_WRAP}(?:(?P<sure>[A-J])(?![\w'-])|(?P<small>[a-j])(?=\s*[.)\]}}*$:\"]|\s*$))")
_ANOTHER = re.compile(
    r"[\s)\]}*.$`\"']{0,6}+(?:or|and|nor|/|,|&|\||;)\s*(?:option|choice)?\s*[(\[*]{0,3}(?:[A-J](?![\w'])|[a-j]\b[)\]])"
)
_ALONE = re.compile(rf"{_WRAP}[A-J](?:[\s.)\]}}*_$`\"':>]|\\\)|\\\])*+")
_LISTED = re.compile(
    r"^[ \t*_]{0,6}+[(\[]?(?P<line>[A-J])[)\].:][*_]{0,3}+(?=\s|$)|[(\[](?P<round>[A-J])[)\]]", re.MULTILINE
)
_CHOICE_MARKS = (*MARKS, "answer would be", "choice is", "option is")


def marked_choices(text: str, marks: Sequence[str] = _CHOICE_MARKS) -> list[str | None]:
    r"""
    Return the letter that follows each mark or stands in a box, in order; `None` for what is no single letter.

    Letters are A to J. `(B)`, `B.`, `**B**`, `\text{(B)}` and "option B" are read; "B or C" is no single letter, and
    neither is the "a" of "a number". A mark with something else behind it is left out, unless it is the last.

    Example:
    ```python
    >>> marked_choices("The answer is a mix. The answer is (B). So \\boxed{\\text{(B)}}")
    ['B', 'B']
    >>> marked_choices("Answer: B or C")
    [None]
    ```
    """
    text = plain_characters(text)
    regions = [(part, True) for part in marked_answers(text, marks)]
    boxes = [("" if part is None else part[:LONGEST_ANSWER], False) for part in boxed_answers(text)]
    found: list[str | None] = []
    for place, (region, may_be_other) in enumerate([*regions, *boxes]):
        letter, several = _letter(region)
        last = place == len(regions) + len(boxes) - 1
        if letter is not None or several or last or not may_be_other:
            found.append(None if several else letter)
    return found


def _letter(region: str) -> tuple[str | None, bool]:
    found = _LETTER.match(region)
    if found is None:
        return None, False
    letter = (found["sure"] or found["small"]).upper()
    rest = region[found.end() :]
    if (
        letter in ("A", "I")
        and found["sure"]
        and re.match(r"\s+[a-z]", rest)
        and not rest.lstrip().startswith(("because", "since", "as ", "or ", "and ", "with", "which"))
    ):  # the article, the pronoun
        return None, False
    return letter, _ANOTHER.match(rest) is not None


def choice_of(text: str) -> str | None:
    r"""
    Return the letter that a completion chooses, A to J; `None` where it chooses none, or two at once.

    The last mark or box counts. Without one, the whole text may be a letter, or its last line, or the last line that
    begins like `B.` or `(B)`, or the last letter in brackets.

    Example:
    ```python
    >>> [choice_of(text) for text in ("(B)", "B. Paris", "I think C. The answer is B", "\\boxed{B}", "A dog", "")]
    ['B', 'B', 'B', 'B', None, None]
    ```
    """
    text = plain_characters(text)
    marked = marked_choices(text)
    if marked:
        return marked[-1]
    lines = text.strip().rsplit("\n", 1)
    line = lines[-1].strip()
    if len(line) <= LONGEST_ANSWER and _ALONE.fullmatch(line):
        return next(char for char in line if "A" <= char <= "J")
    listed = deque(_LISTED.finditer(text), maxlen=1)
    if not listed or _ANOTHER.match(text, listed[0].end()):
        return None
    return listed[0]["line"] or listed[0]["round"]
