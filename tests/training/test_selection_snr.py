"""The learning rate by the signal-to-noise ratio of the gradient, inside `EffiGRPOTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_effi.callbacks import GradientSNRCallback
from hf_effi.errors import RefusedError
from hf_effi.functional.schedules.adaptive import GradientSNR
from hf_effi.selection import OBLRBaseline
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, binary_hash_reward, grpo_args, length_reward, run_grpo

FACTOR = "effi/lr_factor/gradient_snr"


def train(tmp_path: Any, callbacks: list[Any], **over: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "constant",
        "max_steps": 5,
    }
    kwargs = {n: over.pop(n) for n in ("resume_from_checkpoint", "advantage_transform", "reward_funcs") if n in over}
    kwargs.setdefault("reward_funcs", length_reward)
    args = grpo_args(tmp_path, EffiGRPOConfig, **{**settings, **over})
    return run_grpo(EffiGRPOTrainer, args, callbacks=callbacks, **kwargs)


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Gradients(TrainerCallback):
    """Keeps what each micro-batch adds to the gradient."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []

    def on_substep_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        self.sums.append(torch.cat([part.detach().flatten() for part in parts]).double())


def test_it_acts_on_grpo_and_measures_its_micro_batches(tmp_path: Any) -> None:
    seen = Gradients()
    trainer = train(tmp_path, [GradientSNRCallback(memory=0.5), seen])
    rule, factors = GradientSNR(memory=0.5), []
    for step in range(5):
        # Of four micro-batches the first two make the halves; the fourth is seen after clipping only.
        first, both, _ = seen.sums[3 * step : 3 * step + 3]
        second = both - first
        signal, spread = float(first @ second), float((first - second).square().sum()) / 4
        factors.append(rule.push(signal, spread * 2 / 4))
    assert metric(trainer, FACTOR) == pytest.approx(factors, rel=1e-4)
    assert metric(trainer, "learning_rate") == pytest.approx([1e-3 * factor for factor in factors], rel=1e-4)
    assert min(factors) < 1.0


def test_off_by_default_and_without_it_nothing_changes(tmp_path: Any) -> None:
    plain = train(tmp_path, [])
    assert metric(plain, FACTOR) == [] and "sort" in plain.exact_savings
    # One that never lowers the rate is stock, but for the order of the rows.
    full = train(tmp_path, [GradientSNRCallback(lowest=1.0)], exact_savings="off")
    assert_bitwise_equal(train(tmp_path, [], exact_savings="off").model, full.model)


def test_rows_are_not_sorted_into_the_halves(tmp_path: Any) -> None:
    trainer = train(tmp_path, [GradientSNRCallback()], max_steps=1)
    assert "sort" not in trainer.exact_savings and "trim" in trainer.exact_savings
    with pytest.raises(RefusedError, match="'sort' is not exact here: GradientSNRCallback compares halves of a batch"):
        train(tmp_path, [GradientSNRCallback()], exact_savings="sort")
    with pytest.raises(RefusedError, match="gradient_accumulation_steps=2 gives no two halves"):
        train(tmp_path, [GradientSNRCallback()], gradient_accumulation_steps=2)


@pytest.mark.parametrize("given", [GradientSNRCallback, GradientSNRCallback()])
def test_nor_where_it_is_added_to_a_trainer_that_is_built(tmp_path: Any, given: Any) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, gradient_accumulation_steps=4)
    trainer = run_grpo(EffiGRPOTrainer, args, train=False)
    assert "sort" in trainer.exact_savings
    trainer.add_callback(given)
    assert "sort" not in trainer.exact_savings and "trim" in trainer.exact_savings
    args = grpo_args(tmp_path, EffiGRPOConfig, gradient_accumulation_steps=4, exact_savings="sort")
    with pytest.raises(RefusedError, match="'sort' is not exact here: GradientSNRCallback compares halves"):
        run_grpo(EffiGRPOTrainer, args, train=False).add_callback(given)


@pytest.mark.parametrize("over", [{}, {"num_iterations": 2}, {"steps_per_generation": 8}])
def test_resume_anywhere_equals_the_uninterrupted_run(tmp_path: Path, over: dict[str, Any]) -> None:
    def run(name: str, resume: Path | None = None) -> Any:
        return train(
            tmp_path / name,
            [GradientSNRCallback(memory=0.8)],
            advantage_transform=OBLRBaseline(),
            reward_funcs=binary_hash_reward,
            save_strategy="steps",
            save_steps=1,
            resume_from_checkpoint=resume and str(resume),
            **over,
        )

    whole = run("whole")
    assert len(set(metric(whole, FACTOR))) > 1
    for stop in (1, 3):
        resumed = run("resumed", tmp_path / "whole" / f"checkpoint-{stop}")
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")
        assert metric(whole, "learning_rate") == metric(resumed, "learning_rate")
