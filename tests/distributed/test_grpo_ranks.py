"""Two gloo ranks under real DDP: agreement, parity with stock, parity with one rank under a fixed reward table."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    TableReward,
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_distributed,
    run_grpo,
    weights_of,
)

TABLE = [[0.0] * 4, [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0] * 4]


class Recording(EffiGRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.batches.append({k: v.clone() for k, v in batch.items() if isinstance(v, torch.Tensor)})
        return batch


def one(cls: type, table: Any = None, size: int = 16, resume: str | None = None, **over: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
    }
    folder = over.pop("folder", None) or tempfile.mkdtemp()
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    return run_grpo(
        cls,
        grpo_args(folder, config, **{**settings, **over}),
        reward_funcs=TableReward(table) if table else binary_hash_reward,
        train_dataset=prompt_dataset(size),
        resume_from_checkpoint=resume,
    )


def parity(cases: tuple[tuple[str, int], ...]) -> list[Any]:
    out = []
    for loss_type, iterations in cases:
        flat = "share" if loss_type == "bnpo" else "sort,share"
        stock, off, on, shared = (
            weights_of(one(cls, loss_type=loss_type, num_iterations=iterations, **more).model)
            for cls, more in (
                (GRPOTrainer, {}),
                (EffiGRPOTrainer, {"exact_savings": "off"}),
                (EffiGRPOTrainer, {"forward_buckets": 2}),
                (EffiGRPOTrainer, {"exact_savings": flat}),
            )
        )
        out.append((loss_type, stock, off, on, shared))
    return out


def test_off_is_stock_to_the_bit_and_on_has_its_gradients() -> None:
    # Each loss, and each setting of flat rows with one and with two passes over a generation.
    ranks = run_distributed(parity, 2, (("dapo", 1), ("grpo", 2), ("bnpo", 1), ("bnpo", 2)))
    for (loss_type, stock, off, on, shared), (_, other, _, other_on, other_shared) in zip(*ranks, strict=True):
        assert_bitwise_equal(stock, off, what=f"{loss_type} off")
        assert_bitwise_equal(stock, other, what="ranks")
        assert_bitwise_equal(on, other_on, what="ranks with savings")
        assert_bitwise_equal(shared, other_shared, what="ranks with shared prompts")
        for name in stock:
            assert torch.allclose(stock[name], on[name], atol=1e-6), (loss_type, name)
            assert torch.allclose(stock[name], shared[name], atol=1e-6), (loss_type, name)


def forwards(savings: str = "auto") -> list[int]:
    """Small micro-batches, old log-probs, dead groups that differ between the ranks: the forwards of each pass."""
    counts = []

    class Counting(EffiGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.calls = 0
            self.model.get_input_embeddings().register_forward_pre_hook(self.called)

        def called(self, *args: Any) -> None:
            self.calls += 1

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            before = self.calls
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            counts.append(self.calls - before)
            return out

    # Dead, dead, mixed, mixed, dead: two groups with a gradient on the first rank, one on the second.
    rows = [TABLE[0], TABLE[0], TABLE[1], TABLE[1], TABLE[0]]
    one(
        Counting,
        table=rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        num_iterations=2,
        max_steps=2,
        exact_savings=savings,
    )
    return counts


@pytest.mark.parametrize("savings", ["auto", "skip,share"])
def test_ranks_run_the_same_number_of_forwards(savings: str) -> None:
    first, second = run_distributed(forwards, 2, savings)
    # 8 for the old log-probs of 16 rows, 2 at a time, and at the first flat row those that ask the model about it.
    assert first == second and max(first) >= 8 and len(first) == 18


METHODS = {
    "filter": {"difficulty_range": (0, 1), "table": TABLE},
    "band": {"difficulty_range": (0.4, 0.6), "table": TABLE},
    "shrink": {
        "difficulty_range": (0.4, 0.6),
        "table": TABLE,
        "difficulty_underfill": "shrink",
        "difficulty_max_rounds": 1,
    },
    "rank": {"prune_rate": 0.5, "prune_scope": "rank", "size": 32},
    "group": {"prune_rate": 0.5, "prune_scope": "group", "size": 32},
    "global": {"prune_rate": 0.5, "prune_scope": "global", "size": 32},
    "both": {"prune_rate": 0.75, "difficulty_range": (0, 1), "num_iterations": 2, "size": 64, "table": TABLE},
    # A group spans both ranks: 16 completions, 8 rows per rank and micro-batch.
    "straddle": {
        "prune_rate": 0.5,
        "prune_scope": "global",
        "num_generations": 16,
        "gradient_accumulation_steps": 1,
        "size": 32,
    },
}


def selections() -> dict[str, Any]:
    out = {}
    for name, over in METHODS.items():
        trainer = one(Recording, **over)
        out[name] = {
            "weights": weights_of(trainer.model),
            "rows": [batch["advantages"].numel() for batch in trainer.batches],
            "items": [float(batch["num_items_in_batch"]) for batch in trainer.batches],
            "tokens": [float(batch["completion_mask"].sum()) for batch in trainer.batches],
            "advantages": [batch["advantages"] for batch in trainer.batches],
            "log": trainer.state.log_history,
        }
    return out


def test_ranks_agree_on_every_choice() -> None:
    first, second = run_distributed(selections, 2)
    for name in METHODS:
        a, b = first[name], second[name]
        assert_bitwise_equal(a["weights"], b["weights"], what=name)
        assert a["rows"] == b["rows"], name
        expected = 8 if METHODS[name].get("gradient_accumulation_steps") == 1 else 16
        if name != "shrink":
            assert a["rows"] == [expected] * len(a["rows"]), name
        # The normaliser is the number of kept tokens of all ranks.
        assert a["items"] == b["items"] == [x + y for x, y in zip(a["tokens"], b["tokens"], strict=True)], name
    for rank in (first, second):
        assert all(bool((advantages != 0).all()) for advantages in rank["filter"]["advantages"])


def kept_by_group(world: int) -> list[float]:
    """Same global batch on one and on two ranks: 8 groups of 4 per step."""
    trainer = one(
        Recording,
        table=TABLE,
        size=32,
        per_device_train_batch_size=16 // world,
        difficulty_range=(0.2, 0.8),
        max_steps=2,
    )
    return [
        entry["effi/dropped/too_hard"] + 1000 * entry["effi/dropped/too_easy"] + 1e6 * entry["effi/reward_kept"]
        for entry in trainer.state.log_history
        if "effi/reward_kept" in entry
    ]


def test_the_same_table_gives_the_same_choice_at_one_and_two_ranks() -> None:
    alone = run_distributed(kept_by_group, 1, 1)[0]
    together = run_distributed(kept_by_group, 2, 2)
    assert alone == together[0] == together[1]


def resume_run(folder: str) -> list[Any]:
    over = {"num_iterations": 2, "prune_rate": 0.5, "prune_scope": "global", "size": 32, "max_steps": 5}
    whole = one(EffiGRPOTrainer, folder=f"{folder}/a", save_strategy="steps", save_steps=1, **over)
    resumed = one(EffiGRPOTrainer, folder=f"{folder}/b", resume=f"{folder}/a/checkpoint-3", **over)
    return [weights_of(whole.model), weights_of(resumed.model)]


def test_resume_inside_a_generation_at_two_ranks(tmp_path: Any) -> None:
    for whole, resumed in run_distributed(resume_run, 2, str(tmp_path)):
        assert_bitwise_equal(whole, resumed)


def one_bad_rank(folder: str) -> str:
    import os

    def reward(completions: list[str], **kwargs: Any) -> Any:
        return None if os.environ["RANK"] == "1" else [1.0] * len(completions)

    try:
        run_grpo(EffiGRPOTrainer, grpo_args(folder, EffiGRPOConfig), reward_funcs=reward)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_bad_reward_on_one_rank_stops_both_with_the_same_sentence(tmp_path: Any) -> None:
    first, second = run_distributed(one_bad_rank, 2, str(tmp_path))
    assert first == second and "reward function 'reward' returned None" in first


@pytest.mark.parametrize("value", [1])
def test_the_runner_itself_sees_two_ranks(value: int) -> None:
    assert run_distributed(_world, 2) == [2, 2]


def _world() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])
