"""What a newcomer gets wrong: each case is a clear error or a counted behaviour, and nothing trained is lost."""

from __future__ import annotations

import itertools
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from trl import GRPOTrainer, SFTTrainer

from hf_effi import EffiSFTConfig, EffiSFTTrainer
from hf_effi.errors import RefusedError, RewardError
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    push_args,
    run_grpo,
    tiny_gpt2,
    tiny_qwen3,
    weights_in,
)


def config(tmp_path: Path, **over: Any) -> EffiGRPOConfig:
    return grpo_args(tmp_path, EffiGRPOConfig, **over)


def train(tmp_path: Path, rewards: Any = binary_hash_reward, data: Any = None, **over: Any) -> Any:
    kwargs = {name: over.pop(name) for name in ("rollout_func", "tools") if name in over}
    return run_grpo(EffiGRPOTrainer, config(tmp_path, **over), reward_funcs=rewards, train_dataset=data, **kwargs)


@pytest.mark.parametrize(
    ("over", "error", "message"),
    [
        ({"prune_rate": 1.0}, ValueError, r"prune_rate must be in \[0, 1\), got 1.0"),
        ({"prune_rate": -0.5}, ValueError, r"prune_rate must be in \[0, 1\)"),
        ({"prune_rate": "half"}, TypeError, "prune_rate must be a number"),
        ({"prune_rate": 0.6}, ValueError, r"Nearest: 0.5 \(R=2\) or 0.6667 \(R=3\)"),
        ({"prune_rate": 0.75, "prune_scope": "group"}, ValueError, "does not divide num_generations=2"),
        ({"prune_rate": 0.2, "prune_allocation": False, "steps_per_generation": 2}, ValueError, "split evenly"),
        ({"prune_rate": 0.5, "prune_scope": "node"}, ValueError, "prune_scope must be one of"),
        ({"prune_rate": 0.5, "prune_metric": "top"}, ValueError, "prune_metric must be one of"),
        ({"prune_rate": 0.5, "prune_normalizer": "mean"}, ValueError, "prune_normalizer must be one of"),
        (
            {"prune_rate": 0.5, "prune_metric": "random", "prune_balance_signs": True},
            ValueError,
            "no meaning with prune_metric='random'",
        ),
        ({"difficulty_range": (0.8, 0.2)}, ValueError, "0 <= low < high <= 1, got"),
        ({"difficulty_range": (0.2,)}, ValueError, "must be two numbers"),
        ({"difficulty_range": "easy"}, ValueError, "must be two numbers"),
        ({"difficulty_max_rounds": 0}, ValueError, "difficulty_max_rounds must be an int >= 1"),
        ({"difficulty_underfill": "stop"}, ValueError, "difficulty_underfill must be one of 'fill', 'shrink'"),
        ({"exact_savings": "fast"}, ValueError, "unknown saving 'fast'"),
        ({"exact_savings": True}, TypeError, "exact_savings must be a string"),
        ({"forward_buckets": -1}, ValueError, "forward_buckets must be >= 0"),
        ({"forward_buckets": 1.5}, TypeError, "forward_buckets must be an int"),
        ({"loss_token_budget": -1}, ValueError, "loss_token_budget must be at least 1 token"),
        ({"loss_token_budget": True}, TypeError, "loss_token_budget must be a number of tokens"),
        (
            {"score_token_budget": 99.5, "num_iterations": 2},
            TypeError,
            "score_token_budget must be a number of tokens",
        ),
        ({"score_token_budget": 64}, ValueError, "score_token_budget=64 acts only where log-probs are computed"),
        ({"num_generations": 1}, ValueError, "at least 2"),
    ],
)
def test_config_errors_come_before_a_model_is_loaded(tmp_path: Path, over: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        config(tmp_path, **over)


def constant(value: Any) -> Any:
    def reward(completions: list[str], **kwargs: Any) -> Any:
        return value(len(completions)) if callable(value) else value

    reward.__name__ = "my_reward"
    return reward


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "reward function 'my_reward' returned None.*Is a `return` missing"),
        (lambda n: [1.0] * (n + 1), "'my_reward' returned 5 rewards, but 4 were expected"),
        (lambda n: [], "'my_reward' returned 0 rewards"),
        (1.0, "'my_reward' returned float 1.0. It must return a list"),
        ("good", "'my_reward' returned str 'good'"),
        (lambda n: ["good"] * n, "returned 'good' for completion 0. A reward must be a finite number"),
        (lambda n: [float("inf")] * n, "returned inf for completion 0"),
        (lambda n: torch.zeros(n, 2), r"returned \[0.0, 0.0\] for completion 0"),
        # Finite in double precision, infinite in float32, which the advantages are computed in.
        (lambda n: [1.0, -1e39] * (n // 2), r"returned -1e\+39 for completion 1.*finite number in float32"),
        (lambda n: [10**400] * n, "returned 1000.*for completion 0.*finite number in float32"),
        (lambda n: [1.0, 3e38] * (n // 4) + [3e38] * (n // 2), "add up to more than float32 holds.*returned 3e"),
        (lambda n: [3e38] * n, "'my_reward' returned 3e.*Divide its rewards by a constant"),
        (lambda n: [1j] * n, "returned 1j for completion 0"),
        (lambda n: [torch.ones(3)] * n, "returned tensor.* for completion 0"),
        (lambda n: (1.0 for _ in range(n - 1)), "'my_reward' returned 3 rewards, but 4 were expected"),
        (lambda n: itertools.repeat(1.0), "'my_reward' returned more than 4 rewards, but 4 were expected"),
    ],
)
def test_bad_rewards_are_named(tmp_path: Path, returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        train(tmp_path, constant(returned))


@pytest.mark.parametrize(
    "returned",
    [
        lambda n: torch.arange(n).float(),
        lambda n: np.arange(n),
        lambda n: tuple(range(n)),
        lambda n: [torch.tensor(float(i)) for i in range(n)],
        lambda n: [True, False] * (n // 2),
        lambda n: [None, 1.0] * (n // 2),
        lambda n: [float("nan"), 1.0] * (n // 2),
        lambda n: [np.bool_(i % 2) for i in range(n)],
        lambda n: [np.isclose(i, 1) for i in range(n)],
        lambda n: (float(i % 2) for i in range(n)),
        lambda n: map(float, range(n)),
        lambda n: {i: float(i) for i in range(n)}.values(),
        lambda n: [Decimal(i) for i in range(n)],
        lambda n: [Fraction(i, 3) for i in range(n)],
        lambda n: torch.arange(n).float()[:, None],
        lambda n: [torch.tensor([float(i)]) for i in range(n)],
        lambda n: [np.float16(i) for i in range(n)],
    ],
)
def test_reasonable_rewards_are_taken(tmp_path: Path, returned: Any) -> None:
    trainer = train(tmp_path, constant(returned), max_steps=1)
    assert_bitwise_equal(
        run_grpo(GRPOTrainer, grpo_args(tmp_path, max_steps=1), reward_funcs=constant(returned)).model,
        train(tmp_path, constant(returned), max_steps=1, exact_savings="off").model,
    )
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_an_async_reward_is_checked_too(tmp_path: Path) -> None:
    async def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0]

    with pytest.raises(RewardError, match="'reward' returned 1 rewards, but 4 were expected"):
        train(tmp_path, reward)


def test_all_rewards_missing_trains_on_nothing_and_says_so(tmp_path: Path) -> None:
    trainer = train(tmp_path, constant(lambda n: [None] * n), difficulty_range=(0.2, 0.8), max_steps=2)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["grad_norm"] for entry in logs] == [0.0, 0.0]
    assert logs[0]["effi/underfilled"] == 1.0 and logs[0]["effi/dropped/unscorable"] > 0


def test_a_reward_that_breaks_later_loses_nothing(tmp_path: Path) -> None:
    calls = []

    def reward(completions: list[str], **kwargs: Any) -> Any:
        calls.append(1)
        return None if len(calls) == 4 else binary_hash_reward(completions)

    with pytest.raises(RewardError) as caught:
        train(tmp_path, reward, max_steps=6)
    assert "The 3 finished steps were saved" in caught.value.__notes__[0]
    train(tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3)
    assert_bitwise_equal(weights_in(tmp_path / "whole" / "checkpoint-3"), weights_in(tmp_path / "checkpoint-3"))
    resumed = run_grpo(
        EffiGRPOTrainer, config(tmp_path, max_steps=6), resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert resumed.state.global_step == 6


def test_datasets_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        train(tmp_path, data=prompt_dataset(4).select([]))
    with pytest.raises(ValueError, match="no `prompt` column; its columns are question.*rename_column"):
        train(tmp_path, data=Dataset.from_dict({"question": ["1+1="]}))
    with pytest.raises(
        ValueError, match="has 3 prompts, but one generation batch needs 4 .* x 2 for prune_allocation"
    ):
        train(tmp_path, data=prompt_dataset(3), prune_rate=0.5)


@pytest.mark.parametrize(
    "data", [DatasetDict(train=prompt_dataset(4)), DatasetDict(), {"train": 1}, [{"prompt": "1+"}]]
)
def test_what_is_no_dataset_gets_the_message_of_stock(tmp_path: Path, data: Any) -> None:
    message = "`train_dataset` must be a `Dataset` or `IterableDataset`, got"
    for trainer in (GRPOTrainer, EffiGRPOTrainer):
        with pytest.raises(TypeError, match=message):
            run_grpo(trainer, config(tmp_path), train_dataset=data)
    for trainer in (SFTTrainer, EffiSFTTrainer):
        with pytest.raises(TypeError, match=message):
            trainer(tiny_qwen3(), push_args(tmp_path, EffiSFTConfig), train_dataset=data)


def test_a_completion_may_be_as_long_as_the_generation_settings_say(tmp_path: Path) -> None:
    over = {"max_completion_length": None, "generation_kwargs": {"max_length": 24}, "max_steps": 2}
    stock = run_grpo(GRPOTrainer, grpo_args(tmp_path, **over))
    ours = train(tmp_path, exact_savings="off", **over)
    assert_bitwise_equal(stock.model, ours.model)
    assert train(tmp_path, difficulty_range=(0, 1), prune_rate=0.5, **over).state.global_step == 2


def test_streaming_data_works_without_refills_and_is_named_with_them(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(prompt_dataset(16).to_list()))
    assert train(tmp_path, data=stream, max_steps=2).state.global_step == 2
    with pytest.raises(RefusedError, match="streaming dataset cannot serve.*difficulty_max_rounds=1"):
        train(tmp_path, data=stream, difficulty_range=(0, 1))
    filtered = train(tmp_path, data=stream, difficulty_range=(0, 1), difficulty_max_rounds=1, max_steps=2)
    assert filtered.state.global_step == 2


def test_a_prompt_longer_than_the_model(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": ["1+" * 300, "1+1="] * 8})
    # Learned positions: the lookup would fail deep inside.
    with pytest.raises(
        RefusedError, match="prompt of 600 tokens and max_completion_length=8 do not fit into the model's 256"
    ):
        run_grpo(EffiGRPOTrainer, config(tmp_path), model=tiny_gpt2(), train_dataset=data)
    # They fit where completions end in time: stock trains, and so do we.
    data = Dataset.from_dict({"prompt": ["1+" * 125, "1+1="] * 8})
    model = tiny_gpt2(end_tokens=96)
    trainer = run_grpo(EffiGRPOTrainer, config(tmp_path, max_steps=2), model=model, train_dataset=data)
    assert trainer.state.global_step == 2
    data = Dataset.from_dict({"prompt": ["1+" * 300, "1+1="] * 8})
    # Rotary positions: counted and logged, and the run goes on.
    trainer = train(tmp_path, data=data, max_steps=2)
    counts = [e["effi/rows_over_max_positions"] for e in trainer.state.log_history if "grad_norm" in e]
    assert sum(counts) > 0 and trainer.state.global_step == 2


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    ids = [[5, 6, 7]] * len(prompts)
    out = [[8 + i % 3] * (1 + i % 4) for i in range(len(prompts))]
    return {"prompt_ids": ids, "completion_ids": out, "logprobs": [[-1.0] * len(row) for row in out]}


def test_rollout_func_passes_through(tmp_path: Path) -> None:
    assert train(tmp_path, rollout_func=rollout, max_steps=2).state.global_step == 2


def test_entries_that_belong_to_no_row_are_refused_by_name() -> None:
    from hf_effi.trainers.grpo.pipeline import check_movable

    with pytest.raises(RefusedError, match="of audio_values it is not known which part belongs to which row"):
        check_movable({"pixel_values": torch.zeros(1), "audio_values": torch.zeros(1)})


def test_a_reward_of_nothing_but_nan_gets_a_sentence_of_its_own(caplog):
    from hf_effi.trainers.grpo.rewards import _warn_of_nothing_but_nan, check_rewards

    _warn_of_nothing_but_nan.cache_clear()
    assert check_rewards([float("nan")] * 4, 4, "ratio") == [None] * 4
    assert "reward function 'ratio' returned NaN for all 4 completions" in caplog.text and "Return 0.0" in caplog.text
    caplog.clear()
    check_rewards([float("nan")] * 4, 4, "ratio")
    check_rewards([None] * 4, 4, "not for these rows")
    check_rewards([float("nan"), 1.0], 2, "half")
    assert not caplog.text, "once, and not where None was meant or some have a reward"
