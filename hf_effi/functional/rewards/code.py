"""What a program printed, beside what it should print; and where a program is in a text."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Literal

__all__ = ["fraction_passed", "last_fence", "outputs_agree"]

#: how two outputs are compared
Comparison = Literal["whitespace", "exact", "float"]
COMPARISONS: tuple[Comparison, ...] = ("whitespace", "exact", "float")
#: two numbers are equal that differ by no more, absolutely or of the larger one
TOLERANCE = 1e-6
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
#: a number is not written in more characters
_LONGEST_NUMBER = 64


def last_fence(text: str, tags: Collection[str] | None = None) -> str | None:
    r"""
    Return the content of the last Markdown fence of a text, `None` where there is none that is closed.

    [Agnostics](https://huggingface.co/papers/2508.04865) takes the last fence of a completion for its program. A fence
    is a line of three or more backticks or tildes, and ends at a line of at least as many of the same. Takes time
    linear in the length of the text.

    Args:
        text (`str`): A completion.
        tags (`Collection[str]`, *optional*): Count only fences with one of these after the opening marks, in any
            case, such as `("python", "py")`; `""` stands for a fence without one.

    Example:
    ```python
    >>> last_fence("Try:\n```python\nprint(1)\n```\nNo:\n```python\nprint(2)\n```\nThis is it.")
    'print(2)\n'
    >>> last_fence("```c\nint x;\n```", tags=("python",)), last_fence("```python\nprint(")
    (None, None)
    ```
    """
    wanted = None if tags is None else {tag.lower() for tag in tags}
    found: str | None = None
    mark, tag, lines = "", "", list[str]()
    for line in text.splitlines(keepends=True):
        marks, after = _fence_of(line)
        if not mark and marks and not (marks[0] == "`" and "`" in after):  # else it is code within a line
            mark, tag, lines = marks, (after.split(maxsplit=1) or [""])[0].lower(), []
        elif mark and not after and marks.startswith(mark):
            if wanted is None or tag in wanted:
                found = "".join(lines)
            mark = ""
        elif mark:
            lines.append(line)
    return found


def _fence_of(line: str) -> tuple[str, str]:
    """Return the marks with which a line begins, and what comes after them; two empty texts where it is no fence."""
    line = line.strip()
    if line[:3] not in ("```", "~~~"):
        return "", ""
    after = line.lstrip(line[0])
    return line[: len(line) - len(after)], after.strip()


def outputs_agree(printed: str, expected: str, compare: Comparison = "whitespace") -> bool:
    r"""
    Return whether a program printed what it should.

    Args:
        printed (`str`): What it printed.
        expected (`str`): What it should print.
        compare (`str`, *optional*, defaults to `"whitespace"`): `"whitespace"`: the same words in the same order,
            whatever is between them; `"exact"`: the same characters; `"float"`: as `"whitespace"`, and two decimal
            numbers are equal that differ by at most 1e-6, absolutely or of the larger one.

    Raises:
        ValueError: `compare` is none of these.

    Example:
    ```python
    >>> outputs_agree("1  2\n", "1 2"), outputs_agree("1 2\n", "1 2", "exact")
    (True, False)
    >>> outputs_agree("0.3333333", "0.33333333"), outputs_agree("0.3333333", "0.33333333", "float")
    (False, True)
    ```
    """
    if compare not in COMPARISONS:
        raise ValueError(f"compare={compare!r} must be one of {', '.join(map(repr, COMPARISONS))}.")
    if compare == "exact":
        return printed == expected
    ours, theirs = printed.split(), expected.split()
    if compare == "whitespace" or len(ours) != len(theirs):
        return ours == theirs
    return all(one == other or _close(one, other) for one, other in zip(ours, theirs, strict=True))


def _close(one: str, other: str) -> bool:
    if max(len(one), len(other)) > _LONGEST_NUMBER or not (_NUMBER.fullmatch(one) and _NUMBER.fullmatch(other)):
        return False
    a, b = float(one), float(other)
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= TOLERANCE * max(1.0, abs(a), abs(b))


def fraction_passed(passed: Sequence[bool], binary: bool = True) -> float:
    r"""
    Return the reward of a program that was run on several tests.

    `R = 1` if all passed, else 0; without `binary` the share of tests that passed. From
    [Agnostics](https://huggingface.co/papers/2508.04865), which is binary because shares are gamed: by programs that
    print one frequent answer, or the outputs of tests that the prompt shows.

    Args:
        passed (`Sequence[bool]`): One for each test, at least one.
        binary (`bool`, *optional*, defaults to `True`): All or nothing.

    Raises:
        ValueError: there is no test.

    Example:
    ```python
    >>> fraction_passed([True, True]), fraction_passed([True, False]), fraction_passed([True, False], binary=False)
    (1.0, 0.0, 0.5)
    ```
    """
    if not passed:
        raise ValueError("passed=[] says nothing about a program: there must be at least one test.")
    return float(all(passed)) if binary else sum(passed) / len(passed)
