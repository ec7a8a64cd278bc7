"""What a plan of GRPO counts, against sums by hand, enumeration and drawn batches."""

import dataclasses
import itertools
import random

import pytest

from hf_effi.functional.forward_costs import ForwardCosts, bucket_count
from hf_effi.functional.grpo_expected import Lengths, dead_share, refills
from hf_effi.functional.grpo_plan import GRPOChoices, GRPOShape, planned_work
from hf_effi.functional.grpo_speeds import DataSheet, ModelSize, datasheet_speeds, fit_speeds
from hf_effi.functional.rollouts import next_refill_size

FREE = ForwardCosts(0.0, 0.0)
SHAPE = GRPOShape(2, 4, 4, Lengths((10,), (1,)), Lengths((2, 6), (1, 1)), ((0.0, 1.0), (0.5, 1.0)))


def test_lengths_by_enumeration():
    lengths = Lengths((3, 5, 9), (0.2, 0.3, 0.5))
    pairs = list(zip(lengths.values, lengths.shares, strict=True))
    for rows, power in ((1, 1), (2, 1), (3, 2)):
        expected = 0.0
        for drawn in itertools.product(pairs, repeat=rows):
            likely = 1.0
            for _, share in drawn:
                likely *= share
            expected += likely * max(value for value, _ in drawn) ** power
        assert lengths.longest_of(rows, power) == pytest.approx(expected, rel=1e-12)
    assert Lengths.of([(5, 1), (3, 2), (5.2, 1)]) == Lengths((3, 5), (1, 1))
    middle = Lengths.of_quantiles([(50, 100), (100, 200)], steps=100)
    assert (
        middle.values[0] == 100
        and middle.shares[0] == pytest.approx(0.5)
        and middle.mean() == pytest.approx(125, abs=0.5)
    )


def test_dead_groups_by_hand():
    assert dead_share([(0.0, 1), (1.0, 1)], 8) == 1.0 and dead_share([(0.5, 3)], 2) == 0.5
    assert dead_share([(0.2, 1), (0.9, 3)], 3) == pytest.approx((0.008 + 0.512 + 3 * (0.729 + 0.001)) / 4)
    assert dead_share([(0.3, 1)], 1) == 1.0


def test_refills_against_drawn_ones():
    rng, prompts, alive, rounds = random.Random(0), 5, 0.4, 3
    groups, live, full, draws = 0, 0, 0, 20_000
    for _ in range(draws):
        generated = kept = 0
        for number in range(rounds):
            size = next_refill_size(prompts - kept, kept, generated, cap=prompts) if number else prompts
            generated, kept = generated + size, kept + sum(rng.random() < alive for _ in range(size))
            if kept >= prompts:
                break
        groups, live, full = groups + generated, live + min(kept, prompts), full + (kept >= prompts)
    found = refills(prompts, alive, rounds)
    assert found.groups == pytest.approx(groups / draws, rel=0.01)
    assert found.live == pytest.approx(live / draws, rel=0.01) and found.filled == pytest.approx(
        full / draws, abs=0.01
    )
    assert refills(4, 1.0, 3).rounds == ((4, 1.0),) and refills(4, 1.0, 3).filled == 1
    assert refills(4, 0.0, 3).rounds == ((4, 3.0),) and refills(4, 0.0, 3).live == 0


def test_work_of_stock_by_hand():
    work = planned_work(dataclasses.replace(SHAPE, num_iterations=2, beta=0.1), GRPOChoices(), FREE)
    longest = 6 - 4 / 2**8
    square = 36 - 32 / 2**8
    assert work.counts["gen"] == pytest.approx(
        {
            "call": 1,
            "row": 8,
            "prefill_token": 80,
            "step": longest,
            "step_row": 8 * longest,
            "step_context": 8 * (10 * longest + square / 2),
        }
    )
    assert work.counts["reward"] == {"call": 1, "row": 8}
    # 8 rows of 16 columns, nearly always, in forwards of 4; twice in scoring (old, reference), twice in training
    for phase, passes in (("logp", 2), ("train", 2)):
        assert work.counts[phase]["token"] == pytest.approx(passes * 8 * 16, rel=0.02)
        assert work.counts[phase]["forward"] == 4 and work.counts[phase]["flat"] == 0
    assert work.counts["train"]["micro_step"] == 4 and work.updates == 2
    assert work.live_groups == pytest.approx(2 * (1 - (1 + 0.125) / 2))


def test_savings_count_less():
    def tokens(choices, **over):
        return planned_work(dataclasses.replace(SHAPE, **over), choices, FREE).counts["train"]["token"]

    even = {"completion_lengths": Lengths((6,), (1,)), "pass_rates": ((0.5, 1.0),)}
    assert tokens(GRPOChoices(), **even) == tokens(GRPOChoices(("pack",)), **even) == 8 * 16
    # each prompt's 9 tokens once, and its last one with each completion; both orders keep a prompt's 4 rows together
    assert tokens(GRPOChoices(("sort", "share")), **even) == 2 * (9 + 4 * 7)
    assert tokens(GRPOChoices(("pack",))) < tokens(GRPOChoices(("trim",))) + 1e-9 < tokens(GRPOChoices()) + 1e-9
    dead = {**even, "pass_rates": ((0.0, 1.0),)}
    assert tokens(GRPOChoices(("skip",)), **dead) == 2 * 16  # a row for each micro-batch
    assert tokens(GRPOChoices(("skip",)), **{**dead, "beta": 0.1}) == 8 * 16
    more = planned_work(SHAPE, GRPOChoices(prune_rate=0.75), FREE)
    assert more.generated_groups == 8 and more.counts["train"]["micro_step"] == 2
    filtered = planned_work(SHAPE, GRPOChoices(filter_rounds=3), FREE)
    assert filtered.counts["gen"]["call"] > 1 and filtered.live_groups > 2 * (1 - SHAPE.dead)


def test_a_plan_is_the_same_each_time():
    first, second = (planned_work(SHAPE, GRPOChoices(("trim", "sort", "skip", "share")), FREE) for _ in range(2))
    assert first == second


def test_speeds_come_back_from_what_they_made():
    truth = {"gen": {"call": 0.01, "step": 0.002, "step_row": 0.0}, "train": {"token": 1e-5, "forward": 0.003}}
    counts = [
        {"gen": {"call": 1, "step": n, "step_row": n * m}, "train": {"token": 50 * n * m, "forward": m}, "logp": {}}
        for n in (4, 9, 30)
        for m in (1, 5)
    ]
    seconds = [
        {phase: sum(c * truth.get(phase, {}).get(name, 0) for name, c in one.items()) for phase, one in work.items()}
        for work in counts
    ]
    speeds, error = fit_speeds(list(zip(counts, seconds, strict=True)))
    for phase, names in truth.items():
        assert speeds[phase] == pytest.approx(names, rel=1e-6, abs=1e-12)
    assert error < 1e-9 and "logp" not in speeds
    falling = [({"gen": {"call": 1, "step": n}}, {"gen": 3.0 - n}) for n in (0, 1, 2)]
    assert min(fit_speeds(falling)[0]["gen"].values()) == 0.0  # no second is ever given back


def test_a_data_sheet():
    model = ModelSize(1e9, 2e8, 1.2e9, 20, 2.4e9, 1e5, 0.01)
    card = DataSheet(200, 2000, efficiency=0.5, bandwidth_efficiency=0.5, layer_milliseconds=0.1, spread=0.5)
    speeds = datasheet_speeds(model, card)
    assert speeds["train"]["token"] == pytest.approx(6e9 / 1e14) and speeds["logp"]["pair"] == pytest.approx(2e-7)
    assert speeds["gen"]["step"] == pytest.approx(2.4e-3 + 2e-3)
    assert speeds["gen"]["step_context"] == pytest.approx(1e-7)
    fast, slow = (datasheet_speeds(model, card.scaled(end)) for end in (1, -1))
    assert fast["train"]["token"] == pytest.approx(6e9 / 1.5e14)
    assert slow["gen"]["step"] == pytest.approx(4.8e-3 + 3e-3)


def test_buckets():
    assert [bucket_count(rows) for rows in (0, 7, 16, 200)] == [1, 1, 2, 8]
    assert bucket_count(16, 5) == 5 and bucket_count(16, max_rows=2) == 8 and bucket_count(16, trims=False) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lengths((), ()), r"lengths=\(\) must be whole numbers"),
        (lambda: Lengths((0, 3), (1, 1)), "of at least 1 that rise"),
        (lambda: Lengths((3,), (float("nan"),)), "must be one number above 0"),
        (lambda: Lengths.of_quantiles([(50, 3)]), "two or more"),
        (lambda: Lengths.of_quantiles([(50, 3), (120, 4)]), r"percents must lie in \[0, 100\]"),
        (lambda: dead_share([], 4), "is empty"),
        (lambda: dead_share([(1.5, 1)], 4), r"1.5 must lie in \[0, 1\]"),
        (lambda: dead_share([(float("nan"), 1)], 4), r"nan must lie in \[0, 1\]"),
        (lambda: dead_share([(0.5, 0)], 4), "share 0 of pass rate 0.5"),
        (lambda: dead_share([(0.5, 1)], 0), "group_size=0"),
        (lambda: refills(0, 0.5, 1), "prompts=0"),
        (lambda: dataclasses.replace(SHAPE, micro_batch=3), "micro_batch=3 does not divide the 8 rows"),
        (lambda: dataclasses.replace(SHAPE, group_size=1), "group_size=1 must be an integer of at least 2"),
        (lambda: dataclasses.replace(SHAPE, beta=-1.0), "beta=-1.0"),
        (lambda: GRPOChoices(("fold",)), "'fold' is not known"),
        (lambda: GRPOChoices(prune_rate=0.6), "1 - 1/R for a whole R"),
        (lambda: GRPOChoices(prune_rate=1.0), "1 - 1/R for a whole R"),
        (lambda: GRPOChoices(filter_rounds=-1), "filter_rounds=-1"),
        (lambda: GRPOChoices(filter_rounds=2, prune_rate=0.5), "one at a time"),
        (lambda: DataSheet(0, 1), "tflops=0"),
        (lambda: DataSheet(1, 1, efficiency=1.5), "efficiency=1.5"),
        (lambda: DataSheet(1, 1, layer_milliseconds=-1), "layer_milliseconds=-1"),
        (lambda: DataSheet(1, 1, spread=1.0), "spread=1.0"),
        (lambda: fit_speeds([]), "0 samples"),
        (lambda: fit_speeds([({}, {"gen": -1.0})] * 2), "-1.0 seconds of phase 'gen'"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
