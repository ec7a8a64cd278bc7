"""Golden tables of numbers, choices and texts: what is right, and what must not be taken for right."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from hf_effi.errors import RewardError
from hf_effi.functional.rewards import (
    boxed_answers,
    choice_of,
    last_formula,
    marked_answers,
    marked_choices,
    minerva_answer,
    normal_tokens,
    numbers_in,
    parse_number,
    plain_characters,
    text_after,
    text_within,
    token_f1,
    without_fence,
)
from hf_effi.rewards import (
    AnswerReward,
    ChoiceReward,
    ExactMatchReward,
    LastNumberReward,
    NormalizedMatchReward,
    TokenF1Reward,
    strict_number_reward,
)

# --- numbers ---------------------------------------------------------------------------------------------------------

#: text -> (the numbers in it, the number that it is)
NUMBERS: dict[str, tuple[list[Any], Any]] = {
    "": ([], None),
    "none": ([], None),
    "42": ([42], 42),
    "1,000": ([1000], 1000),
    "1,000,000.5": (["2000001/2"], "2000001/2"),
    "1,00": ([], None),
    "1,0000": ([], None),
    "0,125": ([0, 125], None),
    "1,2,3": ([1, 2, 3], None),
    "12,345,67": ([12, 345, 67], None),
    "3/4": (["3/4"], "3/4"),
    "6/8": (["3/4"], "3/4"),
    "0.75": (["3/4"], "3/4"),
    ".75": (["3/4"], "3/4"),
    "3/0": ([], None),
    "1/2/2024": ([1, 2, 2024], None),
    "1 1/2": (["3/2"], "3/2"),
    "1½": (["3/2"], "3/2"),
    "½": (["1/2"], "1/2"),
    r"\frac{3}{4}": (["3/4"], "3/4"),
    r"\dfrac34": (["3/4"], "3/4"),
    r"-\frac{1}{2}": (["-1/2"], "-1/2"),
    r"\frac{-1}{2}": (["-1/2"], "-1/2"),
    r"2\frac{1}{2}": (["5/2"], "5/2"),
    r"\frac{1": ([1], None),
    "1e3": ([1000], 1000),
    "1.5e-1": (["3/20"], "3/20"),
    "1e99999": ([], None),
    "-5": ([-5], -5),
    "\u22125": ([-5], -5),
    "\u20135": ([-5], -5),
    "- 5": ([5], -5),
    "10-3": ([10, 3], None),
    "x-3": ([3], None),
    "(2)-3": ([2, 3], None),
    "x=-3": ([-3], None),
    "$5": ([5], 5),
    r"\$1,200.50": (["2401/2"], "2401/2"),
    "-$5": ([-5], -5),
    "$-5": ([-5], -5),
    "€7": ([7], 7),
    "$5$": ([5], 5),
    "50%": ([50], 50),
    r"50\%": ([50], 50),
    "5.": ([5], 5),
    "5 apples": ([5], None),
    "3.4.5": (["17/5", 5], None),
    "\uff15\uff10": ([50], 50),
    "\u0663\u066b\u0665": (["7/2"], "7/2"),
    "1{,}000": ([1000], 1000),
    r"1\,000": ([1000], 1000),
    "12\u202f345": ([12345], 12345),
    "12 345": ([12, 345], None),
    "1" * 1001: ([], None),
    "x\u00b2": ([], None),
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: ascii(text[:20]))
def test_numbers(text: str) -> None:
    found, whole = NUMBERS[text]
    assert numbers_in(text) == [Fraction(value) for value in found]
    assert parse_number(text) == (None if whole is None else Fraction(whole))
    assert numbers_in(text, last=1) == numbers_in(text)[-1:] and numbers_in(text, last=0) == []


def test_numbers_that_are_no_texts() -> None:
    assert (
        parse_number(0.1) == Fraction(1, 10)
        and parse_number(3) == 3
        and parse_number(Fraction(1, 3)) == Fraction(1, 3)
    )
    for value in (True, None, float("nan"), float("inf"), [1], object()):
        assert parse_number(value) is None, value
    assert numbers_in("50% of 3", percent=True) == [Fraction(1, 2), 3] and parse_number(
        "5%", percent=True
    ) == Fraction(1, 20)
    assert plain_characters("x\u00b2 \u2212\uff11") == "x\u00b2 -1"


GSM = "Each box has 6 * 12 = 72 of them.\n#### 72"
#: completion, gold, reward, reward with strict=True
LAST: list[tuple[str, Any, float | None, float | None]] = [
    ("6 * 12 = 72", "72", 1, 0),
    (GSM, GSM, 1, 1),
    ("#### 72", 72, 1, 1),
    ("The answer is 72.", 72.0, 1, 1),
    ("**Answer:** $72.00", "72", 1, 1),
    ("So \\boxed{72}", "#### 72", 1, 1),
    ("The final answer is\n72 apples", 72, 1, 1),
    ("#### 1,072", "1072", 1, 1),
    ("#### 1,0", 1, 0, 0),
    ("#### \u221272", -72, 1, 1),
    ("#### 72", -72, 0, 0),
    ("#### 0.75", "3/4", 1, 1),
    (r"\boxed{\frac{3}{4}}", "0.75", 1, 1),
    ("```\n72\n```", 72, 1, 0),
    ("#### 72 apples", "72", 1, 1),
    ("#### 72 apples in 6 boxes", "72", 0, 0),
    # guesses, two answers, truncated, nothing
    ("70, 71, 72", 72, 1, 0),
    ("#### 70, 71, 72", 72, 1, 0),
    ("#### 71\n#### 72", 72, 1, 0),
    ("The answer is 71. No, the answer is 72.", 72, 1, 0),
    ("#### 72\n#### 72.0", 72, 1, 1),
    ("\\boxed{71} \\boxed{72}", 72, 1, 0),
    ("The answer is", 72, 0, 0),
    ("The answer is 72. The answer is", 72, 1, 0),
    ("\\boxed{72", 72, 1, 0),
    ("#### 7", 72, 0, 0),
    ("", 72, 0, 0),
    ("   \n", 72, 0, 0),
    ("seventy-two", 72, 0, 0),
    ("72", None, None, None),
    ("72", "", None, None),
    ("72", "seventy-two", None, None),
    ("72", "71 or 72", None, None),
    ("72", float("nan"), None, None),
    ("72", ["71", 72], 1, 0),
    ("72", [None, "x"], None, None),
]


@pytest.mark.parametrize(("text", "gold", "loose", "strict"), LAST)
def test_last_number(text: str, gold: Any, loose: float | None, strict: float | None) -> None:
    assert LastNumberReward()(completions=[text], answer=[gold]) == [loose]
    assert strict_number_reward(completions=[text], answer=[gold]) == [strict]


def test_options_of_last_number() -> None:
    assert LastNumberReward("gold", percent=True)(completions=["50%", "50"], gold=["0.5", "0.5"]) == [1.0, 0.0]
    near = LastNumberReward(tolerance=0.01)
    assert near(completions=["3.14", "3.2", "0.01"], answer=["3.14159", "3.14159", 0]) == [1.0, 0.0, 0.0]
    german = LastNumberReward(strict=True, marks=["Antwort:"])
    assert german(completions=["ANTWORT: 72", "answer is 72"], answer=[72, 72]) == [1.0, 0.0]
    thinks = LastNumberReward(after_tag="think", within_tag="answer")
    told = [
        "<think>71</think><answer>72</answer> 70",
        "<think><answer>72</answer>",
        "</think>72",
        "</think><answer>72",
    ]
    assert thinks(completions=told, answer=[72] * 4) == [1.0, 0.0, 0.0, 0.0]


# --- where an answer stands ------------------------------------------------------------------------------------------


def test_boxes() -> None:
    assert boxed_answers("none") == [] and boxed_answers("\\boxed{}") == [""]
    assert boxed_answers(r"\boxed{\frac{1}{\sqrt{2}}} \fbox{a}") == [r"\frac{1}{\sqrt{2}}", "a"]
    assert boxed_answers(r"\boxed{\boxed{5}}") == [r"\boxed{5}"]
    assert boxed_answers(r"{ } } \boxed{\{1\}} \boxed{2") == [r"\{1\}", None]
    assert boxed_answers(r"\boxed{1 \boxed{2}") == [None, "2"]
    assert len(boxed_answers(r"\boxed{1}" * 300)) == 256


def test_marks_and_formulas() -> None:
    assert marked_answers("Answer: 3.5 cm. Next") == ["3.5 cm"]
    assert marked_answers("THE ANSWER IS\n\n **7**\nmore") == ["7**"] and marked_answers("") == []
    assert len(marked_answers("#### " + "x" * 1000)[0]) == 300
    assert minerva_answer("The final answer is $4$. I hope it is correct.") == "$4$"
    assert minerva_answer("The answer is 4") is None and minerva_answer("the final answer is") is None
    assert last_formula("$1$ and $x+2$.") == "x+2" and last_formula(r"\(3\) $4") == "3"
    assert last_formula(r"\[ 3 \]") == "3" and last_formula("costs $3") is None and last_formula("$$") is None
    assert last_formula("$$\nx\n$$") == "x" and last_formula(f"${'y' * 301}$") is None
    assert text_after("a|b|c", "|") == "c" and text_after("abc", "|") is None
    assert text_within("<a>1</a><a>2", "a") == "1" and text_within("</a><a>", "a") is None


# --- choices ---------------------------------------------------------------------------------------------------------

#: text -> (the choice, the choice with strict=True)
CHOICES: dict[str, tuple[str | None, bool]] = {
    "B": ("B", False),
    "(B)": ("B", False),
    "B.": ("B", False),
    "B)": ("B", False),
    "**B**": ("B", False),
    "\uff22": ("B", False),
    "$\\text{(B)}$": ("B", False),
    "B. Paris": ("B", False),
    "A. no\nB. yes": ("B", False),
    "I think of C.\nB": ("B", False),
    "```\nB\n```": (None, False),
    "The answer is B": ("B", True),
    "The answer is (B) Paris": ("B", True),
    "the answer is b.": ("B", True),
    "Answer: **B**": ("B", True),
    "**Answer:** B": ("B", True),
    "Answer: $B$": ("B", True),
    "The correct answer is option B": ("B", True),
    "The correct option is B.": ("B", True),
    "The answer is\n\nB": ("B", True),
    "The answer is B because A is wrong": ("B", True),
    "\\boxed{B}": ("B", True),
    "\\boxed{\\text{(B)}}": ("B", True),
    "The answer is A. No, the answer is B.": ("B", False),
    "\\boxed{A} \\boxed{B}": ("B", False),
    "The answer is B. So \\boxed{A}": ("A", False),
    # two at once, truncated, none
    "B or C": (None, False),
    "The answer is A or B": (None, False),
    "The answer is (A) or (B)": (None, False),
    "Answer: A, B": (None, False),
    "Answer: A/B": (None, False),
    "\\boxed{A or B}": (None, False),
    "\\boxed{B": (None, False),
    "The answer is": (None, False),
    "The answer is a number": (None, False),
    "The answer is not B": (None, False),
    "Answer: K": (None, False),
    "Bananas": (None, False),
    "A dog": (None, False),
    "I am": (None, False),
    "b": (None, False),
    "": (None, False),
}


@pytest.mark.parametrize("text", CHOICES)
def test_choices(text: str) -> None:
    choice, strict = CHOICES[text]
    assert choice_of(text) == choice
    golds = ["A", "B", "C"]
    assert ChoiceReward()(completions=[text] * 3, answer=golds) == [float(gold == choice) for gold in golds]
    wanted = [float(strict and gold == choice) for gold in golds]
    assert ChoiceReward(strict=True)(completions=[text] * 3, answer=golds) == wanted


def test_golds_of_choices() -> None:
    golds = ["(B)", 1, "The answer is B", ["A", "B"], 0, None, "K", 10, -1, True, ""]
    wanted = [1.0, 1.0, 1.0, 1.0, 0.0, None, None, None, None, None, None]
    assert ChoiceReward()(completions=["B"] * len(golds), answer=golds) == wanted
    assert marked_choices("Answer: B. Answer: (C)") == ["B", "C"]


# --- texts -----------------------------------------------------------------------------------------------------------

#: completion, gold -> exact, normalised, normalised without units
TEXTS: list[tuple[str, Any, float, float, float]] = [
    ("Paris", "Paris", 1, 1, 1),
    (" Paris\n", "Paris", 1, 1, 1),
    ("paris", "Paris", 0, 1, 1),
    ("Paris.", "Paris", 0, 1, 1),
    ("The Eiffel Tower!", "Eiffel tower", 0, 1, 1),
    ("Par", "Paris", 0, 0, 0),
    ("Paris Rome", "Paris", 0, 0, 0),
    ("", "Paris", 0, 0, 0),
    ("```\nParis\n```", "Paris", 0, 1, 1),
    ("\u22121,000.50", "-1000.5", 0, 1, 1),
    ("1000", 1000, 1, 1, 1),
    ("1,00", "100", 0, 0, 0),
    ("-5", "5", 0, 0, 0),
    ("1.5", "15", 0, 0, 0),
    ("don\u2019t", "don't", 0, 1, 1),
    ("\uff30aris", "Paris", 0, 1, 1),
    ("a<b", "a>b", 0, 0, 0),
    ("C++", "C", 0, 0, 0),
    ("C#", "C", 0, 0, 0),
    ("x\u00b2", "x2", 0, 0, 0),
    ("x\u00b2", "x^2", 0, 1, 1),
    ("vitamin A", "vitamin", 0, 0, 0),
    ("5 km", "5", 0, 0, 1),
    ("5km", "5 km", 0, 0, 1),
    ("$5", "5", 0, 0, 1),
    ("50%", "50", 0, 0, 1),
    ("5 km", "6 km", 0, 0, 0),
    ("!", "?", 0, 0, 0),
    ("", "!", 0, 0, 0),
    ("A", "A", 1, 1, 1),
    ("\u65e5\u672c\u3001\u8a9e", "\u65e5\u672c \u8a9e", 0, 1, 1),
]


@pytest.mark.parametrize(("text", "gold", "exact", "normal", "bare"), TEXTS)
def test_texts(text: str, gold: Any, exact: float, normal: float, bare: float) -> None:
    assert ExactMatchReward()(completions=[text], answer=[gold]) == [exact]
    assert NormalizedMatchReward()(completions=[text], answer=[gold]) == [normal]
    assert NormalizedMatchReward(units=False)(completions=[text], answer=[gold]) == [bare]


def test_options_of_normalised_matches() -> None:
    def of(text: str, gold: str, **over: bool) -> float | None:
        return NormalizedMatchReward(**over)(completions=[text], answer=[gold])[0]

    assert of("paris", "Paris", case=True) == 0 and of("Paris!", "Paris", punctuation=True) == 0
    assert of("the cat", "cat", articles=True) == 0 and of("the cat", "The cat", articles=True) == 1
    for reward in (ExactMatchReward(), NormalizedMatchReward(), TokenF1Reward()):
        assert reward(completions=["a", "b", "c", "b"], answer=[None, ["x", "b"], "", []]) == [None, 1.0, None, None]
    assert without_fence("~~~\nx\n~~~") == "x" and without_fence("```\nx") == "```\nx"
    assert normal_tokens("") == [] and normal_tokens("!!!") == []


def test_f1_by_hand() -> None:
    assert token_f1([], []) == 1 and token_f1(["a"], []) == 0 and token_f1([], ["a"]) == 0
    assert token_f1(["a", "a", "b"], ["a", "c"]) == pytest.approx(2 * 1 / 5)  # precision 1/3, recall 1/2
    reward = TokenF1Reward()
    said = ["the cat sat", "cat", "dog", "", "cat cat cat"]
    # "a" and "the" are left out, so that the gold text has three words.
    assert reward(completions=said, answer=["a cat sat down"] * 5) == pytest.approx([4 / 5, 2 / 4, 0, 0, 2 / 6])


# --- options and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LastNumberReward(marks=["x"]), "strict=True only"),
        (lambda: LastNumberReward(strict=True, marks="####"), "must be a list of texts"),
        (lambda: LastNumberReward(strict=True, marks=[" "]), "must be a list of texts"),
        (lambda: LastNumberReward(strict=1), "strict=1 must be True or False"),
        (lambda: LastNumberReward(tolerance=1.0), "tolerance=1.0 is outside"),
        (lambda: LastNumberReward(""), "column='' must be a name"),
        (lambda: ChoiceReward(within_tag="<answer>"), "within_tag='<answer>' must be a name without brackets"),
        (lambda: ExactMatchReward(after_tag=3), "after_tag=3 must be a name"),
        (lambda: NormalizedMatchReward(case="yes"), "case='yes' must be True or False"),
        (lambda: TokenF1Reward(name=""), "name='' must be a text"),
    ],
)
def test_wrong_options(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(
        RewardError, match="last_number_reward reads the column 'answer' of the dataset, which has: gold"
    ):
        LastNumberReward()(completions=["1"], gold=["1"])
    with pytest.raises(NotImplementedError, match="AnswerReward does not define compare"):
        AnswerReward("answer")(completions=["1"], answer=["1"])
