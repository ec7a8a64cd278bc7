"""Rows without a token in the loss: by hand for the masks, and by brute force for every rule that chooses rows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from hf_effi.functional.rollouts import (
    PRUNE_METRICS,
    PRUNE_SCOPES,
    AdvantagePruner,
    PassRateBand,
    ShuffledPrompts,
    binary_pass_rates,
    draw_fresh,
    even_repeats,
    fill_order,
    keep_by_advantage,
    keep_groups_by_pass_rate,
    kept_share,
    loss_mask,
    policy_mask,
    prompt_key,
    row_advantages,
    rows_with_gradient,
)
from hf_effi.protocols import PromptSelector, RolloutGroups, RolloutPruner

NAN = float("nan")


class TestMasks:
    #: Finished; cut off; finished with advantage 0; all its tokens are a tool's.
    BATCH = {
        "completion_mask": torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1]]),
        "advantages": torch.tensor([1.0, -3.0, 0.0, 2.0]),
    }

    def test_what_is_in_the_loss(self) -> None:
        assert loss_mask(self.BATCH).sum(1).tolist() == [2, 0, 2, 0]
        assert loss_mask({**self.BATCH, "tool_mask": None}).sum(1).tolist() == [3, 0, 2, 2]
        assert row_advantages(self.BATCH).tolist() == [1.0, 0.0, 0.0, 0.0]
        assert rows_with_gradient(self.BATCH).tolist() == [True, False, False, False]

    def test_a_ratio_of_zero_takes_the_policy_term_and_not_the_loss(self) -> None:
        plain = {**self.BATCH, "tool_mask": None}
        per_row = {**plain, "importance_sampling_ratio": torch.tensor([[0.0], [1.0], [1.0], [0.5]])}
        assert rows_with_gradient(per_row).tolist() == [False, False, False, True]
        assert loss_mask(per_row).sum(1).tolist() == [3, 0, 2, 2]
        per_token = torch.tensor([[0.0, 0.0, 2.0], [1.0] * 3, [1.0] * 3, [0.0, 0.0, 1.0]])
        batch = {**plain, "importance_sampling_ratio": per_token}
        assert policy_mask(batch).sum(1).tolist() == [1, 0, 2, 0]
        assert rows_with_gradient(batch).tolist() == [True, False, False, False]
        # VESPO adds up logarithms of the ratios and is multiplied by none of them.
        assert rows_with_gradient(batch, ratio_multiplies=False).tolist() == [True, False, False, True]

    def test_advantages_per_token(self) -> None:
        mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]])
        advantages = torch.tensor([[1.0, -3.0, 9.0], [2.0, -2.0, 0.0], [5.0, 5.0, 5.0], [0.0, 0.0, 7.0]])
        batch = {"completion_mask": mask, "advantages": advantages}
        # Mean size of the row's own tokens, with the sign of their sum.
        assert row_advantages(batch).tolist() == pytest.approx([-2.0, 4 / 3, 0.0, 0.0])
        assert rows_with_gradient(batch).tolist() == [True, True, False, False]
        one_column = {"completion_mask": mask, "advantages": torch.tensor([[1.0], [0.0], [2.0], [-1.0]])}
        assert row_advantages(one_column).tolist() == [1.0, 0.0, 0.0, -1.0]


class TestPruning:
    RULES = [
        (metric, balance) for metric in PRUNE_METRICS for balance in (False, True) if metric != "random" or not balance
    ]

    @pytest.mark.parametrize(("metric", "balance"), RULES)
    def test_an_empty_row_only_when_no_other_is_left(self, metric: str, balance: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        for keep, _ in itertools.product(range(1, 9), range(10)):
            advantages = torch.randint(-2, 3, (8,), generator=generator).float()
            live = torch.rand(8, generator=generator) < 0.5
            drawn = generator if metric == "random" else None
            mask = keep_by_advantage(
                advantages, keep, metric=metric, balance_signs=balance, generator=drawn, live=live
            )
            assert int(mask.sum()) == keep
            assert int((mask & live).sum()) == min(keep, int(live.sum()))

    @pytest.mark.parametrize("scope", PRUNE_SCOPES)
    @pytest.mark.parametrize(("metric", "balance"), RULES)
    def test_no_scope_keeps_an_empty_row_while_others_are_left(self, scope: str, metric: str, balance: bool) -> None:
        generator = torch.Generator().manual_seed(6)
        pruner = AdvantagePruner(0.5, metric, scope, balance)
        assert isinstance(pruner, RolloutPruner)
        for _ in range(40):
            advantages = torch.randn(16, generator=generator)
            live = torch.rand(16, generator=generator) < torch.rand(1, generator=generator)
            mask = pruner.keep_rows(advantages, group_size=4, num_pools=2, step=3, live=live)
            assert int(mask.sum()) == 8
            assert int((mask & live).sum()) == min(8, int(live.sum()))

    def test_by_hand(self) -> None:
        # Two groups. The cut rows have the largest |A|; the second group is cut but for one row.
        advantages = torch.tensor([9.0, 1.0, -2.0, 0.5, 8.0, 8.0, 8.0, 0.1])
        live = torch.tensor([False, True, True, True, False, False, False, True])
        pruner = AdvantagePruner(0.5, scope="group")
        # Rows 2 and 1 of the first; 7 of the second, whose other place goes to the best row left: 3.
        kept = pruner.keep_rows(advantages, 4, 1, 0, live=live).nonzero().flatten().tolist()
        assert kept == [1, 2, 3, 7]
        assert pruner.keep_rows(advantages, 4, 1, 0).nonzero().flatten().tolist() == [0, 2, 4, 5]

    def test_all_rows_alive_changes_nothing(self) -> None:
        advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
        for metric, scope in itertools.product(PRUNE_METRICS, PRUNE_SCOPES):
            pruner = AdvantagePruner(0.75, metric, scope)
            alive = torch.ones(16, dtype=torch.bool)
            assert torch.equal(
                pruner.keep_rows(advantages, 4, 2, 7), pruner.keep_rows(advantages, 4, 2, 7, live=alive)
            )


def groups_of(rewards: torch.Tensor, live: torch.Tensor) -> RolloutGroups:
    advantages = torch.nan_to_num(rewards - rewards.nanmean(dim=1, keepdim=True)) * live
    return RolloutGroups(rewards, advantages, torch.full(rewards.shape, 5), step=0, loss_tokens=5 * live.long())


class TestFilter:
    REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 1], [1, 0.5, 0, 0.5], [1, 1, 1, 1], [0, 0, 0, 0], [NAN] * 4])
    LIVE = torch.tensor(
        [
            [False, True, False, False],  # one row is left, and it has an advantage
            [False, False, False, False],  # everything was cut off
            [False, True, False, True],  # what is left has the reward of the mean: no advantage
            [True, True, False, False],
            [False, False, False, False],
            [True, True, True, True],
        ]
    )

    def test_a_group_without_a_live_row_that_counts_is_dead(self) -> None:
        groups = groups_of(self.REWARDS, self.LIVE)
        assert PassRateBand(0, 1).decide(groups).reasons == (
            "kept",
            "no_loss_tokens",
            "no_loss_tokens",
            "zero_variance",
            "zero_variance",
            "unscorable",
        )
        # The pass rate is that of all rows: 2 of 4, though the row in the loss is wrong.
        assert PassRateBand(0.4, 0.6).decide(groups).reasons[0] == "kept"
        assert PassRateBand(0.4, 0.6).decide(groups).counts()["no_loss_tokens"] == 2

    def test_fill_order_takes_what_can_teach_first(self) -> None:
        groups = groups_of(self.REWARDS, self.LIVE)
        # 0 has a gradient; 2 and 3 have tokens in the loss (2 nearer to the middle); 1 and 4 none; 5 is unscorable.
        assert PassRateBand(0, 1).fill_order(groups) == [0, 2, 3, 1, 4, 5]
        assert fill_order(self.REWARDS, 0, 1) == [0, 1, 2, 3, 4, 5]

    def test_without_masks_nothing_changes(self) -> None:
        alive = torch.ones_like(self.REWARDS, dtype=torch.bool)
        with_masks = PassRateBand(0, 1).decide(groups_of(self.REWARDS, alive))
        assert with_masks.reasons == keep_groups_by_pass_rate(self.REWARDS, 0, 1).reasons


class TestGroups:
    def test_views_and_defaults(self) -> None:
        rewards = torch.tensor([[1.0, 0.0]])
        groups = RolloutGroups(rewards, torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 4]]), step=2)
        assert groups.live.tolist() == [[True, True]] and groups.has_gradient.tolist() == [[True, False]]
        assert groups.weighted_rewards is rewards and groups.rewards_per_func.shape == (1, 2, 1)
        assert groups.pass_rates.isnan().all()

    def test_the_old_list_of_pass_rates_is_named_where_it_is_missed(self) -> None:
        groups = RolloutGroups(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2), step=0)
        for use in (list, lambda g: list(zip([3, 4], g, strict=True)), sum, max):
            with pytest.raises(TypeError, match=r"observe\(rows, groups\)` gets the groups of those rows"):
                use(groups)

    @pytest.mark.parametrize(
        ("rewards", "rates"),
        [
            ([[1.0, 0.0], [1.0, 1.0]], [0.5, 1.0]),
            ([[1.0, NAN], [NAN, NAN]], [1.0, NAN]),
            ([[1.0, 0.0], [0.5, 0.0]], [NAN, NAN]),  # partial credit
            ([[-1.0, 1.0], [1.0, 1.0]], [NAN, NAN]),
            ([[NAN, NAN]], [NAN]),
        ],
    )
    def test_a_pass_rate_only_of_zeros_and_ones(self, rewards: list, rates: list) -> None:
        assert binary_pass_rates(torch.tensor(rewards)).tolist() == pytest.approx(rates, nan_ok=True)


class TestPrompts:
    def test_same_content_is_the_same_prompt(self) -> None:
        chat = [{"role": "user", "content": "ü"}]
        assert prompt_key(chat) == prompt_key([dict(reversed(chat[0].items()))]) != prompt_key("ü")
        assert len({prompt_key(str(i)) for i in range(10_000)}) == 10_000

    def test_images_in_a_prompt_are_told_apart_by_what_they_show(self) -> None:
        from PIL import Image

        def chat(shade: int, size: tuple[int, int] = (2, 2)) -> list[dict[str, Any]]:
            return [{"role": "user", "content": [{"type": "image", "image": Image.new("L", size, shade)}]}]

        assert prompt_key(chat(3)) == prompt_key(chat(3)) != prompt_key(chat(4))
        assert prompt_key(chat(3)) != prompt_key(chat(3, (4, 1)))

    @pytest.mark.parametrize("cursor", [0, 3, 7, 9])
    @pytest.mark.parametrize("fresh", [{4}, {0, 9}, {5, 6, 7}])
    def test_a_stream_finds_every_row_that_is_left(self, cursor: int, fresh: set[int]) -> None:
        stream, left = ShuffledPrompts(10, seed=1), set(fresh)
        stream.select(cursor)

        def is_fresh(row: int) -> bool:
            found = row in left
            left.discard(row)
            return found

        assert set(draw_fresh(stream.select, len(fresh), is_fresh, most=20)) == fresh

    def test_repeats_only_where_nothing_else_is_left(self) -> None:
        seen = {0, 1}

        def is_fresh(row: int) -> bool:
            fresh = row not in seen
            seen.add(row)
            return fresh

        rows = draw_fresh(ShuffledPrompts(4, seed=0).select, 5, is_fresh, most=8)
        # The two that are left, and then each once before any twice.
        assert len(rows) == 5 and set(rows[:2]) == {2, 3} and len(set(rows[2:])) == 3

    def test_who_has_nothing_else_is_asked_three_times(self) -> None:
        asked: list[int] = []

        def select(count: int) -> list[int]:
            asked.append(count)
            return list(range(count))

        assert draw_fresh(select, 2, lambda row: False, most=1000) == [0, 1]
        assert asked == [2, 2, 2]

    def test_a_selector_that_was_made_for_the_protocol(self) -> None:
        assert isinstance(ShuffledPrompts(3), PromptSelector)


class TestEvenRepeats:
    @pytest.mark.parametrize("most", [1, 2, 4])
    def test_every_row_equally_often_in_equal_chunks(self, most: int) -> None:
        for chunks, rows in itertools.product(range(2, 20), range(1, 20)):
            if rows >= chunks:
                continue
            kept, times = even_repeats(rows, chunks, most)
            assert 1 <= kept <= rows and kept * times % chunks == 0 and kept * times // chunks <= most
            # None larger would do.
            assert all(larger // math.gcd(chunks, larger) > most for larger in range(kept + 1, rows + 1))


class TestKeptShare:
    def test_rows_and_tokens(self) -> None:
        tokens = torch.tensor([1, 2, 3, 4, 100, 100])
        assert kept_share([3, 1], [0, 1, 2, 3], tokens, by_token=False) == 0.5
        assert kept_share([3, 1], [0, 1, 2, 3], tokens, by_token=True) == 0.6
        assert kept_share([3, 1, 3, 1], [0, 1, 2, 3], tokens, by_token=True) == 0.6  # repeats count once
        assert kept_share([0], [0], torch.tensor([0]), by_token=True) == 0.0
