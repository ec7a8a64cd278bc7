"""Naive Bayes by hand; stages, threshold, queue and predictor of the multistage sampler, without a model."""

from __future__ import annotations

import math

import pytest
import torch

from hf_effi.errors import MismatchError
from hf_effi.functional.data import BernoulliBayes
from hf_effi.samplers import MultistageSampler

# Token 0 stands in easy rows, token 1 in hard ones, token 2 in all.
TOKENS = [[0, 2, 2] if row % 2 else [1, 2] for row in range(40)]


def losses_of(rows, shift=0.0):
    return [shift + (0.1 if row % 2 else 3.0) for row in rows]


def build(**over):
    settings = {"window": 17, "num_samples": 6, "warmup_rounds": 1, "threshold_rows": 6, "switch_rows": 10}
    return MultistageSampler(TOKENS, lambda model, rows: losses_of(rows), **{**settings, **over})


def play(sampler, rounds, first=0):
    """Serve rounds as a Trainer does, and return what was served and what was forwarded."""
    served, forwarded = [], []
    for epoch in range(first, rounds):
        sampler.set_epoch(epoch)
        rows = sampler.rows_to_measure(epoch)
        sampler.observe(epoch, losses_of(rows))
        served.append(list(sampler))
        forwarded.append(rows)
    return served, forwarded


def test_naive_bayes_by_hand():
    bayes = BernoulliBayes(2)
    # Nothing seen: a coin.
    assert bayes.log_probabilities([[0], []]).exp().flatten().tolist() == pytest.approx([0.5] * 4)
    bayes.update([[0, 0], [0], [1]], [True, True, False])
    # P(1) = 3/5, p(0|1) = 3/4, p(1|1) = 1/4; P(0) = 2/5, p(0|0) = 1/3, p(1|0) = 2/3. For the row [0]:
    one, zero = 3 / 5 * 3 / 4 * 3 / 4, 2 / 5 * 1 / 3 * 1 / 3
    found = bayes.log_probabilities([[0]])[0]
    assert found.tolist() == pytest.approx([math.log(zero / (one + zero)), math.log(one / (one + zero))])
    # An empty row is told from the absent tokens: 3/5 * 1/4 * 3/4 against 2/5 * 2/3 * 1/3.
    one, zero = 3 / 5 * 1 / 4 * 3 / 4, 2 / 5 * 2 / 3 * 1 / 3
    assert bayes.log_probabilities([[]])[0, 1].exp().item() == pytest.approx(one / (one + zero))


def test_naive_bayes_learns_row_by_row_and_has_a_state():
    at_once, in_turn = BernoulliBayes(3, alpha=0.5), BernoulliBayes(3, alpha=0.5)
    rows, labels = [[0, 2], [1], torch.tensor([2, 2])], [True, False, True]
    at_once.update(rows, labels)
    for row, label in zip(rows, labels, strict=True):
        in_turn.update([row], [label])
    in_turn.update([], [])
    assert torch.equal(at_once.log_probabilities(rows), in_turn.log_probabilities(rows))
    copy = BernoulliBayes(3, alpha=0.5)
    copy.load_state_dict(at_once.state_dict())
    at_once.update([[0]], [False])
    assert torch.equal(copy.log_probabilities(rows), in_turn.log_probabilities(rows))
    assert copy.log_probabilities([]).shape == (0, 2)


def test_naive_bayes_refuses():
    bayes = BernoulliBayes(3)
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        bayes.update([[0], [1]], [True])
    for row in ([3], [-1]):
        with pytest.raises(ValueError, match="outside"):
            bayes.update([row], [True])
    with pytest.raises(ValueError, match="alpha"):
        BernoulliBayes(3, alpha=0)
    with pytest.raises(ValueError, match="num_tokens"):
        BernoulliBayes(0)
    with pytest.raises(MismatchError, match="4 tokens"):
        bayes.load_state_dict(BernoulliBayes(4).state_dict())


def test_rounds_walk_through_the_stream():
    sampler = build()
    walked = [row for epoch in range(5) for row in sampler.candidates(epoch)]
    assert [len(sampler.candidates(epoch)) for epoch in range(3)] == [6, 17, 17]
    assert sorted(walked[:40]) == list(range(40))  # one pass: 6 + 17 + 17
    assert walked[40:] != walked[:34] and len(set(walked[40:])) == 34  # the next pass, in another order
    assert sampler.candidates(3) == build().candidates(3)
    assert sampler.candidates(3) != build(seed=1).candidates(3)


def test_stages():
    sampler = build()
    served, forwarded = play(sampler, 5)
    # Stage 0: all of the stream, unmeasured.
    assert sorted(served[0]) == sorted(sampler.candidates(0)) and forwarded[0] == []
    # Stage 1: all are forwarded; the threshold is the mean of the first 6.
    assert forwarded[1] == sampler.candidates(1)
    first = losses_of(forwarded[1][:6])
    assert sampler.threshold == pytest.approx(sum(first) / 6)
    assert all(row % 2 == 0 for row in served[1])
    # Ten rows told the predictor enough: from here on easy rows are not forwarded.
    assert [entry["stage"] for entry in sampler.history] == [0, 1, 2, 2, 2]
    for epoch in (2, 3, 4):
        assert forwarded[epoch] and all(row % 2 == 0 for row in forwarded[epoch])
        assert all(row % 2 == 0 for row in served[epoch])
    assert all(len(order) == 6 for order in served)


def test_the_threshold_stays():
    sampler = build(switch_loss=0.0)
    play(sampler, 2)
    before = sampler.threshold
    sampler.set_epoch(2)
    sampler.observe(2, losses_of(sampler.rows_to_measure(2), shift=5.0))
    assert sampler.threshold == before
    assert sampler.history[-1]["hard"] == sampler.history[-1]["forwarded"]  # all above the old threshold
    assert sampler.stage == 1  # 0 nats are never reached


def test_hard_rows_wait_for_the_next_round():
    sampler = build(num_samples=4, warmup_rounds=0, switch_loss=0.0)
    served, forwarded = play(sampler, 2)
    hard = [row for rows in forwarded for row in rows if row % 2 == 0]
    assert sorted(served[0]) == sorted(hard[:4]) and sorted(served[1]) == sorted(hard[4:8])
    waiting = sampler.history[0]["waiting"]
    assert waiting == sampler.history[0]["hard"] - 4 > 0
    assert not set(forwarded[1]) & set(hard[4 : 4 + waiting])  # known to be hard: not forwarded again


def test_a_round_with_too_few_hard_rows_is_filled_with_the_hardest_of_the_others():
    sampler = MultistageSampler([[0]] * 6, lambda model, rows: [], window=6, num_samples=4, warmup_rounds=0)
    rows = sampler.rows_to_measure(0)
    sampler.observe(0, [9.0, 1.0, 4.0, 3.0, 2.0, 0.0])  # mean 3.17: two above it
    assert sorted(sampler) == sorted([rows[0], rows[2], rows[3], rows[4]])
    assert sampler.history[0] == {
        "stage": 1,
        "candidates": 6,
        "forwarded": 6,
        "hard": 2,
        "waiting": 0,
        "filled": 2,
    }


def test_equal_losses_train_all_the_same():
    sampler = MultistageSampler([[0]] * 4, lambda model, rows: [], window=4, num_samples=4, warmup_rounds=0)
    sampler.observe(0, [1.0] * 4)
    assert sorted(sampler) == [0, 1, 2, 3] and sampler.history[0]["hard"] == 0


def test_a_predictor_that_skips_everything_leaves_an_unfiltered_round():
    sampler = build(warmup_rounds=0)
    play(sampler, 1)
    sampler.predictor.update([[0], [1], [2]] * 200, [False] * 600)
    sampler.set_epoch(1)
    sampler.waiting = []
    assert sampler.stage == 2 and sampler.rows_to_measure(1) == []
    sampler.observe(1, [])
    assert sorted(sampler) == sorted(sampler.candidates(1)[:6])


def test_resume_gives_the_same_rounds():
    whole, first, second = build(), build(), build()
    served, forwarded = play(whole, 5)
    one = play(first, 2)
    second.load_state_dict(first.state_dict())
    assert list(second) == one[0][-1]  # the interrupted round, without measuring again
    two = play(second, 5, first=2)
    assert one[0] + two[0] == served and one[1] + two[1] == forwarded
    assert second.history == whole.history and second.threshold == whole.threshold
    for other in (build(seed=1), build(window=16), build(switch_loss=0.1)):
        with pytest.raises(MismatchError):
            other.load_state_dict(first.state_dict())
    changed = MultistageSampler(
        [[1], *TOKENS[1:]], lambda m, r: [], window=17, num_samples=6, threshold_rows=6, switch_rows=10
    )
    with pytest.raises(MismatchError):
        changed.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "over, message",
    [
        ({"window": 41}, "window=41"),
        ({"window": 0}, "window=0"),
        ({"num_samples": 18}, "num_samples=18"),
        ({"num_samples": 0}, "num_samples"),
        ({"warmup_rounds": -1}, "warmup_rounds"),
        ({"threshold_rows": 0}, "threshold_rows"),
        ({"switch_loss": -0.1}, "switch_loss"),
        ({"switch_loss": float("nan")}, "switch_loss"),
        ({"switch_rows": 0}, "switch_rows"),
    ],
)
def test_bad_settings(over, message):
    with pytest.raises(ValueError, match=message):
        build(**over)


def test_bad_rows():
    with pytest.raises(ValueError, match="num_rows"):
        MultistageSampler([], lambda m, r: [], window=1, num_samples=1)
    with pytest.raises(ValueError, match="negative"):
        MultistageSampler([[-1]], lambda m, r: [], window=1, num_samples=1)
    MultistageSampler([[], []], lambda m, r: [], window=1, num_samples=1)
    sampler = build(warmup_rounds=0)
    with pytest.raises(ValueError, match="NaN"):
        sampler.observe(0, [math.nan] * 17)
    with pytest.raises(ValueError, match="17 rows"):
        sampler.observe(0, [1.0])
