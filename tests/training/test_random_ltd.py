"""random-LTD through `train()`: off is stock, on drops what the schedule says, resume is exact, RL is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer
from trl import DPOConfig, GRPOConfig, SFTConfig, SFTTrainer

from hf_effi import LRScheduleCallback
from hf_effi.callbacks import RandomLTDCallback
from hf_effi.callbacks.random_ltd import refuse_trainer
from hf_effi.errors import RefusedError
from hf_effi.schedules import linear, token_indexed
from hf_effi.trainers.sft import EffiSFTConfig
from tests.helpers import assert_bitwise_equal, compare_runs, sft_dataset, tiny_qwen3, tiny_tokenizer, weights_of
from tests.helpers.sampling import sampler_trainer, stop_and_resume

LAYERS, LENGTH, BATCH = 4, 8, 4  # `sampler_trainer` has rows of 8 tokens in batches of 4


def make(folder, callbacks=(), **over):
    return sampler_trainer(
        folder, Trainer, callbacks=callbacks, model=tiny_qwen3(num_hidden_layers=LAYERS), **{"max_steps": 6, **over}
    )


def run(folder, *callbacks, **over):
    trainer = make(folder, callbacks, **over)
    trainer.train()
    return trainer


def ltd(low=2, high=LENGTH, **over):
    return RandomLTDCallback(low, high, **{"ramp_fraction": 0.5, "multiple": 2, **over})


@pytest.mark.parametrize("callback", [lambda: ltd(LENGTH), lambda: ltd(ramp_fraction=0)])
def test_keeping_all_is_the_stock_trainer_to_the_bit(tmp_path, callback):
    assert_bitwise_equal(run(tmp_path).model, run(tmp_path, callback()).model)


def test_the_predicted_layer_tokens(tmp_path):
    """Half of 6 updates drop: 2, 4 and 6 of 8 tokens in the two middle layers, then all; two micro-batches each."""
    callback = ltd()
    trainer = run(tmp_path, callback, gradient_accumulation_steps=2)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["effi/ltd_kept_tokens"] for entry in logs] == [2, 4, 6, 8, 8, 8]
    each = [2 * BATCH * (2 * kept + 2 * LENGTH) for kept in (2, 4, 6, 8, 8, 8)]
    assert [entry["effi/ltd_layer_tokens"] for entry in logs] == [sum(each[: i + 1]) for i in range(6)]
    assert logs[-1]["effi/ltd_layer_token_fraction"] == sum(each) / (6 * 2 * BATCH * LENGTH * LAYERS)
    assert all("forward" not in module.__dict__ for module in trainer.model.model.layers)
    stock = weights_of(run(tmp_path, gradient_accumulation_steps=2).model)
    assert not torch.equal(stock["lm_head.weight"], weights_of(trainer.model)["lm_head.weight"])


def test_checkpointing_gives_the_same_weights(tmp_path):
    plain, checkpointed = (run(tmp_path, ltd(), gradient_checkpointing=on) for on in (False, True))
    for name, weight in weights_of(plain.model).items():
        torch.testing.assert_close(weights_of(checkpointed.model)[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [2, 4])  # in the ramp, and after it
def test_resume(tmp_path, step):
    whole, broken, _ = stop_and_resume(
        tmp_path, lambda folder, callbacks: make(folder, [*callbacks, ltd()]), step=step
    )
    compare_runs(whole, broken)


def layer_token_lr(**over):
    callback = ltd(**over)
    return callback, LRScheduleCallback(token_indexed(schedule=linear(6)), counter=callback.progress)


def test_layer_token_lr(tmp_path):
    """Each update is worth its share of the layer-tokens; where nothing is dropped the plain schedule holds."""
    shares = [(2 * kept + 2 * LENGTH) / (LENGTH * LAYERS) for kept in (2, 4, 6, 8, 8)]
    logs = run(tmp_path, *layer_token_lr()).state.log_history
    expected = [1e-2 * (1 - sum(shares[:step]) / 6) for step in range(6)]
    assert [entry["learning_rate"] for entry in logs if "loss" in entry] == pytest.approx(expected)
    plain = run(tmp_path, LRScheduleCallback(linear(6)))
    assert_bitwise_equal(plain.model, run(tmp_path, *layer_token_lr(low=LENGTH)).model)


def test_layer_token_lr_resumes(tmp_path):
    whole, broken, _ = stop_and_resume(
        tmp_path, lambda folder, callbacks: make(folder, [*callbacks, *layer_token_lr()]), step=2
    )
    compare_runs(whole, broken)


def test_layer_token_lr_needs_the_callback_first(tmp_path):
    with pytest.raises(RuntimeError, match="before LRScheduleCallback"):
        run(tmp_path, *reversed(layer_token_lr()))


@pytest.mark.parametrize("packing", [False, True])
def test_sft(tmp_path, packing):
    """Rows of different lengths, and packed ones: every update is finite, and fewer layer-tokens are processed."""
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=4, logging_steps=1, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=4, max_length=32, packing=packing, packing_strategy="wrapped",
    )  # fmt: skip
    callback = ltd(4, 32, multiple=4)
    model = tiny_qwen3(num_hidden_layers=LAYERS)
    trainer = SFTTrainer(
        model, args=args, train_dataset=sft_dataset(16), processing_class=tiny_tokenizer(), callbacks=[callback]
    )
    trainer.train()
    assert callback.dropping.layer_tokens < callback.dropping.full_layer_tokens
    assert all(weight.isfinite().all() for weight in weights_of(model).values())


@pytest.mark.parametrize("config", [GRPOConfig, DPOConfig])
def test_rl_and_preferences_are_refused(tmp_path, config):
    args = config(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(RefusedError, match=config.__name__):
        refuse_trainer(args)


def test_sft_configs_of_ours_are_accepted(tmp_path):
    refuse_trainer(EffiSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"))


def test_a_stock_trainer_refuses_what_cannot_work(tmp_path):
    trainer = make(tmp_path)
    for name, value in (("torch_compile", True), ("sequence_parallel_size", 2)):
        setattr(trainer.args, name, value)
        with pytest.raises(RefusedError, match=name):
            ltd().on_init_end(trainer.args, trainer.state, trainer.control)
        setattr(trainer.args, name, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 9}, "min_tokens=9"),
        ({"low": 1}, "min_tokens=1 "),
        ({"low": True}, "min_tokens=True"),
        ({"ramp_fraction": 1.5}, "ramp_fraction=1.5"),
        ({"ramp_fraction": float("nan")}, "ramp_fraction=nan"),
        ({"multiple": 0}, "multiple=0"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ltd(**arguments)
