"""Votes, spans and few rows: hand-computed values, golden values of the specifications, edges."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_effi.data import MaskedSpanPrompts, repeat_rows
from hf_effi.errors import RewardError
from hf_effi.functional.data import MaskedSpan, draw_span, plain_span, seeded, word_span
from hf_effi.functional.rewards import answer_classes, generator_rewards, is_answer, majority_vote
from hf_effi.functional.rollouts import accuracy_spread, high_variance_rows, stacked_history
from hf_effi.protocols import RolloutGroups
from hf_effi.rewards import ExactSpanReward, MajorityVoteReward
from hf_effi.selection import FirstRowsPruner

NAN = math.nan


def as_number(one: str, other: str) -> bool:
    return float(one) == float(other)


def after_equals(text: str) -> str:
    return text.rpartition("=")[2]


# --- votes -----------------------------------------------------------------------------------------------------------


def test_the_golden_vote() -> None:
    vote = majority_vote(["a", "a", "b", "c"])
    assert vote.label == "a" and vote.ratio == 0.5 and vote.agrees == (True, True, False, False)
    assert vote.classes == 3 and vote.decided


@pytest.mark.parametrize("empty", ["", " \n", None, [], (), {}, NAN])
def test_an_empty_answer_never_wins(empty: Any) -> None:
    assert not is_answer(empty)
    vote = majority_vote([empty, empty, empty, "7"])
    assert vote.label == "7" and vote.ratio == 0.25 and vote.agrees == (False, False, False, True)
    nothing = majority_vote([empty] * 3)
    assert not nothing.decided and nothing.ratio == 0.0 and nothing.agrees == (False,) * 3 and nothing.classes == 0
    assert not majority_vote([]).decided


def test_zero_and_false_are_answers() -> None:
    assert majority_vote([0, 0, 1]).label == 0 and majority_vote([0, 0, 1]).decided
    assert majority_vote([False, False, True]).label is False and majority_vote([0.0, 1.0]).decided


def test_answers_are_grouped_by_what_the_verifier_says() -> None:
    answers = ["3", "2", "2.0", "", "2.00"]
    assert answer_classes(answers, as_number) == [0, 1, 1, None, 1]
    assert majority_vote(answers, as_number).label == "2" and majority_vote(answers, as_number).ratio == 0.6
    assert majority_vote(answers).label == "3"  # as texts all differ, and the first wins
    # Not transitive: each is compared with the first of a class.
    assert answer_classes([0, 1, 2], lambda first, other: abs(first - other) <= 1) == [0, 0, 1]
    # Answers that cannot be hashed.
    assert majority_vote([[1], [2], [2]]).label == [2]


def test_of_two_classes_of_one_size_the_first_seen_wins() -> None:
    assert majority_vote(["b", "a", "a", "b"]).label == "b" and majority_vote(["", "a", "b"]).label == "a"


def test_abstaining() -> None:
    assert majority_vote(["a", "a", "b"], min_ratio=0.67).label is None
    assert majority_vote(["a"] * 3 + ["b"] * 7, min_ratio=0.7).label == "b"  # 7 / 10 < 0.7 * 1 in binary
    assert majority_vote(["a", "a"], min_ratio=1.0).label == "a"
    # What cannot be read counts in the share.
    assert majority_vote(["a", "", ""], min_ratio=0.5).label is None
    for ratio in (-0.1, 1.1, NAN, True):
        with pytest.raises(ValueError, match="min_ratio="):
            majority_vote(["a"], min_ratio=ratio)


def call(
    reward: MajorityVoteReward, completions: list[Any], logged: dict[str, float] | None = None, **columns: Any
) -> Any:
    log = None if logged is None else logged.__setitem__
    return reward(["1+1="] * len(completions), completions, log_metric=log, **columns)


def test_the_reward_votes_in_each_group() -> None:
    reward = MajorityVoteReward(after_equals, group_size=2)
    found = reward(["a", "a", "b", "b", "c", "c"], ["1", "x=1", "=", "", "2", ""])
    assert found == [1.0, 1.0, None, None, 1.0, 0.0]
    messages = [[{"role": "assistant", "content": text}] for text in ("x=5", "5")]
    assert call(reward, messages) == [1.0, 1.0]
    assert reward.__name__ == "majority_vote_reward" and "majority_vote_reward" in repr(reward)
    assert MajorityVoteReward(after_equals, name="vote").__name__ == "vote"
    assert call(MajorityVoteReward(after_equals, min_ratio=0.6, group_size=4), ["1", "1", "2", "3"]) == [None] * 4


def test_true_answers_are_logged_and_never_rewarded() -> None:
    reward = MajorityVoteReward(after_equals, as_number, column="answer", group_size=2)
    completions = ["2", "2.0", "3", "3"]
    prompts = ["a", "a", "b", "b"]
    found, logs = [], []
    for truths in (["2", "2", "3", "3"], ["2", "2", "4", "4"], ["9"] * 4, [None] * 4):
        log: dict[str, float] = {}
        found.append(reward(prompts, completions, answer=truths, log_metric=log.__setitem__))
        logs.append(log)
    assert found == [[1.0] * 4] * 4
    assert [log.get("effi/label/accuracy") for log in logs] == [1.0, 0.5, 0.0, None]
    assert logs[0]["effi/label/majority_ratio"] == 1.0 and logs[0]["effi/label/abstained"] == 0.0
    assert logs[0]["effi/label/distinct_answers"] == 1.0
    with pytest.raises(RewardError, match="no column 'answer'.*leave out column="):
        call(reward, ["2", "2"])
    log = {}
    assert call(MajorityVoteReward(after_equals, group_size=2), ["", ""], log) == [None, None]
    assert log == {
        "effi/label/majority_ratio": 0.0, "effi/label/abstained": 1.0, "effi/label/distinct_answers": 0.0
    }  # fmt: skip


def test_it_pickles_and_copies() -> None:
    made = MajorityVoteReward(after_equals, as_number, 0.5, "answer", 2, "vote")
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert again.__name__ == "vote" and again.group_size == 2 and again.min_ratio == 0.5
        assert again(["p", "p"], ["1", "1.0"], answer=["1", "1"]) == [1.0, 1.0]


async def awaited(text: str) -> str:
    return text


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"extract": "="}, TypeError, "extract='='"),
        ({"extract": awaited}, TypeError, "not awaited"),
        ({"extract": after_equals, "same": 3}, TypeError, "same=3"),
        ({"extract": after_equals, "min_ratio": 2}, ValueError, "min_ratio=2"),
        ({"extract": after_equals, "column": ""}, ValueError, "column=''"),
        ({"extract": after_equals, "group_size": 0}, ValueError, "group_size=0"),
        ({"extract": after_equals, "name": 3}, ValueError, "name=3"),
    ],
)
def test_the_reward_refuses(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MajorityVoteReward(**arguments)


def test_the_first_rows_are_kept() -> None:
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    rewards = torch.tensor([[NAN, 1.0, 0.0, 1.0], [0.0, 1.0, NAN, NAN]])
    groups = RolloutGroups(rewards, torch.zeros(2, 4), torch.ones(2, 4), step=0, present=present)
    assert FirstRowsPruner(3).keep(groups).tolist() == [[True] * 3 + [False], [True, True, False, False]]
    assert FirstRowsPruner(1, adv_stats="full").keep(groups).sum(1).tolist() == [1, 1]
    assert FirstRowsPruner(3).adv_stats == "subset"
    for make, match in (
        (lambda: FirstRowsPruner(1), "keep=1"),
        (lambda: FirstRowsPruner(4, "none"), "adv_stats"),
        (lambda: FirstRowsPruner(5).check_group_size(4), "keep=5 completions of a group of 4"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


# --- few rows --------------------------------------------------------------------------------------------------------


def test_rows_of_high_variance_by_hand() -> None:
    history = [[0.0, 0.5, 1.0, NAN, 0.2], [1.0, 0.5, 0.5, 0.3, NAN], [0.5, 0.5, 0.0, NAN, 0.4]]
    spread = accuracy_spread(history)
    assert spread[:3].tolist() == pytest.approx([math.sqrt(1 / 6), 0.0, math.sqrt(1 / 6)])
    assert math.isnan(spread[3]) and float(spread[4]) == pytest.approx(0.1)
    assert high_variance_rows(history, 3) == [0, 2, 4]  # of two that are equal the first
    assert high_variance_rows(torch.tensor([[0.0, 0.0], [0.0, 1.0]])) == [1]


def test_a_row_that_never_moved_is_chosen_by_nothing() -> None:
    thirds = [[1 / 3, 0.1, 0.0]] * 7  # whose mean is rounded
    assert accuracy_spread(thirds).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="k=1 rows were asked for, and the accuracy of 0 of 3 changed"):
        high_variance_rows(thirds)
    for history in ([[0.0, 1.0]], torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="the accuracy of 0 of 2"):
            high_variance_rows(history)
    with pytest.raises(ValueError, match="k=0"):
        high_variance_rows([[0.0], [1.0]], 0)
    for bad in ([0.0, 1.0], [[math.inf]]):
        with pytest.raises(ValueError, match="history must be finite"):
            accuracy_spread(bad)  # type: ignore[arg-type]


def test_visits_become_a_table() -> None:
    table = stacked_history({2: [0.5, 1.0], 0: [0.25]}, 3)
    assert table.shape == (2, 3) and table[:, 2].tolist() == [0.5, 1.0] and float(table[0, 0]) == 0.25
    assert bool(table[:, 1].isnan().all()) and stacked_history({}, 2).shape == (0, 2)
    with pytest.raises(ValueError, match="row 3 was seen, and num_rows=3"):
        stacked_history({3: [1.0]}, 3)


def test_rows_are_repeated_in_turn() -> None:
    data = Dataset.from_dict({"prompt": ["a", "b", "c"]})
    assert repeat_rows(data, [2], 3)["prompt"] == ["c"] * 3 and repeat_rows(data, [0, 1], 4)["prompt"] == list("abab")
    for rows, count, match in (
        ([], 2, "at least one row"),
        ([1, 1], 2, "none of them twice"),
        ([3], 2, "row 3 is none"),
        ([-1], 2, "row -1 is none"),
        ([0, 1], 5, "count=5 is no multiple of 2 rows.*Use 4"),
        ([0], 0, "count=0"),
    ):
        with pytest.raises(ValueError, match=match):
            repeat_rows(data, rows, count)
    with pytest.raises(TypeError, match="a stream"):
        repeat_rows(data.to_iterable_dataset(), [0], 2)


# --- masked spans ----------------------------------------------------------------------------------------------------

TEXT = (
    'Der "Mond" (Ø 3474 km)\tumkreist  die Erde;\n\n'
    'the moon orbits the Earth in 27.3 days, and it is "tidally" locked.'
)


@pytest.mark.parametrize("seed", range(40))
def test_the_span_put_back_gives_the_text_to_the_byte(seed: int) -> None:
    span = draw_span(TEXT, (1, 4), seeded(seed), min_context=5, hidden_in="")
    assert span is not None
    before, after = span.masked("[mask]").split("[mask]")
    assert (before + span.answer + after).encode() == TEXT.encode()
    assert 1 <= len(span.answer.split()) <= 4
    wanted = f" {plain_span(span.answer)} "
    assert all(wanted not in f" {plain_span(part)} " for part in (before, after))


def test_spans_by_hand() -> None:
    assert word_span("a b c", 1, 2) == MaskedSpan("a b c", 2, 5) and word_span("a b c", 2, 2) is None
    assert word_span("so -- then", 1, 1) is None  # nothing but punctuation
    assert word_span("(half-life)", 0, 1).answer == "half-life"  # type: ignore[union-attr]
    assert plain_span("STRASSE, Straße!") == "strasse strasse" and plain_span("?!") == ""


def test_a_span_that_can_be_copied_is_not_taken() -> None:
    text = "Moon, moon and sun"
    hidden = {draw_span(text, (1, 1), seeded(s), min_context=0, hidden_in="and").answer for s in range(30)}  # type: ignore[union-attr]
    assert hidden == {"sun"}
    seen = {draw_span(text, (1, 1), seeded(s), min_context=0).answer for s in range(30)}  # type: ignore[union-attr]
    assert seen == {"Moon", "moon", "and", "sun"}
    assert draw_span("moon moon", (1, 1), seeded(0), min_context=0, hidden_in="") is None


def test_texts_without_room() -> None:
    assert draw_span("one two three", (2, 3), seeded(0), min_context=2) is None
    assert draw_span("one two three four", (2, 9), seeded(0), min_context=2).answer.count(" ") == 1  # type: ignore[union-attr]
    assert draw_span("one [mask] three", (1, 1), seeded(0), min_context=0) is None
    assert draw_span("", (1, 1), seeded(0), min_context=0) is None
    for words, context, match in (
        ((0, 1), 0, "words"),
        ((3, 2), 0, "fewest and the most"),
        ((1, 2), -1, "min_context"),
    ):
        with pytest.raises(ValueError, match=match):
            draw_span("a b", words, seeded(0), min_context=context)


def test_prompts_of_a_dataset(caplog: pytest.LogCaptureFixture) -> None:
    texts = [TEXT, "too short", TEXT.upper()]
    make = MaskedSpanPrompts((1, 3), per_text=3, min_context=5, seed=1)
    rows = make(Dataset.from_dict({"text": texts}))
    assert rows.column_names == ["prompt", "answer", "row"] and set(rows["row"]) == {0, 2}
    assert "left out 1 of 3 texts" in caplog.text
    for row in rows:
        assert row["prompt"].count("[mask]") == 2  # the question names it
        question, _, masked = row["prompt"].partition("\n\n")
        assert masked.replace("[mask]", row["answer"]) == texts[row["row"]] and "\\boxed{}" in question
        assert f" {plain_span(row['answer'])} " not in f" {plain_span(row['prompt'])} "
    assert len({(row["row"], row["prompt"]) for row in rows}) == len(rows)
    assert make([{"text": text} for text in texts])[:] == rows[:]  # the same draws
    assert MaskedSpanPrompts((1, 3), per_text=3, min_context=5, seed=2)([{"text": TEXT}])[:] != rows.select([0, 1])[:]
    braces = MaskedSpanPrompts(min_context=0, template="{text} {x}").rows_of("a {text} {mask} b")
    assert braces[0]["prompt"].replace("[mask]", braces[0]["answer"]) == "a {text} {mask} b {x}"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"words": 3}, "words=3"),
        ({"words": (3, 2)}, "fewest"),
        ({"words": (0, 2)}, r"words\[0\]=0"),
        ({"per_text": 0}, "per_text=0"),
        ({"min_context": -1}, "min_context=-1"),
        ({"hidden": 1}, "hidden=1"),
        ({"column": ""}, "column=''"),
        ({"mask": " "}, "mask=' '"),
        ({"template": "no text"}, "template must have"),
        ({"template": "[mask] {text}"}, "has the mask"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_prompts_refuse(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MaskedSpanPrompts(**arguments)


def test_prompts_without_a_text() -> None:
    with pytest.raises(ValueError, match="row 1 has no text in the column 'text': None"):
        MaskedSpanPrompts(min_context=0)([{"text": "a b"}, {"other": "x"}])
    with pytest.raises(ValueError, match="fits in any of 1 texts"):
        MaskedSpanPrompts()([{"text": "short"}])


def test_exact_spans() -> None:
    reward = ExactSpanReward()
    said = [r"\boxed{x} so \boxed{The Moon!}", "the moon", r"\boxed{}", r"\boxed{the moon", r"\boxed{{the} moon}"]
    assert reward(completions=said, answer=["the moon"] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert reward(completions=[r"\boxed{}", ""], answer=["--", "..."]) == [None, None]
    plain = ExactSpanReward("span", boxed=False, name="span")
    assert plain(completions=[" The  moon.", ""], span=["the moon"] * 2) == [1.0, 0.0] and plain.__name__ == "span"
    assert pickle.loads(pickle.dumps(plain))(completions=["a"], span=["A"]) == [1.0]
    hostile = r"\boxed{" * 20_000 + "{" * 20_000
    assert reward(completions=[hostile], answer=["a"]) == [0.0]
    with pytest.raises(RewardError, match="has 3, which is no text"):
        reward(completions=["x"], answer=[3])
    for arguments, match in (({"column": ""}, "column=''"), ({"boxed": 1}, "boxed=1")):
        with pytest.raises(ValueError, match=match):
            ExactSpanReward(**arguments)  # type: ignore[arg-type]


def test_the_golden_table_of_generators() -> None:
    assert generator_rewards([0, 1, 4, 8], tries=8) == [0.0, 0.875, 0.5, 0.0]
    for hits, tries, match in (([9], 8, r"hits\[0\]=9"), ([-1], 8, "hits"), ([0], 0, "tries=0"), ([0], True, "tries")):
        with pytest.raises(ValueError, match=match):
            generator_rewards(hits, tries)
