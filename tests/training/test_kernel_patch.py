"""Kernel patches through `trainer.train()`: the callback on a stock Trainer, and the field of the Effi trainers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_effi import EffiSFTConfig, EffiSFTTrainer, EffiTrainer, EffiTrainingArguments, KernelPatchCallback, patch
from hf_effi.errors import RefusedError
from hf_effi.trainers.mixins import kernel_patch as _kernel_mixin
from tests.helpers import assert_bitwise_equal, compare_runs, lm_dataset, sft_dataset, tiny_llama, weights_of
from tests.helpers.patches import TorchRMSNorm, TorchSwiGLU, TwiceTheNorm, state_of

LAYERS = {"RMSNorm": TorchRMSNorm, "SwiGLUMLP": TorchSwiGLU}


class Exact(nn.Module):
    """The original's own formula in the original's own order: equal to the bit, but another function."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ReorderedNorm(nn.Module):
    """The same formula in another order, which rounds differently, as a kernel does."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def arguments(folder, cls=TrainingArguments, **over):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    return cls(**{**settings, **over})


def trainer_of(folder, model=None, *callbacks, cls=Trainer, args_cls=TrainingArguments, **over):
    return cls(
        model or tiny_llama(),
        arguments(folder, args_cls, **over),
        train_dataset=lm_dataset(16),
        callbacks=list(callbacks),
    )


def losses_of(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


class Watch(TrainerCallback):
    """Notes whether the norm is patched at each step."""

    def __init__(self, module="model.norm"):
        self.module, self.seen = module, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append("forward" in model.get_submodule(self.module).__dict__)


def test_callback_patches_while_training_and_gives_the_model_back(tmp_path):
    model, watch, callback = tiny_llama(), Watch(), KernelPatchCallback(LAYERS)
    state = state_of(model)
    trainer = trainer_of(tmp_path, model, callback, watch)
    assert callback.handle.active
    trainer.train()
    assert watch.seen == [True] * 3
    assert not callback.handle.active and str(callback.handle).startswith("7 modules reverted")
    left = [entry for entry in state_of(model) if entry not in state]
    # The Trainer itself leaves entries on the top module (a wrapped forward, a flag); nothing below.
    assert {name for (name, _), _ in left} <= {""}


def test_the_same_formula_gives_the_same_weights(tmp_path):
    stock = trainer_of(tmp_path / "a")
    stock.train()
    patched = trainer_of(tmp_path / "b", None, KernelPatchCallback({"SwiGLUMLP": Exact}))
    patched.train()
    compare_runs(stock, patched)


def nudged_llama():
    """The same model with every weight off by one rounding: what fp32 leaves open."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.finfo(torch.float32).eps)
    return model


def test_fifty_steps_give_the_same_curve_within_the_noise_of_the_dtype(tmp_path):
    def curve(name, model, *callbacks):
        trainer = trainer_of(tmp_path / name, model, *callbacks, max_steps=50, learning_rate=2e-3)
        trainer.train()
        return losses_of(trainer)

    stock = curve("stock", tiny_llama())
    patched = curve("patched", tiny_llama(), KernelPatchCallback({**LAYERS, "RMSNorm": ReorderedNorm}))
    noise = (curve("nudged", nudged_llama()) - stock).abs().max()
    assert len(stock) == 50 and stock[-1] < 0.7 * stock[0]
    assert 0 < (patched - stock).abs().max() < 4 * noise < 1e-3


def test_a_second_training_is_patched_again(tmp_path):
    watch, callback = Watch(), KernelPatchCallback(LAYERS)
    trainer = trainer_of(tmp_path, None, callback, watch, max_steps=1)
    trainer.train()
    trainer.train()
    assert watch.seen == [True, True] and not callback.handle.active


def test_model_init_is_patched_in_each_training(tmp_path):
    watch, callback = Watch(), KernelPatchCallback(LAYERS)
    trainer = Trainer(
        args=arguments(tmp_path, max_steps=1),
        model_init=lambda: tiny_llama(),
        train_dataset=lm_dataset(8),
        callbacks=[callback, watch],
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first and watch.seen == [True]
    assert "forward" not in first.model.norm.__dict__ and "forward" not in trainer.model.model.norm.__dict__


def test_with_torch_compile(tmp_path):
    watch, callback = Watch(), KernelPatchCallback(LAYERS)
    model = tiny_llama(num_hidden_layers=1)
    trainer = trainer_of(
        tmp_path, model, callback, watch, max_steps=1, torch_compile=True, torch_compile_backend="eager"
    )
    trainer.train()
    trainer.train()
    assert watch.seen == [True, True] and "forward" not in model.model.norm.__dict__
    torch.compiler.reset()


class Explode(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("node lost")


def test_callback_as_a_context_reverts_after_a_failure(tmp_path):
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="node lost"), KernelPatchCallback(LAYERS) as callback:
        trainer_of(tmp_path, model, callback, Explode()).train()
    assert "forward" not in model.model.norm.__dict__
    patch(model, LAYERS).revert()


def test_checkpoints_are_the_same(tmp_path):
    for name, callbacks in (("a", []), ("b", [KernelPatchCallback({"SwiGLUMLP": Exact})])):
        trainer_of(tmp_path / name, None, *callbacks, save_strategy="steps", save_steps=2).train()
    from tests.helpers import weights_in

    a, b = (weights_in(tmp_path / name / "checkpoint-2") for name in "ab")
    assert_bitwise_equal(a, b)


def test_a_wrong_kernel_stops_before_training(tmp_path):
    model = tiny_llama()
    state = state_of(model)
    with pytest.raises(RefusedError, match="TwiceTheNorm on model.layers.0.input_layernorm"):
        trainer_of(tmp_path, model, KernelPatchCallback({"RMSNorm": TwiceTheNorm}))
    assert state_of(model) == state


# --- the field -------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_source(monkeypatch):
    """Let `"liger"` mean layers in plain torch: this machine has no device for Triton."""
    monkeypatch.setattr(_kernel_mixin, "patch", lambda model, layers: patch(model, LAYERS))


def test_off_is_the_stock_trainer(tmp_path):
    stock = trainer_of(tmp_path / "a")
    stock.train()
    ours = trainer_of(tmp_path / "b", cls=EffiTrainer, args_cls=EffiTrainingArguments)
    ours.train()
    compare_runs(stock, ours)


@pytest.mark.parametrize("value", ["liger", {"RMSNorm": "liger"}, '{"RMSNorm": "liger"}'])
def test_field_patches_during_train_only(tmp_path, torch_source, value):
    watch = Watch()
    trainer = trainer_of(
        tmp_path, None, watch, cls=EffiTrainer, args_cls=EffiTrainingArguments, kernel_patch=value, max_steps=1
    )
    assert "forward" not in trainer.model.model.norm.__dict__
    trainer.train()
    assert watch.seen == [True] and "forward" not in trainer.model.model.norm.__dict__


def test_field_reverts_after_a_failure(tmp_path, torch_source):
    trainer = trainer_of(
        tmp_path, None, Explode(), cls=EffiTrainer, args_cls=EffiTrainingArguments, kernel_patch="liger"
    )
    with pytest.raises(RuntimeError, match="node lost"):
        trainer.train()
    assert "forward" not in trainer.model.model.norm.__dict__


def test_sft_trainer_has_the_field(tmp_path, torch_source, tokenizer):
    watch = Watch()
    args = arguments(tmp_path, EffiSFTConfig, kernel_patch="liger", max_steps=2)
    trainer = EffiSFTTrainer(
        tiny_llama(), args=args, train_dataset=sft_dataset(8), processing_class=tokenizer, callbacks=[watch]
    )
    before = weights_of(trainer.model)
    trainer.train()
    assert watch.seen == [True, True]
    assert not torch.equal(before["model.norm.weight"], trainer.model.model.norm.weight)


@pytest.mark.parametrize("value", ["ligr", "[1]", "{}", 3, {}])
def test_bad_values_raise_before_training(tmp_path, value):
    with pytest.raises(ValueError, match="kernel_patch=.* must be 'liger' or a mapping"):
        trainer_of(tmp_path, cls=EffiTrainer, args_cls=EffiTrainingArguments, kernel_patch=value)


def test_model_init_needs_the_callback(tmp_path):
    with pytest.raises(RefusedError, match="KernelPatchCallback"):
        EffiTrainer(
            args=arguments(tmp_path, EffiTrainingArguments, kernel_patch="liger"),
            model_init=lambda: tiny_llama(),
            train_dataset=lm_dataset(8),
        )


def test_several_devices_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    for make in (
        lambda: trainer_of(tmp_path, None, KernelPatchCallback(LAYERS)),
        lambda: trainer_of(tmp_path, cls=EffiTrainer, args_cls=EffiTrainingArguments, kernel_patch="liger"),
    ):
        with pytest.raises(RefusedError, match="2 devices in one process"):
            make()


def test_layers_see_what_the_trainer_sees(tmp_path):
    """Mixed precision wraps the top module only: under bf16 autocast a patched MLP gets what the original would."""
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    callback = KernelPatchCallback({"SwiGLUMLP": Probe})
    trainer = trainer_of(tmp_path, None, callback, max_steps=1, bf16=True)
    seen.clear()
    trainer.train()
    assert seen and all(autocast for _, autocast in seen)
