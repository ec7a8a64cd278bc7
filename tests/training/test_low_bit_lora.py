"""
An 8-bit base through `trainer.train()`: the curve of PEFT within the noise of the format, checkpoints, resume, GRPO.
"""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_effi import EffiTrainer, EffiTrainingArguments, KernelPatchCallback, patch
from hf_effi.errors import RefusedError
from hf_effi.kernels import LowBitLoRALinear
from hf_effi.kernels.low_bit import FORMATS, LowBitWeight
from tests.helpers import assert_bitwise_equal, compare_runs, grpo_args, lm_dataset, run_grpo, weights_of
from tests.training.test_fused_lora import adapted, adapted_policy, run
from tests.training.test_kernel_patch import arguments, losses_of

EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)


def low_bit(format):
    return KernelPatchCallback({"LoRALinear": LowBitLoRALinear(format)})


def with_rounded_base(format):
    """The same model with its base weights rounded to the format: what a run on other weights of 8 bits gives."""
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.weight"):
                parameter.copy_(LowBitWeight.of(parameter, format).rows.dense())
    return model


class Watch(TrainerCallback):
    """Notes the parameters of the base at each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(sum(p.numel() for n, p in model.named_parameters() if n.endswith("base_layer.weight")))


@EACH_FORMAT
def test_fifty_steps_stay_within_the_noise_of_the_format(tmp_path, format):
    """
    Weights, inputs and gradients are rounded here, weights alone in the run that gives the noise: 4 times at most.
    """
    watch, settings = Watch(), {"max_steps": 50, "learning_rate": 2e-3}
    stock = losses_of(run(tmp_path / "a", adapted(), **settings))
    ours = run(tmp_path / "b", model := adapted(), low_bit(format), watch, **settings)
    noise = (losses_of(run(tmp_path / "c", with_rounded_base(format), **settings)) - stock).abs().max()
    assert len(stock) == 50 and stock[-1] < stock[0] - 0.5
    gap = (losses_of(ours) - stock).abs().max()
    assert 0 < gap < 4 * noise < (0.4 if format == "fp8" else 0.1)
    assert watch.seen == [0] * 50, "no wide weight while it trains"
    before, after = weights_of(adapted()), weights_of(model)
    frozen = [name for name in before if "lora_" not in name]
    assert_bitwise_equal({n: after[n] for n in frozen}, {n: before[n] for n in frozen})


def test_the_field_is_the_callback(tmp_path):
    by_field = run(
        tmp_path / "a",
        adapted(),
        cls=EffiTrainer,
        args_cls=EffiTrainingArguments,
        kernel_patch={"LoRALinear": "int8"},
        max_steps=3,
    )
    compare_runs(by_field, run(tmp_path / "b", adapted(), low_bit("int8"), max_steps=3))


@EACH_FORMAT
def test_checkpointing_changes_nothing(tmp_path, format):
    kept = run(tmp_path / "a", adapted(), low_bit(format), max_steps=4)
    recomputed = run(tmp_path / "b", adapted(), low_bit(format), max_steps=4, gradient_checkpointing=True)
    compare_runs(kept, recomputed, keys=["loss"])


@EACH_FORMAT
def test_resume_equals_the_uninterrupted_run(tmp_path, format):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    straight = run(tmp_path, adapted(), low_bit(format), **settings)
    resumed = Trainer(
        adapted(),
        arguments(tmp_path, **{**settings, "learning_rate": 2e-3}),
        train_dataset=lm_dataset(32),
        callbacks=[low_bit(format)],
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    compare_runs(straight, resumed, keys=["loss"])


def test_checkpoints_hold_the_adapter_that_was_trained(tmp_path):
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    from tests.helpers import tiny_qwen3

    trainer = run(tmp_path, adapted(), low_bit("int8"), max_steps=2, save_strategy="steps", save_steps=2)
    loaded = PeftModel.from_pretrained(tiny_qwen3(), str(tmp_path / "checkpoint-2"))
    assert_bitwise_equal(get_peft_model_state_dict(loaded), get_peft_model_state_dict(trainer.model))


def test_best_model_and_evaluation(tmp_path):
    trainer = Trainer(
        adapted(),
        arguments(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
        ),
        train_dataset=lm_dataset(32),
        eval_dataset=lm_dataset(8, seed=1),
        callbacks=[low_bit("int8")],
    )
    trainer.train()
    assert len([e for e in trainer.state.log_history if "eval_loss" in e]) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=0.02)


def test_bf16_autocast(tmp_path):
    exact = losses_of(run(tmp_path / "a", adapted(), low_bit("int8")))
    half = losses_of(run(tmp_path / "b", adapted(), low_bit("int8"), bf16=True))
    assert 0 < (exact - half).abs().max() < 0.05


def test_a_trained_base_stops_before_training(tmp_path):
    with pytest.raises(RefusedError, match="its base weight is trained"):
        run(tmp_path, adapted().requires_grad_(True), low_bit("fp8"))


def test_grpo_with_a_reference_by_disabled_adapter(tmp_path):
    """The reference is the 8-bit base: the KL of the first step is nothing, as it is without 8 bits."""
    from hf_effi import EffiGRPOConfig, EffiGRPOTrainer

    args = grpo_args(tmp_path, EffiGRPOConfig, beta=0.1, max_steps=2, kernel_patch={"LoRALinear": "int8"})
    model = adapted_policy()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    trainer = run_grpo(EffiGRPOTrainer, args, model=model)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert len(kl) == 2 and kl[0] == pytest.approx(0.0, abs=1e-6)


def test_sft_keeps_one_state_dict(tmp_path, tokenizer):
    from peft import LoraConfig

    from hf_effi import EffiSFTConfig, EffiSFTTrainer
    from tests.helpers import sft_dataset, tiny_llama

    args = arguments(tmp_path, EffiSFTConfig, kernel_patch={"LoRALinear": "fp8"}, max_steps=2)
    trainer = EffiSFTTrainer(
        tiny_llama(),
        args=args,
        train_dataset=sft_dataset(8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    keys = list(trainer.model.state_dict())
    trainer.train()
    assert list(trainer.model.state_dict()) == keys
    with patch(trainer.model, {"LoRALinear": "fp8"}):
        assert list(trainer.model.state_dict()) == keys
