"""The demo's task: generator, verifier, held-out set, tokenizer, by values computed by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from hf_effi.demo.task import (
    MAX_COMPLETION_TOKENS,
    build_tokenizer,
    demonstration,
    exact_answer_reward,
    final_number,
    held_out_problems,
    make_problem,
    sample_problem,
    training_problems,
)


def test_problem_by_hand():
    problem = make_problem([7, 3, 3, 9], "-++")
    assert (problem.prompt, problem.answer, problem.terms) == ("7-3+3+9=", 16, 4)
    assert problem.worked == "4+3+9=7+9=16"
    assert make_problem([2, 5], "+").worked == "7"


@pytest.mark.parametrize(
    "numbers, signs, message", [([1, 2], "++", "signs"), ([1], "", "signs"), ([1, 5], "-", "below")]
)
def test_impossible_problems_are_refused(numbers, signs, message):
    with pytest.raises(ValueError, match=message):
        make_problem(numbers, signs)


def test_generated_problems_are_right_and_of_the_asked_length():
    rng = random.Random(3)
    for _ in range(500):
        problem = sample_problem(rng, 2, 8)
        assert eval(problem.prompt[:-1]) == problem.answer >= 0
        assert 2 <= problem.terms <= 8 and len(problem.prompt) == 2 * problem.terms
        steps = problem.worked.split("=")
        assert [eval(step) for step in steps] == [problem.answer] * (problem.terms - 1)
        assert final_number(problem.worked) == problem.answer
        assert len(problem.worked) + 1 <= MAX_COMPLETION_TOKENS


@pytest.mark.parametrize(
    "text, number",
    [
        ("4+3+9=7+9=16", 16),
        ("16", 16),
        ("~23", 23),
        ("007", 7),
        ("", None),
        ("=", None),
        ("4+3=", None),
        ("4+3", None),
        ("4~16", None),
        ("=-3", None),
        ("16 ", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_reward_is_exact_and_takes_the_columns_trl_passes():
    rewards = exact_answer_reward(["7+9=16", "~16", "~17", "7+9="], answer=[16] * 4, prompts=["7+9="] * 4, extra=1)
    assert rewards == [1.0, 1.0, 0.0, 0.0]


def test_reward_refuses_a_wrong_number_of_answers():
    with pytest.raises(ValueError):
        exact_answer_reward(["1", "2"], answer=[1])


def test_held_out_set_is_fixed_balanced_and_disjoint_from_training():
    held_out = held_out_problems(40)
    assert held_out == held_out_problems(40)
    assert [problem.terms for problem in held_out] == [terms for terms in range(2, 9) for _ in range(40)]
    prompts = {problem.prompt for problem in held_out}
    assert len(prompts) == len(held_out)
    drawn = list(itertools.islice(training_problems(0, held_out), 3000))
    assert prompts.isdisjoint(problem.prompt for problem in drawn)
    assert drawn == list(itertools.islice(training_problems(0, held_out), 3000))
    assert {problem.terms for problem in drawn} == set(range(2, 9))


@pytest.mark.parametrize("per_length", [0, 71])
def test_held_out_set_size_is_checked(per_length):
    with pytest.raises(ValueError, match="1..70"):
        held_out_problems(per_length)


def test_demonstrations_mix_guesses_and_worked_solutions():
    rng, problem = random.Random(0), make_problem([7, 3], "-")
    assert demonstration(problem, rng, 0.0) == "4"
    assert all(demonstration(problem, rng, 1.0).startswith("~") for _ in range(20))
    lazy = sum(demonstration(problem, rng, 0.3).startswith("~") for _ in range(2000))
    assert abs(lazy / 2000 - 0.3) < 0.04


def test_tokenizer_has_one_token_a_character_and_survives_a_round_trip(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer()
    assert len(tokenizer) == 16
    ids = tokenizer("7-3=4")["input_ids"]
    assert len(ids) == 5 and tokenizer.decode(ids) == "7-3=4"
    batch = tokenizer(["1+1=", "10"], padding=True)
    assert batch["input_ids"][1][:2] == [tokenizer.pad_token_id] * 2  # padded on the left
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("7-3=4")["input_ids"] == ids and again.eos_token_id == tokenizer.eos_token_id
