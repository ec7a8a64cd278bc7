"""HPT's gate without a trainer: the truth table, settings, and the rows that demonstrations become."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_effi.functional.rollouts import DEMONSTRATION, gate_groups, loss_mask, rows_with_gradient, take_rows
from hf_effi.protocols import RolloutGroups
from hf_effi.selection import HybridGate
from hf_effi.trainers.grpo.hybrid import Hybrid, with_demonstrations
from hf_effi.trainers.grpo.rows import Rows


@pytest.mark.parametrize(
    ("gamma", "upper", "expected"),
    [
        (-1, None, [0, 0, 0, 0, 0]),
        (0, None, [1, 0, 0, 0, 0]),
        (2, None, [1, 1, 1, 0, 0]),
        (4, None, [1, 1, 1, 1, 1]),
        (0, 1, [1, 2, 0, 0, 0]),
        (1, 4, [1, 1, 2, 2, 2]),
        (-1, 0, [2, 0, 0, 0, 0]),
    ],
)
def test_truth_table(gamma: int, upper: int | None, expected: list[int]) -> None:
    right, none = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    there = torch.ones(5, dtype=torch.bool)
    assert gate_groups(right, none, there, gamma, upper).tolist() == expected
    assert gate_groups(right, none, ~there, gamma, upper).tolist() == [0] * 5
    # One that could not be checked may have been right.
    assert gate_groups(right, none + 1, there, gamma, upper).tolist()[:4] == expected[1:]
    groups = RolloutGroups(
        (torch.arange(4).expand(5, 4) < right.unsqueeze(1)).float(), torch.zeros(5, 4), torch.ones(5, 4), step=0
    )
    gate = HybridGate(gamma=gamma, upper=upper, success_at=1.0)
    assert gate.decide(groups, ["4"] * 5).tolist() == expected and gate.on == (expected != [0] * 5)


def test_places_that_are_not_there_are_no_completions() -> None:
    present = torch.tensor([[True, True, False, False]])
    groups = RolloutGroups(
        torch.tensor([[0.0, 0.0, math.nan, math.nan]]),
        torch.zeros(1, 4),
        torch.ones(1, 4),
        step=0,
        present=present,
        pass_rates=torch.zeros(1).double(),
    )
    assert HybridGate().decide(groups, ["4"]).tolist() == [1]
    assert HybridGate().decide(groups, [None]).tolist() == [0]


def test_rewards_that_are_neither_right_nor_wrong_are_named() -> None:
    groups = RolloutGroups(torch.tensor([[0.3, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2), step=0)
    with pytest.raises(ValueError, match="give the lowest reward of a right answer by success_at="):
        HybridGate().decide(groups, ["4"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"column": ""}, "column=''"),
        ({"gamma": -2}, "gamma=-2"),
        ({"gamma": True}, "gamma=True"),
        ({"gamma": 0.5}, "gamma=0.5"),
        ({"upper": 0}, "upper=0 must be an integer over gamma=0"),
        ({"upper": 2.0}, "upper=2.0"),
        ({"sft_coef": 0.0}, "sft_coef=0.0"),
        ({"sft_coef": math.nan}, "sft_coef=nan"),
        ({"success_at": math.inf}, "success_at=inf"),
    ],
)
def test_bad_settings(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HybridGate(**arguments)


def batch(**more: Any) -> dict[str, Any]:
    ids = torch.tensor([[5, 6, 0], [7, 8, 9], [4, 0, 0]])
    return {
        "completion_ids": ids,
        "completion_mask": (ids > 0).long(),
        "advantages": torch.tensor([1.0, 2.0, 3.0]),
        "num_items_in_batch": torch.tensor(6),
        **more,
    }


def test_a_demonstration_is_forwarded_and_in_no_loss_of_trl() -> None:
    given = batch(old_per_token_logps=torch.full((3, 3), -1.0), ref_per_token_logps=torch.full((3, 3), -2.0))
    found = with_demonstrations(Rows(given), {1, 2}, {1: [3, 3, 3, 3, 2]}, 0.25, 0)
    assert found["completion_mask"].sum(1).tolist() == [2, 5, 0] and loss_mask(found).sum(1).tolist() == [2, 0, 0]
    assert found["completion_ids"][1].tolist() == [3, 3, 3, 3, 2] and found["completion_ids"].shape == (3, 5)
    assert found["old_per_token_logps"].shape == (3, 5) and not found["old_per_token_logps"][1:].any()
    assert found["advantages"].tolist() == [1.0, 0.0, 0.0] and found[DEMONSTRATION].tolist() == [0.0, 0.25, 0.0]
    assert rows_with_gradient(found).tolist() == [True, True, False]
    assert take_rows(found, [1])[DEMONSTRATION].tolist() == [0.25]
    # What was given is as it was.
    assert given["completion_ids"].shape == (3, 3) and given["advantages"].tolist() == [1.0, 2.0, 3.0]
    assert "tool_mask" not in given


def test_entries_of_other_shapes_keep_them() -> None:
    ratios = torch.tensor([[0.5], [0.25], [2.0]])
    one = batch(
        importance_sampling_ratio=ratios,
        completion_ids=torch.tensor([[5], [6], [7]]),
        completion_mask=torch.ones(3, 1).long(),
    )
    per_row = with_demonstrations(Rows(one), {0}, {0: [1, 2]}, 1.0, 0, pads_ratio=False)
    assert per_row["importance_sampling_ratio"].tolist() == [[1.0], [0.25], [2.0]]
    per_token = with_demonstrations(Rows(one), {0}, {0: [1, 2]}, 1.0, 0)
    assert per_token["importance_sampling_ratio"].tolist() == [[1.0, 1.0], [0.25, 1.0], [2.0, 1.0]]
    tokens = with_demonstrations(Rows(batch(advantages=torch.ones(3, 3))), {0}, {}, 1.0, 0)
    assert tokens["advantages"].tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3]
    assert tokens[DEMONSTRATION].tolist() == [0.0] * 3


def hybrid(**over: Any) -> Hybrid:
    host = SimpleNamespace(
        args=SimpleNamespace(steps_per_generation=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        loss_type="dapo",
        train_dataset=None,
        _metrics={"train": defaultdict(list)},
        **over,
    )
    made = Hybrid(host, None, SimpleNamespace(counts=defaultdict(int), nll=0.0))  # type: ignore[arg-type]
    made._gate = HybridGate(sft_coef=2.0)
    return made


class Budget:
    """Calls the loss once."""

    def loss(self, stock: Any, model: Any, inputs: Any) -> Any:
        return stock(model, inputs)


def test_the_term_is_weighted_and_trl_sees_no_extreme_log_prob() -> None:
    found = with_demonstrations(Rows(batch()), {1}, {1: [3, 2]}, 0.5, 0)
    logps = torch.tensor([[-1.0, -1.0, 0.0], [-100.0, -3.0, 0.0], [-1.0, 0.0, 0.0]], requires_grad=True)
    seen = []
    made = hybrid()

    def stock(model: Any, inputs: Any) -> torch.Tensor:
        shown, entropies, aux = made.seen((logps, None, None))
        seen.append(shown)
        return (shown * loss_mask(inputs)).sum()

    loss = made.loss(Budget(), stock, None, found)
    assert float(loss) == pytest.approx(-3.0 + 2.0 * 0.5 * 103.0)
    assert seen[0][1].tolist() == [-30.0, -3.0, 0.0]
    loss.backward()
    assert logps.grad is not None and logps.grad.tolist() == [[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [1.0, 0.0, 0.0]]
    assert made._accounting.nll == 103.0 and made._accounting.counts["effi/hybrid/sft_tokens"] == 2
    # A batch without demonstrations is left alone, and so is what is forwarded outside of a loss.
    assert made.seen((logps, None, None))[0] is logps
    plain = made.loss(Budget(), lambda model, inputs: torch.tensor(1.0), None, batch())
    assert float(plain) == 1.0
