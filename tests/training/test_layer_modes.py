"""Offload, selective checkpointing and the memory budget through `train()` of Trainer, SFTTrainer and GRPOTrainer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi.callbacks.layer_modes import (
    ActivationOffloadCallback,
    MemoryBudgetCallback,
    SelectiveCheckpointCallback,
)
from hf_effi.errors import RefusedError
from hf_effi.memory.layer_modes import decoder_layers
from tests.helpers import compare_runs, grpo_args, lm_dataset, run_grpo, sft_dataset, tiny_qwen3, tiny_tokenizer

LAYERS = 3
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
}
GIB = 2**30


def plain(folder, *callbacks, checkpointing=True, **over):
    args = TrainingArguments(str(folder), gradient_checkpointing=checkpointing, **{**QUIET, **over})
    model = tiny_qwen3(num_hidden_layers=LAYERS, use_cache=False)
    trainer = Trainer(model, args, train_dataset=lm_dataset(32, length=24), callbacks=list(callbacks))
    trainer.train()
    return trainer


def make_callbacks():
    return [
        ActivationOffloadCallback(),
        ActivationOffloadCallback(keep_last=0),
        SelectiveCheckpointCallback(),
        MemoryBudgetCallback(1),
        MemoryBudgetCallback(900_000 / GIB, offload=True),
    ]


def test_gradients_of_a_stock_trainer_do_not_change(tmp_path):
    stock = plain(tmp_path, checkpointing=False)
    compare_runs(stock, plain(tmp_path))
    for callback in make_callbacks():
        ours = plain(tmp_path, callback)
        compare_runs(stock, ours)
        for layer in decoder_layers(ours.model):
            assert not layer._forward_pre_hooks and layer._gradient_checkpointing_func.func is checkpoint


def test_what_a_run_moves(tmp_path):
    callback = ActivationOffloadCallback(keep_last=1)
    plain(tmp_path, callback)
    micro_batches, layer_input = 3 * 2, 4 * 24 * 32 * 4
    assert callback.stats["offloaded_bytes"] == micro_batches * (LAYERS - 1) * layer_input
    assert callback.stats["restored_bytes"] == callback.stats["offloaded_bytes"]
    assert callback.stats["buffers_allocated"] == LAYERS - 1
    assert callback.stats["host_bytes_in_use"] == 0


def test_a_callback_can_be_used_again(tmp_path):
    callback = ActivationOffloadCallback()
    compare_runs(plain(tmp_path, callback), plain(tmp_path, callback))


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("stop")


def test_train_again_after_a_failure(tmp_path):
    callback = SelectiveCheckpointCallback()
    args = TrainingArguments(str(tmp_path), gradient_checkpointing=True, **QUIET)
    model = tiny_qwen3(num_hidden_layers=LAYERS, use_cache=False)
    failing = Fail()
    trainer = Trainer(model, args, train_dataset=lm_dataset(32, length=24), callbacks=[callback, failing])
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.train()
    assert trainer.state.global_step == 3


def test_off_is_an_error_by_name(tmp_path):
    for callback in make_callbacks():
        with pytest.raises(RefusedError, match="Set activation_checkpointing=True"):
            plain(tmp_path, callback, checkpointing=False)
    with pytest.raises(RefusedError, match="use_reentrant=True"):
        plain(tmp_path, ActivationOffloadCallback(), gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RefusedError, match="Take `offload`"):
        plain(tmp_path, ActivationOffloadCallback(), activation_checkpointing_kwargs={"offload": True})
    with pytest.raises(ValueError, match="keep_last=3 leaves none of the 3 layers"):
        plain(tmp_path, ActivationOffloadCallback(keep_last=3))
    with pytest.raises(RefusedError, match="every_n_layers"):
        plain(tmp_path, ActivationOffloadCallback(), activation_checkpointing_kwargs={"every_n_layers": 2})
    with pytest.raises(RefusedError, match="one callback for the modes"):
        plain(tmp_path, ActivationOffloadCallback(), SelectiveCheckpointCallback())


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ActivationOffloadCallback(keep_last=-1), "keep_last=-1"),
        (lambda: ActivationOffloadCallback(keep_last=1.5), "keep_last=1.5"),
        (lambda: MemoryBudgetCallback(0), "budget_gib=0"),
        (lambda: MemoryBudgetCallback(float("nan")), "budget_gib=nan"),
        (lambda: MemoryBudgetCallback(1, max_tokens=0), "max_tokens=0"),
    ],
)
def test_bad_arguments(make, word):
    with pytest.raises(ValueError, match=word):
        make()
    with pytest.raises(RuntimeError, match="before training"):
        _ = ActivationOffloadCallback().stats


def test_the_budget_decides(tmp_path):
    roomy = MemoryBudgetCallback(1)
    plain(tmp_path, roomy)
    assert list(roomy.modes) == ["keep"] * LAYERS
    tight = MemoryBudgetCallback(850_000 / GIB)
    plain(tmp_path, tight)
    assert set(tight.modes) > {"keep"} and list(tight.modes)[-1] == "keep"
    with pytest.raises(ValueError, match="the smallest needs"):
        plain(tmp_path, MemoryBudgetCallback(1000 / GIB))
    # The first batch is small; the largest one is four times as large.
    bound = MemoryBudgetCallback(850_000 / GIB * 4, max_tokens=4 * 96)
    plain(tmp_path, bound)
    assert bound.modes.count("keep") == tight.modes.count("keep")


def test_sft(tmp_path):
    def run(*callbacks):
        args = SFTConfig(str(tmp_path), max_length=32, gradient_checkpointing=True, **QUIET)
        trainer = SFTTrainer(
            tiny_qwen3(num_hidden_layers=LAYERS, use_cache=False),
            args=args,
            train_dataset=sft_dataset(32),
            processing_class=tiny_tokenizer(),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    stock = run()
    offload = ActivationOffloadCallback()
    compare_runs(stock, run(offload))
    assert offload.stats["offloaded_bytes"] > 0
    compare_runs(stock, run(SelectiveCheckpointCallback()))
    args = SFTConfig(str(tmp_path), gradient_checkpointing=True, **QUIET)
    args.activation_offloading = True  # on a machine with an accelerator this is one argument of TRL's
    with pytest.raises(RefusedError, match="activation_offloading=True"):
        offload.on_train_begin(args, None, None, model=None)


def test_grpo(tmp_path):
    """TRL switches checkpointing off for each generation and on again: the modes have to survive that."""

    def run(*callbacks):
        model = tiny_qwen3(end_tokens=10, num_hidden_layers=LAYERS, use_cache=True)
        args = grpo_args(tmp_path, gradient_checkpointing=True, num_iterations=2)
        return run_grpo(GRPOTrainer, args, model=model, callbacks=list(callbacks))

    stock = run()
    offload = ActivationOffloadCallback(keep_last=1)
    compare_runs(stock, run(offload))
    stats = offload.stats
    assert stats["restored_bytes"] == stats["offloaded_bytes"] > 0
    assert stats["prefetched"] == stats["waited"] == 3, "one training forward per step, two layers each"
    assert stats["host_bytes_in_use"] == 0
    compare_runs(stock, run(SelectiveCheckpointCallback()))
    budget = MemoryBudgetCallback(1)
    compare_runs(stock, run(budget))
    assert list(budget.modes) == ["keep"] * LAYERS


def test_lora(tmp_path):
    """Frozen embeddings: the layer inputs need a gradient all the same, and are offloaded."""
    from peft import LoraConfig

    def run(*callbacks):
        args = SFTConfig(str(tmp_path), max_length=32, gradient_checkpointing=True, **QUIET)
        torch.manual_seed(0)
        trainer = SFTTrainer(
            tiny_qwen3(num_hidden_layers=LAYERS, use_cache=False),
            args=args,
            train_dataset=sft_dataset(32),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    offload = ActivationOffloadCallback()
    compare_runs(run(), run(offload))
    assert offload.stats["prefetched"] > 0
