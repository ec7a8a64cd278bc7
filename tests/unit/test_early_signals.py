"""Rank correlations by hand, what a metric says early, and choices by their likelihood."""

import math

import pytest
import torch

from hf_effi.functional.cloze import cloze_accuracy, cloze_choices
from hf_effi.functional.early_signals import (
    Tau,
    kendall,
    noise_of,
    rank_metrics,
    ranks,
    spearman,
    tau_with_interval,
    value_at,
)

S = [0.1, 0.12, 0.11, 0.2, 0.3]


def test_the_golden_correlations():
    assert spearman(range(5), S) == pytest.approx(0.9, abs=1e-12)
    assert kendall(range(5), S) == pytest.approx(0.8, abs=1e-12)
    assert spearman(range(5), S[::-1]) == pytest.approx(-0.9) and kendall(range(5), S[::-1]) == pytest.approx(-0.8)


def test_ties():
    assert ranks([3.0, 1.0, 3.0, 3.0]) == [3.0, 1.0, 3.0, 3.0]
    # Pairs: 6; one tie on the left; of the other five all agree: 5 / sqrt(5 * 6).
    assert kendall([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(30))
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("rule", [spearman, kendall])
def test_nothing_constant_and_one_value_are_no_order(rule):
    assert rule([], []) == rule([1.0], [2.0]) == rule([1, 2, 3], [5, 5, 5]) == 0.0
    with pytest.raises(ValueError, match="1 and 2 values"):
        rule([1], [1, 2])
    with pytest.raises(ValueError, match="must be finite"):
        rule([1, math.nan], [1, 2])


def test_few_runs_have_no_tau():
    assert tau_with_interval([1, 2, 3, 4], [1, 2, 3, 4]) == Tau(None)
    assert tau_with_interval([1, 2, 3, 4, 5], [2, 2, 2, 2, 2]) == Tau(None)
    found = tau_with_interval([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5])
    assert found.value == pytest.approx(13 / 15) and -1 <= found.low < found.value <= found.high == 1
    assert found == tau_with_interval([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5]), "the draws have a seed"
    with pytest.raises(ValueError, match="draws=3"):
        tau_with_interval([1, 2], [1, 2], draws=3)


def test_noise_and_values_of_a_curve():
    assert noise_of({}) == noise_of({1: 2.0, 2: 3.0}) == noise_of({1: 1.0, 2: 2.0, 3: 3.0}) == 0
    # 0 1 0 1: slope 0.2, differences 0.8 -1.2 0.8, whose standard deviation is sqrt(4 / 3)
    assert noise_of({1: 0.0, 2: 1.0, 3: 0.0, 4: 1.0}) == pytest.approx(math.sqrt(4 / 3))
    assert value_at({10: 3.0, 100: 1.0}, 0.1) == 3.0 and value_at({10: 3.0, 100: 1.0}, 0.09) is None


def runs_of(count=6, steps=20):
    """Losses that cross at a quarter of the run, a metric that is in order from the start, and a constant one."""
    found = []
    for run in range(count):
        found.append(
            {
                "eval_loss": {t: 3 - run * (t - 5.5) / steps + 0.01 * (-1) ** t for t in range(1, steps + 1)},
                "eval_cloze": {t: run + t / steps for t in range(1, steps + 1)},
                "eval_flat": dict.fromkeys(range(1, steps + 1), 0.25),
                "eval_late": dict.fromkeys(range(15, steps + 1), 1.0),
            }
        )
    return found


def test_metrics_are_ranked_by_what_they_say_early():
    cloze, loss, flat = rank_metrics(runs_of(), draws=50)
    assert [one.name for one in (cloze, loss, flat)] == ["eval_cloze", "eval_loss", "eval_flat"]
    assert cloze.ranking == Tau(1.0, 1.0, 1.0) and cloze.earliest == cloze.earliest_surely == 0.05
    assert cloze.monotonicity == 1 and cloze.signal_to_noise == math.inf and cloze.quality == 1
    assert cloze.score == pytest.approx(0.5 + 0.1) and cloze.to_target.value == -1  # more is less loss
    assert loss.ranking.value == -1 and loss.earliest == 0.3, "the losses cross after update 5 of 20"
    assert loss.score == pytest.approx(0.5 * loss.quality)
    assert (flat.monotonicity, flat.signal_to_noise, flat.spread, flat.quality) == (0, 0, 0, 0)
    assert not flat.has_signal and loss.has_signal and flat.ranking == Tau(None) and flat.score is None


def test_few_runs_are_ranked_without_tau():
    found = rank_metrics(runs_of(4))
    assert {one.ranking for one in found} == {Tau(None)} and {one.earliest for one in found} == {None}
    assert found[0].name == "eval_cloze" and found[0].score is None


@pytest.mark.parametrize(
    ("runs", "options", "words"),
    [
        (runs_of(1), {}, "1 runs cannot be ordered"),
        (runs_of(2), {"early": 1.0}, "early=1.0"),
        (runs_of(2), {"target": "eval_bleu"}, "never logged 'eval_bleu'"),
        ([{"eval_loss": {1: 1.0, 2: math.nan}}] * 2, {}, "No metric was logged 5 times in every run, and by 10%"),
    ],
)
def test_what_cannot_be_ranked(runs, options, words):
    with pytest.raises(ValueError, match=words):
        rank_metrics(runs, **options)


# --- choices by their likelihood -----------------------------------------------------------------------------------


class Letters:
    """a, b, c, ... are tokens 1, 2, 3, ...; the special token is 0."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(one) - 96 for one in text if one != "-"]}


class Table(torch.nn.Module):
    """`p(next | token)` from a table; every token after `z` is likely alike."""

    def __init__(self, table):
        super().__init__()
        logits = torch.zeros(27, 27)
        for (before, after), p in table.items():
            logits[ord(before) - 96, ord(after) - 96] = math.log(p)
        self.logits = torch.nn.Parameter(logits)
        self.calls = []

    def forward(self, input_ids, attention_mask):
        self.calls.append((tuple(input_ids.shape), self.training, torch.is_grad_enabled()))
        return type("Out", (), {"logits": self.logits[input_ids]})()


def table(**rows):
    """Fill a row with the given shares and the rest evenly, so that it is a distribution."""
    found = {}
    for before, given in rows.items():
        rest = (1 - sum(given.values())) / (27 - len(given))
        letters = [chr(96 + i) for i in range(27)]
        found |= {(before, after): given.get(after, rest) for after in letters}
    return found


#: after p: b 0.5, c 0.1; after b: b 0.1; after c: c 0.9; so that p(bb) = 0.05 and p(ccc) = 0.081
MODEL = table(p={"b": 0.5, "c": 0.1}, b={"b": 0.1}, c={"c": 0.9}, q={"b": 0.4, "c": 0.01})


@pytest.mark.parametrize(
    ("normalise", "choices", "expected"),
    [
        ("none", ["b", "ccc"], 0),  # 0.5 and 0.081
        ("chars", ["bb", "ccc"], 1),  # 0.05 ^ (1/2) = 0.22, 0.081 ^ (1/3) = 0.43
        ("tokens", ["b-b-", "ccc"], 1),  # as above: two tokens
        ("chars", ["b---", "ccc"], 0),  # 0.5 ^ (1/4) = 0.84: blanks count as characters
        ("none", ["c", "c"], 0),  # equal: the first
    ],
)
def test_choices_by_hand(normalise, choices, expected):
    model = Table(MODEL)
    model.train()
    assert cloze_choices(model, Letters(), [{"prompt": "p", "choices": choices}], normalise) == [expected]
    assert model.training and {call[1:] for call in model.calls} == {(False, False)}


def test_what_a_choice_is_worth_without_the_prompt():
    # after p: 0.5 and 0.1; alone, after q: 0.4 and 0.01: the gains are 1.25 and 10
    rows = [{"prompt": "p", "choices": ["b", "c"], "answer": 1}]
    assert cloze_accuracy(Table(MODEL), Letters(), rows, "unconditional", unconditional_prompt="q") == 1.0
    assert cloze_accuracy(Table(MODEL), Letters(), rows, "none") == 0.0


def test_rows_of_any_size_and_batches_of_any_size():
    rows = [
        {"prompt": "p", "choices": ["b", "ccc"], "answer": 0},
        {"prompt": "apq", "choices": ["c", "b", "a"], "answer": 0},
        {"prompt": "c", "choices": ["b", "c"], "answer": 1},
    ]
    found = [cloze_choices(Table(MODEL), Letters(), rows, "none", batch_size=size) for size in (1, 2, 32)]
    assert found == [[0, 1, 1]] * 3 and cloze_accuracy(Table(MODEL), Letters(), rows, "none") == 2 / 3
    assert cloze_choices(Table(MODEL), Letters(), []) == []


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "There are no rows"),
        ([{"prompt": "p", "choices": ["b", "c"], "answer": 2}], {}, "answer=2, which is no place"),
        ([{"prompt": "p", "choices": ["b"], "answer": 0}], {}, "at least 2 choices"),
        ([{"prompt": "p", "choices": ["b", ""], "answer": 0}], {}, "'' must be a text"),
        ([{"prompt": "p", "choices": ["b", "-"], "answer": 0}], {}, "makes no token of '-'"),
        ([{"prompt": "p", "choices": ["b", "c"], "answer": 0}], {"normalise": "bytes"}, "normalise='bytes'"),
        ([{"prompt": "p", "choices": ["b", "c"], "answer": 0}], {"batch_size": 0}, "batch_size=0"),
        ([{"prompt": "p", "choices": ["b", "c"], "answer": 0}], {"unconditional_prompt": "x"}, "only acts with"),
    ],
)
def test_rows_that_cannot_be_scored(rows, options, words):
    with pytest.raises(ValueError, match=words):
        cloze_accuracy(Table(MODEL), Letters(), rows, **options)
