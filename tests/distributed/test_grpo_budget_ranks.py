"""Two gloo ranks under token budgets: as many forwards on each, stock's weights, and rows dealt by cost."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.trainers.grpo import packed
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, grpo_args, prompt_dataset, run_distributed, run_grpo, weights_of

LONG, SHORT = 24, 3


class _Unequal:
    """The first rank's completions are long, the other's are short."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        longest = LONG if self.accelerator.process_index == 0 else SHORT
        made = [[5 + (7 * i + k) % 40 for k in range(longest - i % 3)] for i in range(len(prompt_ids))]
        return made, None


class Stock(_Unequal, GRPOTrainer):
    pass


class Ours(_Unequal, EffiGRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.forwards: list[int] = []
        super().__init__(*args, **kwargs)
        self.model.get_input_embeddings().register_forward_pre_hook(self.called)

    def called(self, module: Any, args: Any) -> None:
        # Before the first flat row the model is asked about its attention, in double precision.
        if module.weight.dtype == torch.float32:
            self.forwards.append(args[0].numel())


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 3) for ids in completion_ids]


def dead_on_the_second(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 3) if len(ids) > SHORT else 1.0 for ids in completion_ids]


def one(cls: type, reward_funcs: Any = reward, **over: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2, "optim": "sgd",
        "max_completion_length": LONG, "max_steps": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    config = GRPOConfig if cls is Stock else EffiGRPOConfig
    args = grpo_args(tempfile.mkdtemp(), config, **{**settings, **over})
    return run_grpo(cls, args, reward_funcs=reward_funcs, train_dataset=prompt_dataset(32))


#: name -> (reward, settings)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "trim": (reward, {"exact_savings": "trim,skip"}),
    "share": (reward, {"exact_savings": "share,skip"}),
    "all": (reward, {"num_iterations": 2, "score_token_budget": 100}),
    "dead": (dead_on_the_second, {"exact_savings": "trim,skip,pack", "num_iterations": 2, "score_token_budget": 20}),
    "untrimmed": (reward, {"exact_savings": "off"}),
    "bnpo": (reward, {"loss_type": "bnpo"}),
}


def budgets() -> dict[str, Any]:
    out = {}
    for name, (reward_funcs, over) in CASES.items():
        plain = {key: value for key, value in over.items() if key in ("num_iterations", "loss_type")}
        stock = one(Stock, reward_funcs, **plain)
        ours = one(Ours, reward_funcs, loss_token_budget=40, **over)
        out[name] = (weights_of(stock.model), weights_of(ours.model), ours.forwards, ours.state.log_history)
    return out


def test_ranks_forward_equally_often_and_have_stocks_weights() -> None:
    first, second = run_distributed(budgets, 2)
    for name in CASES:
        (stock, ours, forwards, log), (_, other, theirs, _) = first[name], second[name]
        assert_bitwise_equal(ours, other, what=name)
        assert len(forwards) == len(theirs) > 0, name
        for weight in stock:
            assert torch.allclose(stock[weight], ours[weight], atol=1e-6), (name, weight)
        ratios = [entry["effi/rank_cost_slowest_over_mean"] for entry in log if "loss" in entry]
        steps = [entry["effi/micro_step_cost_slowest_over_mean"] for entry in log if "loss" in entry]
        assert len(ratios) == 2 and all(1.0 <= a <= b for a, b in zip(ratios, steps, strict=True)), name


def dealt(savings: str) -> tuple[Any, list[Any], list[tuple[int, ...]]]:
    groups: list[tuple[int, ...]] = []
    packed._CALL_OPERATIONS = (
        0.0  # in a model as small as this one, calls of attention would cost more than all tokens
    )

    class Seen(Ours):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            prompts = [
                tuple(ids[mask.bool()].tolist())
                for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
            ]
            groups.append(tuple(sorted(prompts.count(prompt) for prompt in set(prompts))))
            return super()._compute_loss(model, inputs)

    trainer = one(Seen, exact_savings=savings)
    return weights_of(trainer.model), trainer.state.log_history, groups


@pytest.mark.parametrize("savings", ["trim,sort", "sort,share", "trim,skip"])
def test_rows_are_dealt_by_cost_within_an_optimizer_step(savings: str) -> None:
    first, second = run_distributed(dealt, 2, savings)
    assert_bitwise_equal(first[0], second[0])
    log = [entry for entry in first[1] if "loss" in entry]
    ratios = [entry["effi/rank_cost_slowest_over_mean"] for entry in log]
    moved = [entry["effi/rows_moved"] for entry in log]
    if "sort" not in savings:
        assert min(ratios) > 1.3 and not any(moved), "rows stay where they were generated"
        return
    assert max(ratios) < 1.1 and min(moved) > 0
    if "share" in savings:
        assert {size for _, _, groups in (first, second) for sizes in groups for size in sizes} == {4}, "whole groups"


def stocks(loss_type: str) -> tuple[Any, Any]:
    return tuple(weights_of(one(cls, loss_type=loss_type).model) for cls in (Stock, Ours))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_dealt_rows_have_the_gradient_of_stock(loss_type: str) -> None:
    for stock, ours in run_distributed(stocks, 2, loss_type):
        for name in stock:
            assert torch.allclose(stock[name], ours[name], atol=1e-6), name


def resumed(folder: str) -> tuple[Any, Any]:
    over = {
        "loss_token_budget": 40, "score_token_budget": 100, "num_iterations": 2, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    settings = {
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": LONG, **over,
    }  # fmt: skip
    runs = []
    for name, checkpoint in (("a", None), ("b", f"{folder}/a/checkpoint-3")):
        args = grpo_args(os.path.join(folder, name), EffiGRPOConfig, **settings)
        runs.append(
            run_grpo(
                Ours, args, reward_funcs=reward, train_dataset=prompt_dataset(32), resume_from_checkpoint=checkpoint
            )
        )
    return weights_of(runs[0].model), weights_of(runs[1].model)


def test_resume_inside_a_generation_with_dealt_rows(tmp_path: Any) -> None:
    for whole, again in run_distributed(resumed, 2, str(tmp_path)):
        assert_bitwise_equal(whole, again)
