"""Golden table of answers of mathematics, and how math-verify is asked: limits, threads, and without it."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from hf_effi import _compat
from hf_effi.errors import MissingPackageError
from hf_effi.functional.rewards import same_math
from hf_effi.rewards import MathReward, math
from hf_effi.rewards.math import is_tame

SAME = [
    (r"\dfrac34", "0.75"),
    (r"\frac{3}{4}", "3/4"),
    (r"1\frac{1}{2}", "3/2"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"\frac{-1}{2}", "-.5"),
    (r"12\text{ cm}", "12"),
    (r"12\text{ cm}^2", "12"),
    ("12 cm", "12"),
    (r"3\,\text{m}", "3"),
    ("1,234 dollars", "1234"),
    ("1,000", "1000"),
    ("1{,}000", "1000"),
    (r"\$5", "5"),
    ("$5$", "5"),
    ("5.", "5"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    ("\u22125", "-5"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    (r"(\frac{1}{2}, 3)", "(0.5,3)"),
    (r"\left(1,2\right]", "(1,2]"),
    (r"(-\infty, 3)", "(-\u221e,3)"),
    (r"\{1,2\}", r"\{2, 1.0\}"),
    ("2, 1", "1,2"),
    ("1 and 2", "1,2"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y=2x+1", "y = 2x + 1"),
    (r"\text{Yes}", "yes"),
    (r"\mathrm{east}", r"\text{east}"),
    (r"2\sqrt3", r"2\sqrt{3}"),
    (r"2\sqrt{3}", "2\u221a3"),
    (r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}{2}"),
    ("x^{2}+2x", "x^2 + 2x"),
    (r"3\times 10^5", r"3 \cdot 10^{5}"),
    (r"\pi", "\u03c0"),
    ("(5)", "5"),
    (r"\frac{x+1}{2}", r"\frac{x + 1}{2}"),
]
DIFFERENT = [
    ("", "1"),
    ("1", ""),
    ("", ""),
    ("5", "-5"),
    ("(1,2)", "(2,1)"),
    ("(1,2]", "(1,2)"),
    ("(1,2)", "[1,2]"),
    (r"\{1,2\}", "(1,2)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,1", "1,2"),
    ("1,2", "1"),
    ("5,6", "56"),
    ("1,00", "100"),
    ("1,00", "1"),
    ("123,456", "123"),
    ("x=5", "y=5"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x^2", "x^3"),
    ("x^{10}", "x^1"),
    (r"\frac{1}{2}", "12"),
    (r"\frac{1}{2}", "2"),
    (r"2\frac{1}{2}", "1"),
    (r"3\frac", "3"),
    ("0.333", "1/3"),
    ("yes", "no"),
    ("12 cm", "13 cm"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_the_same(first: str, second: str) -> None:
    assert same_math(first, second) and same_math(second, first)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_not_the_same(first: str, second: str) -> None:
    assert not same_math(first, second) and not same_math(second, first)


def test_units_can_count() -> None:
    assert not same_math("12 cm", "12", units=True) and same_math("12 cm", r"12\text{cm}", units=True)
    assert not same_math("50%", "50", units=True) and same_math("x" * 1001, "x" * 1001 + " ")


HALF = r"\frac{1}{2}"
#: completion -> reward, and with strict=True
COMPLETIONS = {
    r"So \boxed{0.5}": (1, 1),
    r"\boxed{\dfrac{1}{2}}": (1, 1),
    r"\boxed{1/2} again \boxed{0.5}": (1, 1),
    r"\boxed{1/3} no, \boxed{1/2}": (1, 0),
    r"\boxed{1/2} no, \boxed{1/3}": (0, 0),
    r"\boxed{\boxed{0.5}}": (1, 1),
    r"\boxed{0.5": (0, 0),
    r"\boxed{0.5} and \boxed{0.": (0, 0),
    r"\boxed{}": (0, 0),
    "The final answer is $0.5$. I hope it is correct.": (1, 1),
    "The final answer is $0.5$. So \\boxed{3}": (0, 0),
    "The final answer is": (0, 0),
    "It is $x = 0.5$.": (1, 0),
    r"It is \(0.5\).": (1, 0),
    "It is $0.3$, $0.5$ or $0.4$": (0, 0),
    "```\n0.5\n```": (0, 0),
    "0.5": (0, 0),
    "": (0, 0),
    "\\boxed{" + "0" * 2000 + "}": (0, 0),
}


@pytest.mark.parametrize("text", COMPLETIONS, ids=lambda text: text[:40])
def test_completions(text: str) -> None:
    loose, strict = COMPLETIONS[text]
    assert MathReward(comparison="own")(completions=[text], solution=[HALF]) == [loose]
    assert MathReward(comparison="own", strict=True)(completions=[text], solution=[HALF]) == [strict]


def test_golds() -> None:
    golds = [0.5, HALF, rf"thus \boxed{{{HALF}}}", "... #### 0.5", "The final answer is $0.5$.", "$0.5$", ["1", "1/2"]]
    assert MathReward(comparison="own")(completions=[r"\boxed{1/2}"] * len(golds), solution=golds) == [1.0] * len(
        golds
    )
    nothing = [None, "", " ", r"\boxed{", "x" * 1001, True, [], {"a": 1}]
    assert MathReward(comparison="own")(completions=["1"] * len(nothing), solution=nothing) == [None] * len(nothing)


def test_places_and_tags() -> None:
    said = ["The final answer is 4. \\boxed{5}", "$4$", "</think>\\boxed{4}", "<think>\\boxed{4}"]
    reward = MathReward(comparison="own", places=["final"])
    assert reward(completions=said, solution=[4] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert MathReward(comparison="own", after_tag="think")(completions=said, solution=[4] * 4) == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"comparison": "sympy"}, "comparison='sympy' is none of auto, math_verify, own"),
        ({"places": ["box"]}, "places=.'box'. must be a list of some of boxed, final, dollars"),
        ({"places": []}, "must be a list"),
        ({"places": "boxed"}, "must be a list"),
        ({"strict": True, "places": ["dollars"]}, "strict=True excludes 'dollars'"),
        ({"units": True, "comparison": "math_verify"}, "needs comparison='own' or 'auto'"),
        ({"units": "cm"}, "units='cm' must be True or False"),
    ],
)
def test_wrong_options(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MathReward(**arguments)


# --- math-verify -----------------------------------------------------------------------------------------------------


class Package:
    """In place of math-verify: records how it is asked."""

    def __init__(self, problem: BaseException | None = None) -> None:
        self.asked: list[Any] = []
        self.problem = problem

    LatexExtractionConfig = SimpleNamespace

    def parse(self, text: str, config: Any, extraction_mode: str, parsing_timeout: int | None) -> list[str]:
        self.asked.append((text, parsing_timeout))
        logging.getLogger("math_verify.parser").warning("timeout is disabled")
        return [text]

    def verify(self, gold: Any, answer: Any, timeout_seconds: int | None) -> bool:
        self.asked.append(("verify", timeout_seconds))
        if self.problem:
            raise self.problem
        return True


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    made = Package()
    monkeypatch.setattr(math, "require", lambda name, purpose: made)
    monkeypatch.setattr(math, "is_available", lambda name: True)
    return made


def test_it_is_asked_only_where_the_notation_does_not_decide(package: Package, caplog: Any) -> None:
    reward = MathReward()
    assert reward.uses == "math_verify" and "uses='math_verify'" in repr(reward)
    said = [r"\boxed{x}", r"\boxed{3}", r"\boxed{1+x}"]
    assert reward(completions=said, solution=["x", "4", "x+1"]) == [1.0, 0.0, 1.0]
    assert package.asked == [(r"\boxed{x+1}", 5), (r"\boxed{1+x}", 5), ("verify", 5)]
    assert not caplog.records
    assert MathReward(units=True).uses == "own" and MathReward(comparison="own").uses == "own"


def test_in_a_thread_it_gets_no_signal_and_less(package: Package) -> None:
    found: list[Any] = []

    def ask() -> None:
        found.extend(MathReward()(completions=[r"\boxed{1+x}", r"\boxed{x^{20}y^{20}}"], solution=["x+1", "x"]))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [1.0, 0.0] and [timeout for _, timeout in package.asked] == [None] * 3


def test_what_it_raises_ends_no_run(package: Package) -> None:
    package.problem = RecursionError("deep")
    assert MathReward()(completions=[r"\boxed{1+x}"], solution=["x+1"]) == [0.0]


def test_hostile_expressions_are_not_given_to_it(package: Package) -> None:
    hostile = ["9^{9^{9^9}}", "9^{9^9}", "9^{99999}", "((9^{99})^{99})^{99}", "100!", r"\sum_{k=1}^{9} k", "2**99",
               "x" * 301, r"\int x", "1" * 41 + "x", "{" * 50, "2^^9^9^9^9^9^9^9^9^9^9^9^9^9^9"]  # fmt: skip
    assert not any(is_tame(text) for text in hostile), [text for text in hostile if is_tame(text)]
    assert MathReward()(completions=[f"\\boxed{{{text}}}" for text in hostile], solution=["y"] * len(hostile)) == [
        0.0
    ] * len(hostile)
    assert not package.asked
    assert is_tame("x^2+y^{10}") and is_tame("x^{50}") and not is_tame("x^{500}", patient=False)


def test_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "is_available", lambda name: False)
    monkeypatch.setattr(math, "is_available", lambda name: False)
    assert MathReward().uses == "own"
    with pytest.raises(MissingPackageError, match=r"needs `math-verify`.*hf_effi\[rewards\]"):
        MathReward(comparison="math_verify")


@pytest.mark.skipif(not _compat.is_available("math_verify"), reason="math-verify is not installed")
def test_with_the_true_one() -> None:
    said = [r"\boxed{(x+1)^2}", r"\boxed{\sqrt{8}}", r"\boxed{x+2}", r"\boxed{\frac{}", r"\boxed{9^{9^{9^9}}}"]
    reward = MathReward(comparison="math_verify")
    assert reward(completions=said, solution=["x^2+2x+1", r"2\sqrt2", "x+1", "1", "1"]) == [1.0, 1.0, 0.0, 0.0, 0.0]
