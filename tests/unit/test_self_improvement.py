"""Votes and lengths by hand; rounds of self-improvement with answerers that are plain functions."""

from __future__ import annotations

import json
import random

import pytest
import torch

from hf_effi.data import GreedyAnswers, SelfImprovement
from hf_effi.errors import MismatchError
from hf_effi.functional.data import keep_by_length, majority_answers
from tests.helpers import tiny_qwen3, tiny_tokenizer

BASE = [{"prompt": "ab>", "completion": "ab", "note": 1}, {"prompt": "c>", "completion": "c", "note": 2}]


def problem(level, rng):
    return "".join(rng.choice("abc") for _ in range(level)) + ">"


def copy(prompts):
    return [prompt[:-1] for prompt in prompts]


def build(folder, levels=(3, 4, 5), **over):
    return SelfImprovement(folder, BASE, problem, levels, **{"per_round": 6, "seed": 2, **over})


def test_majority_by_hand():
    voters = [["a", "a", "a", None, None], ["a", "b", "b", None, "c"], ["a", "a", "c", None, None]]
    assert majority_answers(voters, 0.5) == ["a", "a", None, None, None]
    assert majority_answers(voters, 2 / 3) == ["a", "a", None, None, None]
    assert majority_answers(voters, 0.7) == ["a", None, None, None, None]
    assert majority_answers(voters, 0.3) == ["a", "a", None, None, "c"]  # three answers tie in the third
    assert majority_answers([["x", None]]) == ["x", None]
    assert majority_answers([["x"], ["y"]], 0.5) == [None]
    assert majority_answers([[], []]) == []


def test_majority_refuses():
    for voters in ([], [["a"], ["a", "b"]]):
        with pytest.raises(ValueError, match="Voters gave"):
            majority_answers(voters)
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="min_agreement"):
            majority_answers([["a"]], share)


def test_lengths_by_hand():
    assert keep_by_length([5, 6, 4, 6], 0).tolist() == [False, True, False, True]
    assert keep_by_length([5, 6, 4, 6], 1).tolist() == [True, True, False, True]
    assert keep_by_length([3, 3], 0).tolist() == [True, True]
    assert keep_by_length([], 0).tolist() == []
    assert keep_by_length([9, 5, 5, 4], 0).tolist() == [True, False, False, False]
    assert keep_by_length([9, 5, 5, 4], 0, quantile=0.75).tolist() == [True, True, True, False]
    assert keep_by_length([9, 5, 5, 4], 0, quantile=0.01).all()
    for bad in (0, 1.1):
        with pytest.raises(ValueError, match="quantile"):
            keep_by_length([1], 0, bad)
    with pytest.raises(ValueError, match="slack"):
        keep_by_length([1], -1)


def test_rounds_mix_with_all_earlier_rows(tmp_path):
    improve = build(tmp_path)
    assert improve.checkpoint is None and not improve.done
    seen = []
    while not improve.done:
        rows = improve.extend(copy)
        seen.append(rows)
        improve.finish()
    assert [len(rows) for rows in seen] == [8, 14, 20]
    assert seen[2][:14] == seen[1] and seen[1][:8] == seen[0]
    assert seen[0][:2] == [
        {"prompt": "ab>", "completion": "ab", "round": 0},
        {"prompt": "c>", "completion": "c", "round": 0},
    ]
    for row in seen[2]:
        assert row["completion"] == row["prompt"][:-1]
        assert row["round"] == 0 or len(row["completion"]) == 2 + row["round"]
    assert [entry["accepted"] for entry in improve.history] == [6, 6, 6]
    with pytest.raises(ValueError, match="3 rounds are done"):
        improve.extend(copy)


def test_a_tuple_of_levels_shares_a_round(tmp_path):
    improve = build(tmp_path, levels=[(3, 5)])
    assert [len(row["completion"]) for row in improve.extend(copy)[2:]] == [3, 5, 3, 5, 3, 5]
    assert improve.history[0]["levels"] == ["3", "5"]


def test_filters_drop_what_was_planted_and_count_it(tmp_path):
    def flawed(prompts):
        answers = copy(prompts)
        answers[0], answers[1], answers[2] = None, answers[1][:-1], "zzzz"
        return answers

    improve = build(tmp_path, levels=[4], length_slack=0, keep=lambda prompt, answer: "z" not in answer)
    rows = improve.extend(flawed)
    counts = {"asked": 6, "unfinished": 1, "disagreed": 0, "short": 1, "rejected": 1, "accepted": 3}
    assert improve.history[0] == {"levels": ["4"], **counts}
    assert all(len(row["completion"]) == 4 and "z" not in row["completion"] for row in rows[2:])


def test_several_models_vote(tmp_path):
    def wrong_at(place):
        return lambda prompts: ["?" if p == place else a for p, a in enumerate(copy(prompts))]

    improve = build(tmp_path, levels=[4], min_agreement=0.6)
    rows = improve.extend(wrong_at(0), wrong_at(0), wrong_at(1))
    assert rows[2]["completion"] == "?"  # two of three agree, and nobody knows better
    assert [row["completion"] == row["prompt"][:-1] for row in rows[3:]] == [True] * 5
    other = build(tmp_path / "other", levels=[4], min_agreement=0.7)
    assert len(other.extend(wrong_at(0), wrong_at(0), wrong_at(1))) == 2 + 4
    assert other.history[0]["disagreed"] == 2


def test_levels_are_filtered_by_their_own_longest(tmp_path):
    improve = build(tmp_path, levels=[(3, 5)], length_slack=0)
    assert len(improve.extend(copy)) == 2 + 6


def test_one_run_on_answer_drops_a_level_unless_the_quantile_passes_over_it(tmp_path):
    def run_on(prompts):
        answers = copy(prompts)
        return [answers[0] * 3, *answers[1:]]

    paper = build(tmp_path / "paper", levels=[4], length_slack=0)
    robust = build(tmp_path / "robust", levels=[4], length_slack=0, length_quantile=0.8)
    assert len(paper.extend(run_on)) == 2 + 1 and len(robust.extend(run_on)) == 2 + 6


def test_restart_in_and_between_rounds_gives_the_same_rows(tmp_path):
    def never(prompts):
        raise AssertionError("answered again")

    whole = build(tmp_path / "whole")
    wanted = []
    while not whole.done:
        wanted.append(whole.extend(copy))
        whole.finish()
    first = build(tmp_path / "broken").extend(copy)
    again = build(tmp_path / "broken")  # stopped in the training of round 1
    assert again.finished == 0 and again.extend(never) == first == wanted[0]
    assert again.extend(never) == first and len(again.history) == 1
    again.finish()
    later = build(tmp_path / "broken")  # stopped between rounds
    assert later.finished == 1 and later.extend(copy) == wanted[1]
    # Stopped after the rows were written and before the state was.
    state = json.loads((tmp_path / "broken" / "state.json").read_text())
    state["history"].pop()
    (tmp_path / "broken" / "state.json").write_text(json.dumps(state))
    last = build(tmp_path / "broken")
    assert last.extend(never) == wanted[1] and len(last.history) == 2


def test_a_failed_answerer_leaves_the_round_open(tmp_path):
    def failing(prompts):
        raise RuntimeError("out of memory")

    improve = build(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        improve.extend(failing)
    with pytest.raises(ValueError, match="no round to finish"):
        improve.finish()
    with pytest.raises(MismatchError, match="other rows, levels or settings"):
        build(tmp_path, seed=3)
    assert len(build(tmp_path).extend(copy)) == 8


def test_levels_may_be_added_but_not_changed(tmp_path):
    improve = build(tmp_path, levels=(3,))
    improve.extend(copy)
    improve.finish()
    assert improve.done and not build(tmp_path, levels=(3, 4)).done
    for over in ({"levels": (4, 5)}, {"per_round": 7}, {"length_slack": 1}, {"exclude": ["a"]}, {"levels": ()}):
        with pytest.raises(MismatchError, match="other rows, levels or settings"):
            build(tmp_path, **{"levels": (3,), **over})


def test_nothing_accepted_ends_the_rounds(tmp_path):
    improve = build(tmp_path)
    assert improve.extend(lambda prompts: [None] * len(prompts)) == []
    assert improve.done and build(tmp_path).done
    assert improve.history[0]["unfinished"] == 6


def test_excluded_prompts_are_never_drawn(tmp_path):
    tests = {first + second + ">" for first in "abc" for second in "abc"} - {"ab>", "cc>"}
    improve = build(tmp_path, levels=(2,), exclude=tests)
    rows = improve.extend(copy)[2:]
    assert {row["prompt"] for row in rows} <= {"ab>", "cc>"}
    with pytest.raises(ValueError, match="in a row are excluded"):
        build(tmp_path / "none", levels=(1,), exclude=["a>", "b>", "c>"]).extend(copy)


def test_problems_depend_on_seed_and_round_alone(tmp_path):
    random.seed(0)
    first = build(tmp_path / "a").prompts(2)
    random.seed(1)
    assert build(tmp_path / "b").prompts(2) == first
    assert build(tmp_path / "c").prompts(1)[0][0] == 3
    assert build(tmp_path / "d", seed=5).prompts(2) != first


@pytest.mark.parametrize(
    "over, message",
    [
        ({"per_round": 0}, "per_round"),
        ({"min_agreement": 0}, "min_agreement"),
        ({"length_slack": -1}, "length_slack"),
        ({"length_quantile": 0}, "length_quantile"),
        ({"seed": -1}, "seed"),
        ({"levels": [()]}, "no level"),
    ],
)
def test_bad_settings(tmp_path, over, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **over)


def test_bad_rows_and_answerers(tmp_path):
    for row in ({"prompt": "a"}, {"prompt": "a", "completion": 3}):
        with pytest.raises(ValueError, match=r"rows\[1\]"):
            SelfImprovement(tmp_path, [BASE[0], row], problem, (3,), per_round=1)
    with pytest.raises(ValueError, match="somebody who answers"):
        build(tmp_path).extend()
    with pytest.raises(ValueError, match="5 answers to 6 prompts"):
        build(tmp_path).extend(lambda prompts: copy(prompts)[1:])


def test_greedy_answers_do_not_depend_on_the_batch():
    model, tokenizer = tiny_qwen3(end_tokens=10).train(), tiny_tokenizer()
    prompts = ["a", "abcdef", "12+3=", "zz", "q"]
    answers = GreedyAnswers(model, tokenizer, max_new_tokens=24, batch_size=5)(prompts)
    assert model.training
    assert answers == GreedyAnswers(model, tokenizer, max_new_tokens=24, batch_size=1)(prompts)
    assert answers == GreedyAnswers(model, tokenizer, max_new_tokens=24, batch_size=2)(prompts)
    ends = set(model.generation_config.eos_token_id)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            made = model.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        row = made[0, ids.shape[1] :].tolist()
        if not ends & set(row):
            assert answer is None
        else:
            assert answer == tokenizer.decode(row[:-1], skip_special_tokens=True)
    assert any(answers) and GreedyAnswers(model, tokenizer, max_new_tokens=1)([]) == []


def test_greedy_answers_refuse():
    model, tokenizer = tiny_qwen3(), tiny_tokenizer(fresh=True)
    with pytest.raises(ValueError, match="max_new_tokens"):
        GreedyAnswers(model, tokenizer, max_new_tokens=0)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad token"):
        GreedyAnswers(model, tokenizer, max_new_tokens=4)
