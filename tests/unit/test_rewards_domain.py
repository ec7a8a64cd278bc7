"""Classes in tags, lengths, judges held in check, presets, rewards of steps, labels of steps."""

from __future__ import annotations

import asyncio
import math
import pickle
from typing import Any

import pytest
import torch

from hf_effi.data import StepLabelCollator
from hf_effi.errors import RewardError
from hf_effi.functional.rewards import length_band, text_in_tag
from hf_effi.functional.rollouts import aggregate_steps
from hf_effi.rewards import (
    CappedReward,
    ClassInTagReward,
    GatedReward,
    LengthBandReward,
    StepReward,
    classification,
    long_form,
    structured,
)
from hf_effi.selection.rewards import is_async
from tests.helpers import tiny_tokenizer


def judge(completions: list[str], seen: list[str] | None = None, **columns: Any) -> list[float | None]:
    if seen is not None:
        seen += completions
    if callable(log_extra := columns.get("log_extra")):
        log_extra("judged", [len(text) for text in completions])
    return [None if "?" in text else 0.9 for text in completions]


async def slow_judge(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [0.9 for _ in completions]


def formatted(completions: list[str], **columns: Any) -> list[float]:
    return [float(text.startswith("<think>") and text.endswith("</class>")) for text in completions]


def words_of(text: str) -> list[str]:
    return text.split()


def even(steps: list[list[str]]) -> list[list[float]]:
    return [[float(step) for step in one] for one in steps]


# --- pure ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, value", [(50, 0.5), (100, 1), (200, 1), (300, 0.5), (400, 0), (0, 0), (401, 0)])
def test_length_band(length: int, value: float):
    assert length_band(length, 100, 200, 400) == value


@pytest.mark.parametrize("band", [(0, 1, 2), (3, 2, 4), (1, 2, 2), (1, 2, math.inf), ("a", 2, 3)])
def test_a_band_in_the_wrong_order_is_refused(band: Any):
    with pytest.raises((ValueError, TypeError)):
        length_band(1, *band)


def test_one_tag_and_only_one():
    assert text_in_tag("a <c>  x\ny </c> b", "c") == "x\ny"
    for text in ("<c>x", "x</c>", "</c>x<c>", "<c>x</c><c>x</c>", "<c>x</c></c>", "<C>x</C>", ""):
        assert text_in_tag(text, "c") is None
    with pytest.raises(ValueError, match="must be letters, digits"):
        text_in_tag("", "a>")


# --- classes and lengths ---------------------------------------------------------------------------------------------


def test_the_right_class_and_nothing_for_a_missing_tag():
    """A missing tag is no prediction: not the first class, which would be right wherever that is the answer."""
    reward = ClassInTagReward("class", ["up", "down"])
    texts = ["<class> UP </class>", "up", "", "<class>down</class>", "<class>left</class>", "<class>up</class>"]
    assert reward(completions=texts, answer=["up"] * 6) == [1, 0, 0, 0, 0, 1]
    assert reward(completions=texts[:2], answer=[0, None]) == [1, None]
    for wrong in ("left", 2, True, 0.5):
        with pytest.raises(RewardError, match="is none of"):
            reward(completions=["x"], answer=[wrong])


def test_lengths_in_tokens_and_words_with_a_band_for_each_row():
    assert LengthBandReward(2, 4, 8)(completions=["", "x"], completion_ids=[[1], [1] * 6]) == [0.5, 0.5]
    reward = LengthBandReward("low", "high", 8, "words")
    assert reward(completions=["a", "a b c", "a"], low=[2, 1, None], high=[4, 2, 4]) == [
        0.5,
        pytest.approx(5 / 6),
        None,
    ]
    with pytest.raises(RewardError, match="length_band_reward: The band must have low <= high < largest"):
        reward(completions=["a"], low=[3], high=[2])
    with pytest.raises(RewardError, match="'completion_ids'"):
        LengthBandReward(2, 4, 8)(completions=["a"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassInTagReward("a b", ["x"]),
        lambda: ClassInTagReward("a", []),
        lambda: ClassInTagReward("a", "xy"),
        lambda: ClassInTagReward("a", ["x", " X "]),
        lambda: ClassInTagReward("a", ["x"], ""),
        lambda: LengthBandReward(2, 1, 3),
        lambda: LengthBandReward(0, "high", 3),
        lambda: LengthBandReward(1, 2, 3, "letters"),
        lambda: CappedReward(judge, []),
        lambda: CappedReward(judge, ["("]),
        lambda: CappedReward(judge, ["a"], math.nan),
        lambda: GatedReward(judge, judge, math.inf),
        lambda: classification(["x"], formatted, judge=judge),
        lambda: classification(["x"], formatted, patterns=["a"]),
        lambda: classification(["x"], formatted, cap=0.3),
        lambda: StepReward(even, how="max"),
        lambda: StepReward(even, outcome=judge),
        lambda: StepReward(even, how="decayed"),
        lambda: StepReward(slow_judge),
        lambda: StepReward(even, "("),
        lambda: StepLabelCollator(tiny_tokenizer(), 0),
        lambda: StepLabelCollator(tiny_tokenizer(), separator=None),  # type: ignore[arg-type]
        lambda: StepLabelCollator(object()),
    ],
)
def test_wrong_arguments_are_refused_when_it_is_made(make: Any):
    with pytest.raises(ValueError):
        make()


def test_what_cannot_be_called_is_refused():
    for make in (lambda: CappedReward(3, ["a"]), lambda: GatedReward(judge, on=3), lambda: StepReward(3)):
        with pytest.raises(TypeError, match="must be a reward function"):
            make()


# --- judges ----------------------------------------------------------------------------------------------------------


def test_a_judge_is_capped():
    reward = CappedReward(judge, ["overall"], cap=0.4)
    assert reward(completions=["fine", "overall fine", "overall?"]) == [0.9, 0.4, None]


def test_a_gate_calls_the_judge_for_right_ones_only():
    seen: list[str] = []
    shown: dict[str, list[Any]] = {}
    right = ClassInTagReward("c", ["x", "y"])
    texts = ["<c>x</c>", "<c>y</c>", "<c>x</c>?", "<c>x</c>"]
    arguments = {"completions": texts, "answer": ["x", "x", "x", None], "seen": seen, "log_extra": shown.__setitem__}
    assert GatedReward(judge, on=right)(**arguments) == [0.9, 0, None, None]
    assert seen == [texts[0], texts[2]] and shown == {"judged": [8, None, 9, None]}
    seen.clear()
    assert GatedReward(judge, on=right)(completions=["x"], answer=["x"], seen=seen) == [0.0] and seen == []
    assert GatedReward(judge, on=right, least=-1)(completions=["q"], answer=["x"]) == [0.9]


def test_an_asynchronous_judge_is_awaited_and_pickles():
    capped = CappedReward(slow_judge, ["overall"])
    gated = GatedReward(capped, on=ClassInTagReward("c", ["x"]), name="checked")
    plain = GatedReward(judge, on=formatted)
    assert is_async(capped) and is_async(gated) and is_async(GatedReward(reward=judge, on=slow_judge))
    assert not is_async(plain) and not is_async(CappedReward(judge, ["a"]))
    assert (capped.__name__, gated.__name__, plain.__name__) == ("capped_reward", "checked", "gated_reward")
    again = pickle.loads(pickle.dumps(gated))
    texts = ["overall <c>x</c>", "<c>x</c>", "x"]
    assert asyncio.run(again(completions=texts, answer=["x"] * 3)) == [0.4, 0.9, 0.0]
    assert pickle.loads(pickle.dumps(plain))(completions=["no"]) == [0.0]


def test_what_a_judge_returns_is_checked():
    for values, words in (
        ([1.0, 2.0], "more than 1"),
        ([], "returned 0 values"),
        ("1", "not one number"),
        (["1"], "finite"),
    ):
        with pytest.raises(RewardError, match=words):
            CappedReward(lambda completions, values=values, **columns: values, ["a"])(completions=["x"])
    with pytest.raises(RewardError, match="needs completions="):
        CappedReward(judge, ["a"])()
    wrapped = CappedReward(lambda completions, **columns: slow_judge(completions), ["a"])
    with pytest.raises(RewardError, match="a function that is not asynchronous"):
        wrapped(completions=["x"])


# --- presets ---------------------------------------------------------------------------------------------------------


def test_time_master():
    texts = [
        "<think>a</think><class>up</class>",
        "<think>a</think> up",
        "<think>a</think><class>down</class>",
        "overall <class>up</class>",
    ]
    plain = classification(["up", "down"], formatted)
    judged = classification(["up", "down"], formatted, judge=judge, patterns=["overall"])

    def total(preset: Any) -> list[float]:
        rewards = [fn(completions=texts, answer=["up"] * 4) for fn in preset.trainer["reward_funcs"]]
        return [
            sum(w * r for w, r in zip(preset.config["reward_weights"], row, strict=True))
            for row in zip(*rewards, strict=True)
        ]

    assert total(plain) == pytest.approx([1.0, 0.0, 0.1, 0.9])
    assert total(judged) == pytest.approx([1.45, 0.0, 0.1, 1.1])
    assert plain.config | {"reward_weights": 0} == {
        "num_generations": 5, "learning_rate": 1e-6, "beta": 0.01, "reward_weights": 0
    }  # fmt: skip
    pickle.loads(pickle.dumps(judged))


def test_long_writer_and_structured():
    preset = long_form(100, 200, 400, quality=judge, format_reward=formatted)
    assert preset.config["multi_objective_aggregation"] == "normalize_then_sum"
    assert preset.config["reward_weights"] == pytest.approx([1 / 3] * 3)
    assert [fn.__name__ for fn in preset.trainer["reward_funcs"]] == ["length_band_reward", "judge", "formatted"]
    made = structured({"type": "integer"}, column="answer", name="js")
    assert [fn.__name__ for fn in made.trainer["reward_funcs"]][:2] == ["js", "js_valid"] and made.config == {}


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, value", [("min", 0.5), ("prod", 0.36), ("mean", 0.7333), ("last", 0.8), ("log_mean", 0.36 ** (1 / 3))]
)
def test_golden_aggregates(how: str, value: float):
    reward = StepReward(even, r"\s", how)
    assert reward(completions=["0.9 0.5 0.8", "", " "]) == [pytest.approx(value, abs=5e-5), None, None]
    assert pickle.loads(pickle.dumps(StepReward(even, words_of, how)))(completions=["0.25"]) == [pytest.approx(0.25)]


def test_golden_decayed():
    def outcome(completions: list[str], **columns: Any) -> list[float | None]:
        return [1.0, -1.0, None, 0.5]

    found = StepReward(even, r"\s", "decayed", outcome)(completions=["1 1 -1", "1 -1", "1", ""])
    assert found == [pytest.approx(0.7778, abs=5e-5), pytest.approx(-0.25), None, 0.5]


def test_the_geometric_mean_of_many_steps_does_not_vanish():
    scores, there = torch.full((2, 400), 0.1, dtype=torch.double), torch.ones(2, 400, dtype=torch.bool)
    there[1, 1:] = False
    assert aggregate_steps(scores, there, "log_mean").tolist() == pytest.approx([0.1, 0.1])
    assert float(aggregate_steps(scores, there, "prod")[0]) == 0.0
    assert float(aggregate_steps(torch.tensor([0.0, 0.5]), torch.tensor([True, True]), "log_mean")) == 0.0
    with pytest.raises(ValueError, match="needs scores >= 0"):
        aggregate_steps(torch.tensor([-0.5]), torch.tensor([True]), "log_mean")


def test_a_step_without_a_score_leaves_the_reward_out():
    for missing in (None, math.nan):
        for how in ("min", "last", "mean"):
            reward = StepReward(lambda steps, missing=missing: [[missing, 1.0], [1.0]], r"\s", how)
            assert reward(completions=["a b", "c"]) == [None, 1.0]


def test_what_a_scorer_returns_is_checked():
    for values, words in (
        ([[1.0]], "not one list of numbers"),
        ([[1.0], [1.0]], "1 scores for 2 steps"),
        ("ab", "not one"),
    ):
        with pytest.raises(RewardError, match=words):
            StepReward(lambda steps, values=values: values, r"\s")(completions=["a b", "c"])
    with pytest.raises(RewardError, match="not a list of texts"):
        StepReward(even, len)(completions=["a"])  # type: ignore[arg-type]
    assert StepReward(even)(completions=[]) == []


def test_labels_stand_at_the_last_token_of_each_step():
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "12", "completions": ["345", "6"], "labels": [1, 0]},
        {"prompt": "", "completions": ["7"], "labels": [None]},
    ]
    made = StepLabelCollator(tokenizer, separator="")(rows)
    assert made["labels"].tolist() == [[-100, -100, -100, -100, 1, 0], [-100] * 6]  # padded on the left, as it says
    assert made["attention_mask"].sum(1).tolist() == [6, 1]
    assert tokenizer.decode(made["input_ids"][0]) == "123456"
    cut = StepLabelCollator(tokenizer, max_length=4, separator="")(rows)
    assert cut["labels"].tolist() == [[-100] * 4] * 2
    for row, words in (
        ({"prompt": "1"}, "has no completions, labels"),
        ({"prompt": "1", "completions": ["2"], "labels": []}, "0 labels for 1 steps"),
        ({"prompt": "1", "completions": [""], "labels": [1]}, "has no token"),
    ):
        with pytest.raises(ValueError, match=words):
            StepLabelCollator(tokenizer, separator="")([row])
