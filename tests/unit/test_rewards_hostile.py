"""What every reward of texts keeps: no text ends a run, no size stops it, and an object goes where a function goes."""

from __future__ import annotations

import copy
import math
import pickle
import random
from typing import Any

import pytest
from transformers import TrainerState

from hf_effi import rewards
from hf_effi.functional.rewards import INSTRUCTIONS, check_instruction, count_sentences, same_math
from hf_effi.hub.admitted import CLASSES, find
from tests.unit.test_rewards_formats import KEPT

#: reward -> its columns for one completion, and its range
REWARDS: dict[str, tuple[Any, dict[str, Any], tuple[float, float]]] = {
    "last_number": (rewards.LastNumberReward(), {"answer": "72"}, (0, 1)),
    "strict_number": (rewards.LastNumberReward(strict=True, percent=True), {"answer": "0.5"}, (0, 1)),
    "choice": (rewards.ChoiceReward(), {"answer": "B"}, (0, 1)),
    "strict_choice": (rewards.ChoiceReward(strict=True), {"answer": "B"}, (0, 1)),
    "exact": (rewards.ExactMatchReward(), {"answer": "x"}, (0, 1)),
    "normalized": (rewards.NormalizedMatchReward(within_tag="answer"), {"answer": "x"}, (0, 1)),
    "bare": (rewards.NormalizedMatchReward(units=False), {"answer": "5 km"}, (0, 1)),
    "f1": (rewards.TokenF1Reward(after_tag="think"), {"answer": "x y"}, (0, 1)),
    "math": (rewards.MathReward(comparison="own"), {"solution": r"\frac{1}{2}"}, (0, 1)),
    "strict_math": (rewards.MathReward(comparison="own", strict=True), {"solution": "(1, 2)"}, (0, 1)),
    "tags": (rewards.TagFormatReward(partial=True, only=True), {}, (0, 1)),
    "opened": (rewards.TagFormatReward(opened=True), {}, (0, 1)),
    "instructions": (
        rewards.InstructionReward(fraction=True, loose=True),
        {"instruction_id_list": list(KEPT), "kwargs": [arguments for arguments, _, _ in KEPT.values()]},
        (0, 1),
    ),
    "overlong": (rewards.SoftOverlongReward(10, 5), {"completion_ids": [1] * 8}, (-1, 0)),
    "length": (rewards.LengthMatchReward(), {"completion_ids": [1] * 8, "answer": 3}, (0, 1)),
    "verifier": (
        rewards.VerifierReward(alpha=2.0, how="mean"),
        {"verifier": ["gsm8k", "f1", "math"], "ground_truth": "1/2"},
        (0, 2),
    ),
}
#: characters; a pattern that tries again from each of them would take minutes
N = 50_000
MEGABYTE = 2**20
#: what makes patterns try again
LARGE = {
    "digits": "7" * N,
    "numbers": "1 " * (N // 2),
    "commas": "1,000," * (N // 6),
    "fractions": "1/" * (N // 2),
    "powers": "1e" * (N // 2),
    "boxes": r"\boxed{" * (N // 8) + "}" * (N // 8),
    "open boxes": r"\boxed{\frac{" * (N // 13),
    "braces": "{" * (N // 2) + "}" * (N // 2),
    "marks": "#### " * (N // 5),
    "answers": "the answer is A or " * (N // 19),
    "dollars": "$" * N,
    "formulas": r"\(" * (N // 2),
    "letters": "(A) or " * (N // 7),
    "lines": "A.\n" * (N // 3),
    "spaces": " " * N,
    "empty lines": "\n" * N,
    "tags": "<think><answer>" * (N // 15),
    "angles": "<" * N,
    "brackets": "[" * N,
    "stars": "*" * N,
    "fences": "```\n" * (N // 4),
    "points": "a. " * (N // 3),
    "combining": "\u0300\u0316" * (N // 2),
    "wide": "\ufdfa" * (N // 18),
    "minus": "\u2212" * (N // 3),
    "backslashes": "\\" * N,
}


@pytest.mark.parametrize("name", LARGE)
def test_large_texts(name: str) -> None:
    """There is no clock here: what takes quadratic time would be seen in the time of the suite."""
    text = LARGE[name]
    for reward, columns, (low, high) in REWARDS.values():
        (found,) = reward(completions=[text], **{key: [value] for key, value in columns.items()})
        assert found is not None and low <= found <= high


@pytest.mark.parametrize("name", REWARDS)
def test_a_megabyte(name: str) -> None:
    reward, columns, (low, high) = REWARDS[name]
    texts = ["7" * MEGABYTE, r"\boxed{" * 10**5 + "}" * 10**5]
    found = reward(completions=texts, **{key: [value] * 2 for key, value in columns.items()})
    assert all(value is not None and low <= value <= high for value in found)


def test_a_line_of_a_million_digits_is_no_number() -> None:
    text = "7" * MEGABYTE
    assert rewards.last_number_reward(completions=[f"5 {text}", f"{text} 5"], answer=["5", "5"]) == [1.0, 1.0]
    assert rewards.last_number_reward(completions=["5"], answer=[text]) == [None]
    assert rewards.math_reward(completions=[f"\\boxed{{{text}}}"], solution=["7"]) == [0.0]
    assert check_instruction(text, "detectable_format:json_format") is False  # Python reads no such integer


# fmt: off
PIECES = [
    r"\boxed{", "}", "{", r"\frac", r"\sqrt", r"\text{", "$", "$$", "####", "answer is", "final answer is", "B", "(A)",
    "1,0", "3/", "/0", "-", "\u2212", "\u00bd", "%", r"\%", ".", ",", "e9", "<think>", "</think>", "<answer>",
    "</answer>", "\n", " ", "```", "*", "<<", ">>", '"', "[", "]", "\x00", "\ud800", "\U0001f600", "\u0301", "\u0663",
    "\ufb01", "\u200b", "\u2028", "=", "(", ")", "\\{", "and", "km", "\\", "^", "_", "P.S.", "******",
]
# fmt: on


@pytest.mark.parametrize("name", REWARDS)
def test_no_text_raises_or_leaves_the_range(name: str) -> None:
    reward, columns, (low, high) = REWARDS[name]
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(30))) for _ in range(200)]
    texts += ["".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20))) for _ in range(60)]
    found = reward(completions=texts, **{key: [value] * len(texts) for key, value in columns.items()})
    assert len(found) == len(texts)
    assert all(value is not None and math.isfinite(value) and low <= value <= high for value in found)


def test_no_gold_answer_raises() -> None:
    rng = random.Random(1)
    golds = ["".join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(150)] + [
        None,
        3,
        2.5,
        True,
        [],
        {},
        b"x",
        object(),
    ]
    for name, (reward, columns, _) in REWARDS.items():
        key = next((key for key in ("answer", "solution", "ground_truth") if key in columns), None)
        if key is not None:
            rows = {other: [value] * len(golds) for other, value in columns.items()} | {key: golds}
            assert len(reward(completions=["1"] * len(golds), **rows)) == len(golds), name
    for gold in golds:
        if isinstance(gold, str):
            assert same_math(gold, gold) in (True, False) and count_sentences(gold) >= 0


@pytest.mark.parametrize("name", REWARDS)
def test_it_goes_where_a_function_goes(name: str) -> None:
    reward, columns, _ = REWARDS[name]
    text = "<think>1</think><answer>The answer is B: \\boxed{1/2}</answer>"
    rows = {key: [value] * 2 for key, value in columns.items()}
    told = reward(completions=[text, "72"], **rows)
    assert told == reward(
        completions=[[{"role": "assistant", "content": text}], [{"role": "assistant", "content": "72"}]], **rows
    )
    for other in (pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
        assert other.__name__ == reward.__name__ and repr(other) == repr(reward)
        assert other(completions=[text, "72"], **rows) == told


READY = ("last_number_reward", "strict_number_reward", "choice_reward", "exact_match_reward",
         "normalized_match_reward",
         "token_f1_reward", "math_reward", "strict_math_reward", "think_answer_format_reward", "instruction_reward",
         "verifier_reward")  # fmt: skip


@pytest.mark.parametrize("name", READY)
def test_ready_made_ones_are_logged_by_their_name(name: str) -> None:
    reward = getattr(rewards, name)
    assert isinstance(reward, rewards.Reward) and reward.__name__ == name
    assert pickle.loads(pickle.dumps(reward)).__name__ == name


def test_every_constraint_has_a_case() -> None:
    assert set(KEPT) == set(INSTRUCTIONS)


#: what each class needs besides, to be made
NEEDED = {
    "ClassInTagReward": {"tag": "answer", "labels": ["a"]},
    "LengthBandReward": {"low": 1, "high": 2, "largest": 3},
    "SoftOverlongReward": {"max_tokens": 9, "cache_tokens": 3},
    "ExponentialBudget": {"start": 9},
    "LinearBudget": {"start": 9, "end": 1},
    "NDecayBudget": {"start": 9, "end": 1, "decays": 2},
}
HUGE = [
    (room, name, argument)
    for room in ("hf_effi.rewards", "hf_effi.functional.rewards")
    for name, kinds in CLASSES[room].items()
    for argument, kind in kinds.items()
    if kind in ("number", "plain") and argument not in ("schema", "weights")
]


@pytest.mark.parametrize("value", [10**9, 10**400], ids=["1e9", "1e400"])
@pytest.mark.parametrize(("room", "name", "argument"), HUGE)
def test_a_huge_number_of_a_card_is_refused_when_it_is_made_or_costs_nothing(room, name, argument, value):
    """A card is somebody else's: no number of it may take the memory or the time of the reader, or end a run later."""
    try:
        thing = find(f"{room}:{name}", CLASSES)(**{**NEEDED.get(name, {}), argument: value})
    except ValueError:
        return
    if hasattr(thing, "at"):
        assert 1 <= thing.at(3, 10) <= 10**9
        return
    row = ["a"]
    columns = {"reference": row, "answer": row, "length": [3], "verifier": [None], "solution": row}
    columns["trainer_state"] = TrainerState()
    found = thing(completions=["a b"], completion_ids=[[1, 2]], **columns)
    assert len(found) == 1 and (found[0] is None or math.isfinite(found[0]))
