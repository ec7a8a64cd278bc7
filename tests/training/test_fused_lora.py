"""Fused LoRA linears through `trainer.train()`: the losses and weights of PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_effi import EffiTrainer, EffiTrainingArguments, FusedLoRALinear, KernelPatchCallback
from tests.helpers import (
    assert_bitwise_equal,
    compare_runs,
    lm_dataset,
    tiny_qwen3,
    weights_of,
)
from tests.training.test_kernel_patch import arguments, losses_of


def adapted(**config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_qwen3(), LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))


def run(folder, model, *callbacks, cls=Trainer, args_cls=TrainingArguments, **over):
    settings = {"max_steps": 20, "learning_rate": 2e-3, **over}
    trainer = cls(
        model, arguments(folder, args_cls, **settings), train_dataset=lm_dataset(32), callbacks=list(callbacks)
    )
    trainer.train()
    return trainer


def fused():
    return KernelPatchCallback({"LoRALinear": FusedLoRALinear()})


@pytest.mark.parametrize("over", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_same_losses_and_weights_as_peft(tmp_path, over):
    stock, ours = run(tmp_path / "a", adapted(), **over), run(tmp_path / "b", adapted(), fused(), **over)
    a, b = losses_of(stock), losses_of(ours)
    assert len(a) == 20 and a[-1] < a[0] - 0.2
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    trained = {n for n, p in ours.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    before, after = weights_of(stock.model), weights_of(ours.model)
    for name in trained:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-4)
    with pytest.raises(AssertionError):  # the fused code did run: it rounds otherwise
        assert_bitwise_equal(before, after)


def test_bf16_autocast_stays_within_its_noise(tmp_path):
    stock, ours = run(tmp_path / "a", adapted(), bf16=True), run(tmp_path / "b", adapted(), fused(), bf16=True)
    exact = losses_of(run(tmp_path / "c", adapted()))
    noise = (losses_of(stock) - exact).abs().max()
    assert (losses_of(ours) - exact).abs().max() < 2 * noise


def test_field_of_the_effi_trainer(tmp_path):
    by_field = run(
        tmp_path / "a",
        adapted(),
        cls=EffiTrainer,
        args_cls=EffiTrainingArguments,
        kernel_patch={"LoRALinear": "hf_effi"},
        max_steps=3,
    )
    by_callback = run(tmp_path / "b", adapted(), fused(), max_steps=3)
    compare_runs(by_field, by_callback)


def test_resume_equals_the_uninterrupted_run(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    straight = run(tmp_path / "a", adapted(), fused(), **settings)
    resumed = Trainer(
        adapted(),
        arguments(tmp_path / "a", **{**settings, "learning_rate": 2e-3}),
        train_dataset=lm_dataset(32),
        callbacks=[fused()],
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    compare_runs(straight, resumed, keys=["loss"])


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_is_refused_stops_before_training(tmp_path, config):
    with pytest.raises(ValueError, match="FusedLoRALinear cannot compute"):
        run(tmp_path, adapted(**config), fused())
