"""Token budgets: pieces and hands by hand, and the plan of a batch that all ranks can follow."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_effi.errors import RefusedError
from hf_effi.functional.forward_costs import ForwardCosts, RowLengths
from hf_effi.functional.rollouts import cut_further, cut_to_budget, deal_rows, slowest_over_mean
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.dealing import RowDealer, _Facts
from hf_effi.trainers.grpo.forward import LogProbForward
from hf_effi.trainers.grpo.packed import PackedForward
from hf_effi.trainers.grpo.settings import GRPOSettings
from hf_effi.trainers.grpo.token_budget import ForwardPlanner, PiecesInHand, Plan, check_budgets, most_of_ranks
from tests.helpers import grpo_args


class TestCutting:
    def test_no_rows_are_no_pieces_and_one_row_is_one(self) -> None:
        assert cut_to_budget([], len, 3) == []
        assert cut_to_budget([7], lambda piece: 99.0, 3) == [[7]]

    def test_a_long_row_is_alone_and_the_next_one_begins_anew(self) -> None:
        lengths = {0: 2, 1: 9, 2: 1, 3: 1}
        cut = cut_to_budget([0, 1, 2, 3], lambda piece: sum(lengths[row] for row in piece), 4)
        assert cut == [[0], [1], [2, 3]]

    def test_groups_stay_whole_where_one_fits_alone(self) -> None:
        lengths = [3, 1, 1, 1, 3, 3]

        def tokens(piece: list[int]) -> int:
            return sum(lengths[row] for row in piece)

        assert cut_to_budget(range(6), tokens, 5) == [[0, 1, 2], [3, 4], [5]]
        assert cut_to_budget(range(6), tokens, 5, groups="abbbcc") == [[0], [1, 2, 3], [4], [5]]

    def test_a_budget_that_holds_all_is_one_piece(self) -> None:
        assert cut_to_budget(range(4), len, 4) == [[0, 1, 2, 3]]

    def test_the_longest_piece_is_halved_first_and_ties_go_to_the_first(self) -> None:
        assert cut_further([[0, 1], [2, 3]], [1, 1, 1, 1], 3) == [[0], [1], [2, 3]]
        assert cut_further([[0, 1], [2, 3]], [1, 1, 2, 1], 3) == [[0, 1], [2], [3]]
        assert cut_further([[0, 1], [2]], [1, 1, 1], 2) == [[0, 1], [2]]
        assert cut_further([], [5], 2) == []


class TestDealing:
    def test_groups_stay_whole_and_their_prompt_counts_once(self) -> None:
        # Groups of 3 + 10, 6 + 10, 2 + 1 and 4 + 1: the dearest to the first rank, then to the one with less.
        costs, shared = [1, 2, 3, 3, 1, 1, 2, 2], [10, 10, 10, 10, 1, 1, 1, 1]
        assert deal_rows(costs, 2, "aabbccdd", shared) == [[2, 3, 4, 5], [0, 1, 6, 7]]

    def test_a_group_that_fits_nowhere_is_dealt_row_by_row(self) -> None:
        # 3, 3, 3 to a rank each; the first 2 to the first of equal ranks, and so on.
        assert deal_rows([3, 3, 3, 2, 2, 2], 3, "aaabbb") == [[0, 3], [1, 4], [2, 5]]
        # The pair goes to the first rank whole; of the four, 1 to the second until it is full, and 1 to the first.
        assert deal_rows([9, 1, 1, 1, 1, 9], 2, "abbbba") == [[0, 4, 5], [1, 2, 3]]

    def test_of_equal_costs_the_earlier_row_goes_to_the_lower_rank(self) -> None:
        assert deal_rows([1, 1, 1, 1], 2) == deal_rows([1, 1, 1, 1], 2, "abcd") == [[0, 2], [1, 3]]

    def test_long_tails_are_spread(self) -> None:
        rng = random.Random(0)
        costs = [rng.lognormvariate(4, 0.8) for _ in range(64)]
        stock = [costs[:32], costs[32:]]
        ours = [[costs[row] for row in hand] for hand in deal_rows(costs, 2)]
        before, after = (slowest_over_mean([[sum(hand)] for hand in hands])[0] for hands in (stock, ours))
        assert 1.0 <= after < 1.01 < before

    def test_no_work_at_all_is_even(self) -> None:
        assert slowest_over_mean([[0, 0], [0, 0]]) == (1.0, 1.0)
        assert slowest_over_mean([[5.0]]) == (1.0, 1.0)


def batch(prompts: list[int], completions: list[int], group: int = 1) -> tuple[Any, Any, int]:
    """Rows of these lengths; `group` neighbours have one prompt."""
    width, columns = max(prompts), max(completions)
    mask = torch.tensor(
        [[0] * (width - p) + [1] * (p + c) + [0] * (columns - c) for p, c in zip(prompts, completions, strict=True)]
    )
    ids = mask * (1 + torch.arange(len(prompts)).unsqueeze(1) // group)
    return ids, mask, width


def planner(
    *savings: str, layouts: tuple[str, ...] = (), multiple: int | None = None, reach: int | None = None
) -> Any:
    host: Any = SimpleNamespace(pad_to_multiple_of=multiple)
    packed = None
    if layouts:
        packed = PackedForward(layouts, ForwardCosts(0.0, 0.0), reach, lambda: None)  # type: ignore[arg-type,return-value]
    return ForwardPlanner(host, savings, packed, lambda rows: 1)


ROWS = ([4, 4, 4, 4], [2, 6, 2, 2])


@pytest.mark.parametrize(
    ("savings", "over", "budget", "layout", "pieces"),
    [
        # Of 10 columns each.
        ((), {}, 25, "untrimmed", [[0, 1], [2, 3]]),
        # Widths of 10, 6, 6 and 6.
        (("trim",), {}, 18, "trim", [[1], [3, 2, 0]]),
        # Rounded up to 12 and 8.
        (("trim",), {"multiple": 4}, 18, "trim", [[1], [3, 2], [0]]),
        # The group with fewer tokens first.
        (("pack",), {"layouts": ("pack",)}, 16, "pack", [[2, 3], [0, 1]]),
        # The prompt of 4 is 3 tokens once, and a completion has the last token of the prompt in front of it.
        (("share",), {"layouts": ("share",)}, 16, "share", [[2, 3], [0, 1]]),
        (("share",), {"layouts": ("share",)}, 13, "share", [[2, 3], [0, 1]]),
        (("share",), {"layouts": ("share",)}, 12, "share", [[2, 3], [0], [1]]),
        # Longer than the window: an ordinary row.
        (("share",), {"layouts": ("share",), "reach": 5}, 13, "share", [[2, 3], [0], [1]]),
        # The cheapest of two layouts under the budget.
        (("trim", "pack"), {"layouts": ("trim", "pack")}, 28, "pack", [[2, 3, 0, 1]]),
    ],
)
def test_pieces_by_hand(savings: Any, over: Any, budget: int, layout: str, pieces: Any) -> None:
    ids, mask, prompts = batch(*ROWS, group=2)
    plan = planner(*savings, **over).plan(ids, mask, prompts, None, budget)
    assert (plan.layout, plan.pieces) == (layout, pieces)


def test_a_plan_leaves_out_what_has_no_gradient_and_takes_it_up_where_ranks_need_it() -> None:
    ids, mask, prompts = batch(*ROWS, group=2)
    plan = planner("trim").plan(ids, mask, prompts, torch.tensor([False, True, False, True]), 16)
    assert plan.pieces == [[1], [3]]
    assert plan.forwards == 2 and plan.in_forwards(2) == plan
    assert plan.in_forwards(4).pieces == [[1], [3], [0], [2]]


def test_a_rank_without_a_live_row_forwards_as_often_as_the_others() -> None:
    ids, mask, prompts = batch(*ROWS, group=2)
    plan = planner("trim").plan(ids, mask, prompts, torch.zeros(4, dtype=torch.bool), 16)
    assert plan.pieces == [] and plan.forwards == 1
    assert plan.in_forwards(1).pieces == [[0]] and plan.in_forwards(3).pieces == [[0], [2], [3]]


def test_the_most_of_the_ranks_is_asked_once() -> None:
    asked = []

    def gather(mine: Any) -> Any:
        asked.append(mine)
        return torch.cat([mine, torch.tensor([[1, 5]])])

    ranks: Any = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    assert most_of_ranks([3, 2], ranks) == [3, 5] and len(asked) == 1
    assert most_of_ranks([3, 2], SimpleNamespace(num_processes=1)) == [3, 2] and len(asked) == 1


def hands(rows: list[tuple[str, int, int, bool]], *savings: str, layouts: tuple[str, ...] = ()) -> list[list[int]]:
    """Deal rows of a prompt, its tokens and those of the completion, forwarded or not, to two ranks."""
    packed = PackedForward(layouts, ForwardCosts(0.0, 0.0), None, lambda: None) if layouts else None  # type: ignore[arg-type,return-value]
    dealer = RowDealer(None, SimpleNamespace(exact_savings=savings, packed=packed), None)  # type: ignore[arg-type]
    return dealer._hands([_Facts(RowLengths(hash(p), n, c), live) for p, n, c, live in rows], 2)


class TestHandsOfRanks:
    def test_rows_that_are_even_stay(self) -> None:
        rows = [("a", 2, 8, True), ("b", 2, 2, True), ("c", 2, 2, True), ("d", 2, 8, True)]
        assert hands(rows, "sort") == [[0, 1], [2, 3]]

    def test_the_long_rows_of_one_rank_are_shared_and_each_keeps_what_it_can(self) -> None:
        rows = [("a", 2, 9, True), ("b", 2, 8, True), ("c", 2, 2, True), ("d", 2, 1, True)]
        assert hands(rows, "sort") == [[0, 3], [1, 2]]

    def test_rows_without_a_gradient_cost_nothing_where_they_are_skipped(self) -> None:
        rows = [("a", 2, 8, True), ("b", 2, 8, True), ("c", 2, 8, False), ("d", 2, 8, False)]
        assert hands(rows, "sort", "skip") == [[0, 2], [1, 3]]
        assert hands([(p, n, c, False) for p, n, c, _ in rows], "sort", "skip") == [[0, 1], [2, 3]]

    def test_whole_groups_move_where_prompts_are_shared(self) -> None:
        rows = [("a", 9, 8, True)] * 2 + [("b", 9, 7, True)] * 2 + [("c", 9, 1, True)] * 2 + [("d", 9, 2, True)] * 2
        assert hands(rows, "sort", "share", layouts=("share",)) == [[0, 1, 4, 5], [2, 3, 6, 7]]
        alone = hands(rows, "sort", "pack", layouts=("pack",))
        assert sorted(len(hand) for hand in alone) == [4, 4] and alone[0] != [0, 1, 4, 5]


def test_the_budget_of_the_loss_may_be_the_larger_one(tmp_path: Any) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, loss_token_budget=100, score_token_budget=10, num_iterations=2)
    assert GRPOSettings.of(args).token_budgets == (100, 10)
    assert GRPOSettings.of(grpo_args(tmp_path, EffiGRPOConfig, loss_token_budget=0)).token_budgets == (0, 0)


def test_rows_that_are_cut_themselves_are_refused() -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(sequence_parallel_size=2))
    for budgets, name in (((0, 64), "score_token_budget=64"), ((32, 64), "loss_token_budget=32")):
        with pytest.raises(RefusedError, match=f"{name} does not work with sequence_parallel_size=2"):
            check_budgets(trainer, object, ("trim",), *budgets)
    check_budgets(trainer, object, (), 0, 0)


def test_scores_of_other_pieces_are_known_or_those_of_the_old_policy() -> None:
    old = torch.tensor([[-1.0], [-2.0], [-3.0]])
    pieces = PiecesInHand(Plan("trim", [[2], [0, 1]], [1, 1, 1]), old)
    live = torch.tensor([[-0.5]], requires_grad=True)
    parts, entropies, order = pieces.joined(live, torch.tensor([[9.0]]))
    assert order == [2, 0, 1] and torch.cat(parts).flatten().tolist() == [-0.5, -1.0, -2.0]
    assert torch.cat(entropies).flatten().tolist() == [9.0, 0.0, 0.0]
    parts, entropies, order = pieces.joined(torch.tensor([[-0.1], [-0.2]], requires_grad=True), torch.zeros(2, 1))
    assert order == [2, 0, 1] and torch.cat(parts).flatten().tolist() == pytest.approx([-0.5, -0.1, -0.2])
    assert [part.requires_grad for part in parts if part.numel()] == [False, True]


def test_scores_without_a_gradient_run_in_pieces_of_their_own_budget() -> None:
    ids, mask, prompts = batch(*ROWS)
    shapes = []

    def stock(model: Any, ids: Any, mask: Any, keep: int, **kwargs: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return (ids * mask)[:, -keep:].float(), None, None

    host: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
    )
    counts: list[tuple[int, int, int]] = []
    forward = LogProbForward(host, ("trim",), 1, lambda *count: counts.append(count), score_budget=18)
    with torch.no_grad():
        # More rows at once than the number of rows that TRL asks for.
        scores, _, _ = forward(stock, None, ids, mask, 6, batch_size=1)  # type: ignore[arg-type]
    assert shapes == [(1, 10), (3, 6)]
    assert torch.equal(scores, (ids * mask)[:, prompts:].float())
    real, forwarded, saved = (sum(values) for values in zip(*counts, strict=True))
    assert (real, forwarded, saved) == (28, 28, 12)
