"""The reward of an answer of mathematics: by math-verify where that is installed, else by our own comparison."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

from .._compat import is_available, require
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards.answers import boxed_answers, last_formula, minerva_answer
from ..functional.rewards.matching import LONGEST_MATH, same_math
from ..functional.rewards.numbers import parse_number
from .answers import AnswerReward, check_flags

_PLACES = ("boxed", "final", "dollars")
_COMPARISONS = ("auto", "math_verify", "own")
#: seconds that math-verify has for each of its three steps, in the main thread
_PATIENCE = 5
#: what makes sympy compute something huge, or search for long
_HEAVY = re.compile(
    r"!|\\(?:o?i+nt|sum|prod|lim|binom|choose|[pb]?mod|Gamma|zeta|begin)|[0-9]{40}|\*\*|[\^_]\s*\{[^{}]*\^"
)
_POWER = re.compile(r"\^\s*(?:\{\s*)?([-+]?[0-9]+)|\^")


def is_tame(text: str, patient: bool = True) -> bool:
    """
    Return whether an expression is small enough for sympy: no tower of powers, factorial, sum or huge number.

    A signal ends Python code, and not one multiplication of numbers with millions of digits.

    Args:
        text (`str`): An expression of LaTeX.
        patient (`bool`, *optional*, defaults to `True`): Whether a timeout will end what takes long nevertheless.

    Example:
    ```python
    >>> is_tame("\\\\frac{x^2}{3}"), is_tame("9^{9^9}"), is_tame("100!")
    (True, False, False)
    ```
    """
    if len(text) > (300 if patient else 120) or text.count("{") > 40 or _HEAVY.search(text):
        return False
    powers = [min(abs(int(found[1])), 10**6) if found[1] else 2 for found in _POWER.finditer(text)]
    return math.prod(max(power, 2) for power in powers) <= (10_000 if patient else 100)


class MathReward(AnswerReward):
    r"""
    1 where the answer of a completion is the gold answer of mathematics, else 0.

    The answer is looked for in `\boxed{...}`, then after "final answer is" (Minerva's form), then in the last formula
    between dollars; a last box that is not closed is no answer. The gold column may be an answer or a solution with a
    box, as TRL's `accuracy_reward` reads it. What [`same_math`] finds equal is equal, and two different numbers are
    different; the rest is for math-verify where it is installed, which knows algebra, else it is different.

    math-verify is given short expressions without towers of powers, and has 5 seconds for each step in the main
    thread. In another thread its timeout by signals does not work: there only expressions that are smaller still are
    given to it. It also finds `6 \cdot 12` equal to `72`.

    Args:
        column (`str`, *optional*, defaults to `"solution"`): Column with the gold answer.
        strict (`bool`, *optional*, defaults to `False`): No formula between dollars counts, and all boxes must have
            the same answer: two different boxes are wrong.
        places (`Sequence[str]`, *optional*): Where the answer is looked for, in this order: `"boxed"`, `"final"`,
            `"dollars"`. Defaults to all three, with `strict` to the first two.
        comparison (`str`, *optional*, defaults to `"auto"`): `"math_verify"`, `"own"`, or `"auto"` for the first where
            it is installed. `reward.uses` says which one it is here.
        units (`bool`, *optional*, defaults to `False`): Whether units, degrees, percent signs and currencies count;
            with `True` an answer is compared by [`same_math`] alone.
        after_tag, within_tag, name: See [`AnswerReward`].

    Raises:
        ValueError: an option out of range, or options that exclude each other.
        MissingPackageError: `comparison="math_verify"`, and it is not installed.

    Example:
    ```python
    >>> reward = MathReward(comparison="own")
    >>> gold = ["\\frac{3}{4}"] * 4
    >>> said = ["\\boxed{0.75}", "So $\\dfrac34$.", "\\boxed{3/4} or \\boxed{1/2}", "\\boxed{0.7"]
    >>> reward(completions=said, solution=gold)
    [1.0, 1.0, 0.0, 0.0]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        column: str = "solution",
        strict: bool = False,
        places: Sequence[Literal["boxed", "final", "dollars"]] | None = None,
        comparison: Literal["auto", "math_verify", "own"] = "auto",
        units: bool = False,
        after_tag: str | None = None,
        within_tag: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(column, after_tag, within_tag, name)
        check_flags(strict=strict, units=units)
        if comparison not in _COMPARISONS:
            raise ValueError(f"comparison={comparison!r} is none of {', '.join(_COMPARISONS)}.")
        if places is not None and (
            isinstance(places, str) or not places or len(set(places)) < len(places) or not {*places} <= {*_PLACES}
        ):
            raise ValueError(f"places={places!r} must be a list of some of {', '.join(_PLACES)}, each once.")
        if strict and places is not None and "dollars" in places:
            raise ValueError("strict=True excludes 'dollars' from places: any formula could be the last one.")
        if comparison == "math_verify":
            if units:
                raise ValueError("units=True needs comparison='own' or 'auto': math-verify leaves units out.")
            require("math_verify", f"comparison={comparison!r}")
        self.strict, self.comparison, self.units = strict, comparison, units
        self.places = tuple(places) if places is not None else _PLACES[:2] if strict else _PLACES

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__!r}, uses={self.uses!r})"

    @property
    def uses(self) -> str:
        """Which comparison decides here, `"math_verify"` or `"own"`."""
        available = self.comparison == "math_verify" or self.comparison == "auto" and is_available("math_verify")
        return "math_verify" if available and not self.units else "own"

    def compare(self, text: str, gold: Any) -> float | None:
        """Return 1 or 0, or `None` where there is no gold answer."""
        wanted = _gold(gold)
        if wanted is None:
            return None
        said = self._answer(text)
        if said is None or len(said) > LONGEST_MATH:
            return 0.0
        if same_math(said, wanted, self.units):
            return 1.0
        if self.uses == "own" or None not in (parse_number(said.strip("$ ")), parse_number(wanted.strip("$ "))):
            return 0.0
        return float(_math_verify(wanted, said))

    def _answer(self, text: str) -> str | None:
        for place in self.places:
            if place == "boxed":
                boxes = boxed_answers(text)
                if boxes:
                    return self._of_boxes(boxes)
            else:
                found = minerva_answer(text) if place == "final" else last_formula(text)
                if found is not None:
                    return found
        return None

    def _of_boxes(self, boxes: list[str | None]) -> str | None:
        last = boxes[-1]
        others = boxes[:-1] if self.strict else []
        if last is None or any(box is None or not same_math(box, last, self.units) for box in others):
            return None
        return last


def _gold(gold: Any) -> str | None:
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        return None
    text = str(gold)
    boxes = boxed_answers(text)
    if boxes:
        found = boxes[-1]
    elif "####" in text:
        found = text.rpartition("####")[2]
    else:
        found = minerva_answer(text) or text
    return found if found and found.strip() and len(found) <= LONGEST_MATH else None


def _math_verify(gold: str, answer: str) -> bool:
    """Ask math-verify; what it cannot read or finish is not equal."""
    patient = threading.current_thread() is threading.main_thread()
    if not (is_tame(gold, patient) and is_tame(answer, patient)):
        return False
    package = require("math_verify", "MathReward")
    patience = _PATIENCE if patient else None
    # As TRL's accuracy_reward asks it: correct LaTeX, the box first.
    config = [package.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    # What it raises for a hostile text says nothing about the run.
    with _quiet(), suppress(Exception):
        parsed = []
        for text in (gold, answer):
            boxed = f"\\boxed{{{text.strip().strip('$')}}}"
            parsed.append(package.parse(boxed, config, extraction_mode="first_match", parsing_timeout=patience))
        return bool(parsed[0] and parsed[1] and package.verify(*parsed, timeout_seconds=patience))
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its warnings, that an answer took too long or that there is no timeout: it happens in every batch."""
    loggers = [logging.getLogger(f"math_verify.{part}") for part in ("parser", "grader", "utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


#: [`MathReward`] of the column `solution`, for a YAML
math_reward = MathReward()
#: [`MathReward`] of the column `solution`, only of boxes and final answers that agree, for a YAML
strict_math_reward = MathReward(strict=True, name="strict_math_reward")
