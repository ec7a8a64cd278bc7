"""Fused LoRA linears through `trainer.train()`: the losses and weights of PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_effi import EffiTrainer, EffiTrainingArguments, KernelPatchCallback
from hf_effi.errors import RefusedError
from hf_effi.kernels import FusedLoRALinear
from tests.helpers import (
    assert_bitwise_equal,
    compare_runs,
    grpo_args,
    lm_dataset,
    run_grpo,
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
    with pytest.raises(RefusedError, match="LoRA kernels cannot compute"):
        run(tmp_path, adapted(**config), fused())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_grpo_with_a_reference_by_disabled_adapter(tmp_path, checkpointing):
    """`beta` makes TRL compute reference log-probs with the adapter off; generation uses the cache, token by token."""
    from hf_effi import EffiGRPOConfig, EffiGRPOTrainer

    def train(folder, **over):
        args = grpo_args(
            tmp_path / folder, EffiGRPOConfig, beta=0.1, gradient_checkpointing=checkpointing, max_steps=2, **over
        )
        return run_grpo(EffiGRPOTrainer, args, model=adapted_policy())

    stock, ours = train("a"), train("b", kernel_patch={"LoRALinear": "hf_effi"})
    for key in ("loss", "kl", "reward", "completions/mean_length"):
        a, b = ([entry[key] for entry in t.state.log_history if key in entry] for t in (stock, ours))
        assert a and a == pytest.approx(b, rel=1e-3, abs=1e-6), key
    assert "forward" not in ours.model.base_model.model.model.layers[0].self_attn.q_proj.__dict__


def adapted_policy():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_qwen3(end_tokens=10), LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model
