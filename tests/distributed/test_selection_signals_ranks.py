"""
Two gloo ranks: side columns, rewards of groups that lie on both, statistics of tokens, transforms and demonstrations.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi.errors import RewardError
from hf_effi.selection import OTB, HybridGate, OBLRBaseline, group_reward, side_column
from hf_effi.trainers.grpo.advantages import Advantages
from hf_effi.trainers.grpo.rows import Generation, Rows
from tests.helpers import TableReward, assert_bitwise_equal, binary_hash_reward, run_distributed, weights_of
from tests.training import test_selection_advantages as advantages
from tests.training import test_selection_hybrid as hybrid
from tests.training import test_selection_rewards as rewards


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def of_groups() -> dict[str, Any]:
    """Groups of four on two ranks with two rows each."""
    seen: list[tuple[list[str], list[str], list[str]]] = []
    local: list[list[str]] = []

    def shortest(prompts: Any, completions: Any, group_size: int, answer: Any, **kwargs: Any) -> list[float]:
        seen.append((list(prompts), list(completions), list(answer)))
        found: list[float] = []
        for first in range(0, len(completions), group_size):
            group = completions[first : first + group_size]
            found += [float(len(text) == min(map(len, group))) for text in group]
        return found

    def length(completions: Any, **kwargs: Any) -> list[float | None]:
        local.append(list(completions))
        return [None if len(text) == 1 else float(len(text)) for text in completions]

    trainer = rewards.train(
        tempfile.mkdtemp(),
        [group_reward(shortest), side_column(length)],
        per_device_train_batch_size=2,
        max_steps=2,
        log_completions=False,
    )
    return {
        "seen": seen,
        "local": local,
        "side": [side["length"].tolist() for side in trainer.sides],
        "rewards": trainer._rollouts.rewards.tolist(),
        "advantages": [batch["advantages"].tolist() for batch in trainer.batches],
        "weights": weights_of(trainer.model),
        "logged": rewards.logged(trainer, "rewards/length/mean"),
    }


def failing() -> str:
    def fails(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        if rank() == 1:
            raise KeyError("answer")
        return [0.0] * len(completions)

    try:
        rewards.train(tempfile.mkdtemp(), group_reward(fails), per_device_train_batch_size=2, max_steps=1)
    except RewardError as error:
        return str(error)
    return "nothing was raised"


def transformed() -> dict[str, Any]:
    found = {}
    for name, transform in {"otb": OTB(), "oblr": OBLRBaseline("energies")}.items():
        stats: list[Any] = []

        def look(groups: Any, transform: Any = transform, stats: Any = stats) -> torch.Tensor:
            stats.append((groups.token_stats.logps, groups.token_stats.sum_sq_probs, groups.weighted_rewards))
            return transform(groups)

        look.needs_token_stats = True  # type: ignore[attr-defined]
        trainer = advantages.train(tempfile.mkdtemp(), look, binary_hash_reward, per_device_train_batch_size=2)
        found[name] = {
            "stats": stats,
            "weights": weights_of(trainer.model),
            "mine": [batch["advantages"] for batch in trainer.batches],
            "dead": advantages.metric(trainer, "effi/frac_zero_var_groups"),
        }
    return found


def statistics_of_other_widths() -> torch.Tensor:
    """The longest completion of rank 0 has three tokens, that of rank 1 four."""
    trainer = advantages.train(tempfile.mkdtemp(), None, per_device_train_batch_size=2, max_steps=1)
    shape = (2, 3 + rank())
    mine = (torch.full(shape, -1.0), torch.ones(shape), torch.ones(shape, dtype=torch.bool))
    generation = Generation(mine=[Rows({})])
    Advantages(trainer, OTB(), lambda rows: mine).add_stats(generation)
    return generation.stats[0].mask


class Counting(hybrid.Spy):
    """Counts forwards, with and without a gradient."""

    forwards = 0

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        unwrapped = self.accelerator.unwrap_model(model)
        if not getattr(unwrapped, "_counted", False):
            unwrapped._counted = True
            unwrapped.register_forward_hook(lambda *a: setattr(self, "forwards", self.forwards + 1))
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)


def demonstrated(rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    full = hybrid.train(
        tempfile.mkdtemp(),
        TableReward([[0.0] * 4]),
        HybridGate(gamma=4),
        per_device_train_batch_size=rows,
        **hybrid.SGD,
    )
    found["sft"] = hybrid.update(full)
    for name, over in {"plain": {}, "reused": {"num_iterations": 2}, "budget": {"loss_token_budget": 30}}.items():
        trainer = hybrid.train(
            tempfile.mkdtemp(),
            TableReward([[0.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 4]),
            HybridGate(),
            cls=Counting,
            per_device_train_batch_size=rows,
            **over,
        )
        found[name] = {
            "weights": weights_of(trainer.model),
            "forwards": trainer.forwards,
            "fraction": hybrid.metric(trainer, "effi/hybrid/sft_fraction"),
            "tokens": hybrid.metric(trainer, "effi/hybrid/sft_tokens"),
            "loss": hybrid.metric(trainer, "effi/hybrid/sft_loss"),
            "mine": [int((b["effi_demonstration"] > 0).sum()) for b in trainer.batches if "effi_demonstration" in b],
        }
    return found


def everything(folder: Path) -> dict[str, Any]:
    return {
        "widths": statistics_of_other_widths(),
        "groups": of_groups(),
        "failing": failing(),
        "transformed": transformed(),
        "hybrid": demonstrated(4),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks did; one start of two processes for all tests."""
    return run_distributed(everything, 2, tmp_path_factory.mktemp("ranks"))


def test_a_group_on_two_ranks_is_seen_whole_on_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (one["groups"] for one in ranks)
    assert first["seen"] == second["seen"] and len(first["seen"]) == 2
    for (prompts, completions, answers), mine, other in zip(
        first["seen"], first["local"], second["local"], strict=True
    ):
        assert completions == mine + other and len(set(prompts)) == 1 and len(set(answers)) == 1
    assert first["rewards"] == second["rewards"] and len(first["rewards"]) == 4
    assert max(value for (value,) in first["rewards"]) == 1.0
    assert_bitwise_equal(first["weights"], second["weights"])


def test_side_columns_are_gathered_in_the_order_of_the_rows(ranks: list[dict[str, Any]]) -> None:
    first, second = (one["groups"] for one in ranks)
    for side, other_side, mine, other in zip(
        first["side"], second["side"], first["local"], second["local"], strict=True
    ):
        expected = [math.nan if len(text) == 1 else float(len(text)) for text in mine + other]
        assert side == pytest.approx(expected, nan_ok=True) and other_side == pytest.approx(expected, nan_ok=True)
    assert first["logged"] == second["logged"]


def test_an_error_of_one_rank_is_raised_on_both(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["failing"] == ranks[1]["failing"]
    assert "group reward 'fails' failed on rank 1: KeyError: 'answer'" in ranks[0]["failing"]


def test_statistics_of_completions_of_any_length_are_gathered(ranks: list[dict[str, Any]]) -> None:
    for one in ranks:
        assert one["widths"].dtype == torch.bool
        assert one["widths"].sum(1).tolist() == [3, 3, 4, 4]


def test_statistics_and_advantages_agree(ranks: list[dict[str, Any]]) -> None:
    for name, one in ranks[0]["transformed"].items():
        other = ranks[1]["transformed"][name]
        assert one["stats"] and len(one["stats"]) == len(other["stats"])
        for mine, theirs in zip(one["stats"], other["stats"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), name
            assert mine[0].shape[:2] == (1, 4)
        assert_bitwise_equal(one["weights"], other["weights"], what=name)
        assert one["dead"] == other["dead"]
        if name == "oblr":
            for mine, theirs, (_, _, reward) in zip(one["mine"], other["mine"], one["stats"], strict=True):
                together = torch.cat([mine, theirs])
                assert bool((together != 0).any()) == bool((reward != reward[0, 0]).any())


def test_demonstrations_agree_and_no_rank_forwards_more_often(ranks: list[dict[str, Any]]) -> None:
    for name in ("plain", "reused", "budget"):
        first, second = (one["hybrid"][name] for one in ranks)
        assert_bitwise_equal(first["weights"], second["weights"], what=name)
        assert first["forwards"] == second["forwards"] > 0, name
        for key in ("fraction", "tokens", "loss"):
            assert first[key] == second[key], (name, key)
        shown = [a + b for a, b in zip(first["mine"], second["mine"], strict=True)]
        assert sum(shown) == 2 * sum(first["fraction"][: len(first["fraction"])]), name


def test_one_rank_learns_the_same_from_demonstrations(ranks: list[dict[str, Any]]) -> None:
    """The same prompts on one rank: their demonstrations are all that moves the weights."""
    alone = hybrid.train(
        tempfile.mkdtemp(), TableReward([[0.0] * 4]), HybridGate(gamma=4), per_device_train_batch_size=8, **hybrid.SGD
    )
    assert hybrid.error(ranks[0]["hybrid"]["sft"], hybrid.update(alone)) < 1e-5
    assert hybrid.error(hybrid.update(alone), hybrid.sft_update(alone.batches)) < 1e-5
