"""How many completions a prompt gets: integer optimum by brute force, predictors, state."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

from hf_effi.errors import MismatchError
from hf_effi.functional.rollouts import (
    GaussianRates,
    allocation,
    divide_budget,
    gradient_variance,
    knapsack_values,
    median_distance,
    rbf_kernel,
    relaxed_sizes,
    round_sizes,
)
from hf_effi.protocols import RolloutAllocator, RolloutGroups
from hf_effi.selection import VIP, BetaRates, EmbeddingRates, Knapsack

NAN = math.nan


def context(size, **columns):
    return SimpleNamespace(size=size, group_size=4, seed=0, column=lambda name: columns[name])


def cases(seed, count=60):
    rng = random.Random(seed)
    for _ in range(count):
        prompts, low = rng.randint(1, 6), rng.randint(2, 3)
        high = low + rng.randint(0, 4)
        budget = rng.randint(prompts * low, prompts * high)
        rates = [rng.choice([0.0, 1.0, 0.5, rng.random(), rng.random()]) for _ in range(prompts)]
        yield torch.tensor(rates, dtype=torch.float64), budget, low, high


def value_of(values, sizes, low):
    return sum(float(values[prompt, size - low]) for prompt, size in enumerate(sizes))


def brute_force(values, budget, low):
    prompts, widths = values.shape
    rest = budget - prompts * low
    return max(
        sum(float(values[q, i]) for q, i in enumerate(extra))
        for extra in itertools.product(range(widths), repeat=prompts)
        if sum(extra) == rest
    )


def values_of(kind, rates, low, high):
    sizes = torch.arange(low, high + 1)
    return knapsack_values(rates, sizes) if kind == "knapsack" else -gradient_variance(rates, sizes, kind)


class TestDivide:
    @pytest.mark.parametrize("kind", ["dr_grpo", "rloo", "knapsack"])
    def test_is_the_integer_optimum(self, kind):
        for rates, budget, low, high in cases(1):
            values = values_of(kind, rates, low, high)
            sizes = divide_budget(values, budget, low)
            assert sum(sizes) == budget and all(low <= size <= high for size in sizes)
            assert value_of(values, sizes, low) == pytest.approx(brute_force(values, budget, low), abs=1e-12)

    def test_is_the_optimum_of_any_values(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            values = torch.randn(4, 4, generator=generator, dtype=torch.float64)
            for budget in (0, 5, 12):
                sizes = divide_budget(values, budget)
                assert value_of(values, sizes, 0) == pytest.approx(brute_force(values, budget, 0))

    def test_ties_are_divided_evenly(self):
        assert divide_budget(torch.zeros(4, 20), budget=18, low=2) == [5, 5, 4, 4]
        assert divide_budget(values_of("rloo", torch.full((3,), 0.5), 2, 9), 15, 2) == [5, 5, 5]

    def test_one_more_completion_is_worth_more_at_four_than_at_three(self):
        # The variance of Dr. GRPO is not convex at 2: (2, 4) is better than (3, 3).
        values = values_of("dr_grpo", torch.tensor([0.5, 0.5]), 2, 6)
        assert sorted(divide_budget(values, 6, 2)) == [2, 4]

    @pytest.mark.parametrize("budget", [5, 13])
    def test_a_budget_that_does_not_fit_is_named(self, budget):
        with pytest.raises(ValueError, match=f"{budget} completions cannot be divided over 3 prompts with 2 to 4"):
            divide_budget(torch.zeros(3, 3), budget, 2)


class TestRelaxed:
    @pytest.mark.parametrize("kind", ["dr_grpo", "rloo"])
    def test_within_bounds_and_budget(self, kind):
        for rates, budget, low, high in cases(2):
            sizes = relaxed_sizes(rates, budget, low, high, kind)
            assert float(sizes.sum()) <= budget + 1e-6 and ((sizes >= low) & (sizes <= high)).all()
            values = values_of(kind, rates, low, high)
            rounded = round_sizes(sizes, values, budget, low)
            assert sum(rounded) == budget and all(low <= size <= high for size in rounded)
            best = brute_force(values, budget, low)
            if kind == "rloo":  # convex: greedy rounding reaches the optimum
                assert value_of(values, rounded, low) == pytest.approx(best, abs=1e-9)
            else:
                assert value_of(values, rounded, low) >= best - 0.06

    def test_rloo_has_a_closed_form(self):
        sizes = relaxed_sizes(torch.tensor([0.5, 0.1]), 22, 2, 100, "rloo") - 1
        assert float(sizes.sum()) == pytest.approx(20)
        assert float(sizes[0] / sizes[1]) == pytest.approx(math.sqrt(0.25 / 0.09), rel=1e-6)

    def test_unknown_words_are_named(self):
        for call in (
            lambda: relaxed_sizes(torch.tensor([0.5]), 4, 2, 8, "ppo"),
            lambda: gradient_variance(torch.tensor([0.5]), torch.tensor([2]), "ppo"),
            lambda: VIP("ppo"),
        ):
            with pytest.raises(ValueError, match="estimator must be one of"):
                call()


class TestRates:
    def test_beta_hand_computed_and_forgetting(self):
        rates = BetaRates(prior=(2.0, 1.0), forget=0.5)
        rates.attach(context(3))
        rates.update([1, 1], torch.tensor([2.0, 0.0]), torch.tensor([4.0, 2.0]))
        # counts (2, 2), then halved to (1, 1) plus (0, 2)
        assert rates.predict([0, 1]).tolist() == pytest.approx([2 / 3, 3 / 7])
        rates.update([1], torch.tensor([0.0]), torch.tensor([0.0]))  # nothing scorable: nothing forgotten
        assert rates.predict([1]).tolist() == pytest.approx([3 / 7])

    def test_state_comes_back_and_another_dataset_is_refused(self):
        rates, other = BetaRates(), BetaRates()
        for each in (rates, other):
            each.attach(context(3))
        rates.update([2], torch.tensor([3.0]), torch.tensor([4.0]))
        other.load_state_dict(rates.state_dict())
        assert torch.equal(other.predict([0, 1, 2]), rates.predict([0, 1, 2]))
        wrong = BetaRates()
        wrong.attach(context(4))
        with pytest.raises(MismatchError, match=r"shape \(3, 2\), this dataset needs \(4, 2\)"):
            wrong.load_state_dict(rates.state_dict())

    def test_gaussian_update_equals_the_joint_posterior(self):
        points = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        kernel = 4 * rbf_kernel(points, median_distance(points)) + 1e-9 * torch.eye(5, dtype=torch.float64)
        right, total = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([4.0, 4.0, 4.0])
        rows = [0, 2, 4]
        once = GaussianRates(torch.zeros(5, dtype=torch.float64), kernel).updated(rows, right, total)
        steps = GaussianRates(torch.zeros(5, dtype=torch.float64), kernel)
        for i, row in enumerate(rows):
            steps = steps.updated([row], right[i : i + 1], total[i : i + 1])
        # Bayes: the precision is the sum of the prior's and the likelihood's
        noise = 1 / (right.double() + 0.5) + 1 / (total.double() - right.double() + 0.5)
        observed = torch.zeros(3, 5, dtype=torch.float64)
        observed[range(3), rows] = 1.0
        precision = torch.linalg.inv(kernel) + observed.T @ torch.diag(1 / noise) @ observed
        seen = torch.log((right.double() + 0.5) / (total.double() - right.double() + 0.5))
        mean = torch.linalg.solve(precision, observed.T @ (seen / noise))
        for belief in (once, steps):
            torch.testing.assert_close(belief.mean, mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(belief.covariance, torch.linalg.inv(precision), atol=1e-5, rtol=1e-5)

    def test_prompts_that_resemble_each_other_are_predicted_alike(self):
        vectors = [[0.0, 0.0], [0.05, 0.0], [3.0, 3.0], [3.0, 3.05]]
        rates = EmbeddingRates("vector", prior=0.3)
        rates.attach(context(4, vector=vectors))
        assert rates.predict([0, 1, 2, 3]).tolist() == pytest.approx([0.3] * 4)
        rates.update([0, 2], torch.tensor([8.0, 0.0]), torch.tensor([8.0, 8.0]))
        p = rates.predict([0, 1, 2, 3]).tolist()
        assert p[0] > 0.7 and p[1] > 0.7 and p[2] < 0.2 and p[3] < 0.2
        other = EmbeddingRates(lambda given: torch.tensor(given.column("vector")), prior=0.3)
        other.attach(context(4, vector=vectors))
        other.load_state_dict(rates.state_dict())
        assert torch.equal(other.predict([0, 1, 2, 3]), rates.predict([0, 1, 2, 3]))

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: BetaRates(prior=(0, 1)), "prior=0"),
            (lambda: BetaRates(prior=(1,)), "two numbers"),
            (lambda: BetaRates(forget=1.5), "forget=1.5"),
            (lambda: EmbeddingRates(3), "name of a column or a function"),
            (lambda: EmbeddingRates("v", variance=0), "variance=0"),
            (lambda: EmbeddingRates("v", prior=1.0), "prior=1.0"),
            (lambda: EmbeddingRates("v", max_rows=40_000), "max_rows=40000 is above 32768"),
            (lambda: EmbeddingRates("v", max_rows=2).attach(context(3)), "Raise max_rows"),
            (lambda: EmbeddingRates("v").attach(context(3, v=[[1.0]] * 2)), r"shape \(3, width\)"),
            (lambda: EmbeddingRates("v").attach(context(2, v=[[1.0], [NAN]])), "must be finite"),
            (lambda: BetaRates().predict([0]), "call attach"),
        ],
    )
    def test_bad_arguments_are_named(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()


def groups_of(rewards, **over):
    rewards = torch.tensor(rewards)
    rates = torch.nanmean(rewards.double(), 1)
    return RolloutGroups(rewards, rewards * 0, torch.full(rewards.shape, 5), step=0, **{"pass_rates": rates, **over})


class TestAllocators:
    @pytest.mark.parametrize("cls", [VIP, Knapsack])
    def test_observes_allocates_and_resumes(self, cls):
        made = [cls(warmup_passes=0) for _ in range(2)]
        for each in made:
            assert isinstance(each, RolloutAllocator)
            each.attach(context(4))
        first, second = made
        rows = [0, 1, 2, 3]
        assert first.allocate(rows, 16) == [4, 4, 4, 4]  # nothing known: all alike
        first.observe(rows, groups_of([[0.0] * 4, [1.0] * 4, [1.0, 0, 1, 0], [NAN] * 4]))
        sizes = first.allocate(rows, 24)
        assert sum(sizes) == 24 and min(sizes) >= 2 and sizes[2] > sizes[1] and sizes[3] > sizes[1]
        assert first.metrics() == {"group_size_min": min(sizes), "group_size_max": max(sizes)}
        second.load_state_dict(first.state_dict())
        assert second.allocate(rows, 24) == sizes and second.passes == 1.0
        other = cls()
        other.attach(context(5))
        with pytest.raises(MismatchError, match="of 4 rows, this dataset has 5"):
            other.load_state_dict(first.state_dict())

    def test_hard_prompts_go_on_being_explored_by_the_knapsack(self):
        knapsack = Knapsack(warmup_passes=0)
        knapsack.attach(context(2))
        knapsack.observe([0, 1], groups_of([[0.0] * 8, [1.0] * 8]))
        assert knapsack.allocate([0, 1], 16)[0] == 14

    def test_all_alike_until_the_warmup_is_over(self):
        vip = VIP(warmup_passes=1.0)
        vip.attach(context(4))
        vip.observe([0, 1], groups_of([[0.0] * 4, [1.0, 0, 1, 0]]))
        assert vip.passes == 0.5 and vip.allocate([0, 1], 9) == [5, 4]
        vip.observe([2, 3], groups_of([[0.0] * 4, [1.0, 0, 1, 0]]))
        assert vip.allocate([0, 1], 9) != [5, 4]

    def test_the_paper_s_rounding_is_there(self):
        sizes = []
        for solver in ("exact", "relaxed"):
            vip = VIP("rloo", solver=solver)
            vip.attach(context(3))
            vip.rates.update([0, 1, 2], torch.tensor([1.0, 8.0, 4.0]), torch.tensor([8.0, 8.0, 8.0]))
            sizes.append(vip.allocate([0, 1, 2], 24))
        assert sizes[0] == sizes[1]

    def test_rewards_that_are_no_right_or_wrong(self):
        vip, told = VIP(), VIP(success_at=0.5)
        groups = groups_of([[0.2, 0.7]], pass_rates=torch.tensor([NAN], dtype=torch.float64))
        for each in (vip, told):
            each.attach(context(1))
        with pytest.raises(ValueError, match="difficulty_reward="):
            vip.observe([0], groups)
        told.observe([0], groups)
        assert told.rates.predict([0]).item() == 0.5

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: VIP(low=1), "low=1"),
            (lambda: VIP(low=True), "low=True"),
            (lambda: VIP(low=4, high=3), "high=3 is below low=4"),
            (lambda: VIP(solver="ilp"), "solver must be one of"),
            (lambda: VIP(rates=object()), "has no attach"),
            (lambda: Knapsack(warmup_passes=-1), "warmup_passes=-1"),
            (lambda: Knapsack(success_at=NAN), "success_at=nan"),
            (lambda: VIP().allocate([0], 4), "call attach"),
        ],
    )
    def test_bad_arguments_are_named(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()

    def test_bounds_that_do_not_fit_the_budget(self):
        knapsack = Knapsack(high=4)
        knapsack.attach(context(2))
        with pytest.raises(ValueError, match="9 completions cannot be divided over 2 prompts with 2 to 4"):
            knapsack.allocate([0, 1], 9)


def test_sizes_that_are_not_tried_are_in_no_best_division() -> None:
    """The division of large budgets is that of trying every size, ties included."""
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        prompts, widths = 1 + case % 7, 1 + case % 11
        rates = torch.rand(prompts, generator=generator)
        sizes = torch.arange(2, 2 + widths)
        values = (
            torch.rand(prompts, widths, generator=generator),
            torch.randint(0, 3, (prompts, widths), generator=generator),
            -gradient_variance(rates, sizes),
            -gradient_variance(torch.full((prompts,), 0.5), sizes, "rloo"),
            knapsack_values(rates, sizes),
        )[case % 5]
        budget = int(torch.randint(0, prompts * (widths - 1) + 1, (), generator=generator))
        first, last = allocation._worth_trying(values.double(), budget, 0.0)
        sizes_found = divide_budget(values, budget)
        assert all(low <= size <= high for low, size, high in zip(first, sizes_found, last, strict=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(allocation, "_worth_trying", lambda v, b, m: ([0] * len(v), [v.size(1) - 1] * len(v)))
            assert divide_budget(values, budget) == sizes_found


def test_a_large_generation_is_divided_by_few_sizes() -> None:
    """512 prompts of 8 completions without an upper bound: trying all 3073 sizes of each took three minutes."""
    rates = torch.rand(512, generator=torch.Generator().manual_seed(0))
    values = -gradient_variance(rates, torch.arange(2, 3075))
    first, last = allocation._worth_trying(values, 4096 - 1024, 1e-12)
    assert max(high - low for low, high in zip(first, last, strict=True)) < 64
    assert sum(divide_budget(values, 4096, 2)) == 4096


def test_a_state_of_another_predictor_is_refused() -> None:
    table, process = VIP(), VIP(rates=EmbeddingRates(lambda context: torch.eye(3)))
    for one in (table, process):
        one.attach(context(3))
    for one, other, name in ((table, process, "EmbeddingRates"), (process, table, "BetaRates")):
        with pytest.raises(MismatchError, match=f"those of {name}, this run"):
            one.load_state_dict(other.state_dict())
