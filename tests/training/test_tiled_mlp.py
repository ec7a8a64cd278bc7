from functools import partial

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_effi import KernelPatchCallback
from hf_effi.callbacks.patch import PatchCallback
from hf_effi.kernels import FusedLoRALinear
from hf_effi.kernels.tiled_mlp import tile_mlp
from tests.helpers import compare_runs, lm_dataset, sft_dataset, tiny_qwen3, tiny_tokenizer
from tests.helpers.patches import four_bit_llama
from tests.helpers.sampling import sampler_trainer, stop_and_resume

TILES = partial(tile_mlp, num_shards=3)


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def run(folder, *callbacks, **over):
    over = {"max_steps": 6, "gradient_accumulation_steps": 2, **over}
    trainer = sampler_trainer(folder, Trainer, callbacks=callbacks, model=tiny_qwen3(), **over)
    trainer.train()
    return trainer


@pytest.mark.parametrize("over", [{}, {"activation_checkpointing": True}, {"bf16": True}])
def test_stock_trainer_has_the_same_losses(tmp_path, over):
    plain, tiled = run(tmp_path, **over), run(tmp_path, PatchCallback(TILES), **over)
    assert len(losses(plain)) == 6 and losses(plain).std() > 0.01
    torch.testing.assert_close(losses(tiled), losses(plain), rtol=0, atol=0.03 if "bf16" in over else 1e-5)


def test_the_patch_is_in_force_from_the_start_to_the_end_of_training(tmp_path):
    calls = []

    def counted(model):
        calls.append("on")
        handle = tile_mlp(model)
        revert = handle.revert
        handle.revert = lambda: (calls.append("off"), revert())
        return handle

    trainer = run(tmp_path, PatchCallback(counted))
    assert calls == ["on", "off"] * 2  # when the Trainer was built, and for the training
    mlp = trainer.model.model.layers[0].mlp
    assert "forward" not in mlp.__dict__
    trainer.train()  # again from the start
    assert calls == ["on", "off"] * 3


def test_without_the_callback_a_patched_and_reverted_model_trains_to_the_bit_as_before(tmp_path):
    model = tiny_qwen3()
    tile_mlp(model).revert()
    reverted = sampler_trainer(tmp_path, Trainer, model=model, max_steps=3)
    stock = sampler_trainer(tmp_path, Trainer, model=tiny_qwen3(), max_steps=3)
    for trainer in (reverted, stock):
        trainer.train()
    compare_runs(reverted, stock)


def test_resume_equals_the_uninterrupted_run(tmp_path):
    def make(folder, callbacks):
        return sampler_trainer(folder, Trainer, callbacks=[*callbacks, PatchCallback(TILES)])

    whole, broken, _ = stop_and_resume(tmp_path, make, step=8)
    compare_runs(whole, broken)


def test_sft_with_lora_packing_and_checkpointing(tmp_path):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    def train(*callbacks):
        args = SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            max_steps=4, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2, packing=True,
            max_length=32,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = SFTTrainer(
            tiny_qwen3(),
            args,
            train_dataset=sft_dataset(32),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(target_modules="all-linear"),
            callbacks=list(callbacks),
        )
        trainer.train()
        return losses(trainer)

    plain, tiled = train(), train(PatchCallback(TILES))
    assert plain.std() > 0.01
    torch.testing.assert_close(tiled, plain, rtol=0, atol=1e-5)


def test_a_model_made_at_the_start_of_training_is_patched(tmp_path):
    handles = []

    def noted(model):
        handles.append(tile_mlp(model))
        return handles[-1]

    args = TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=1
    )
    trainer = Trainer(
        None, args, train_dataset=lm_dataset(), model_init=lambda: tiny_qwen3(), callbacks=[PatchCallback(noted)]
    )
    trainer.train()
    assert len(handles) == 2 and all(not handle.replaced for handle in handles)


def test_what_is_no_patch_is_named(tmp_path):
    with pytest.raises(TypeError, match="takes functions of a model"):
        PatchCallback()
    with tile_mlp(tiny_qwen3()) as handle, pytest.raises(TypeError, match="not the handle that it returns"):
        PatchCallback(handle)
    with pytest.raises(ValueError, match="num_shards=0"):
        run(tmp_path, PatchCallback(tile_mlp, partial(tile_mlp, num_shards=0)))


def test_qlora_beside_fused_attention_projections(tmp_path):
    def train(*callbacks):
        torch.manual_seed(0)  # the adapters' first values
        model = four_bit_llama(tmp_path)
        trainer = sampler_trainer(
            tmp_path, Trainer, callbacks=callbacks, model=model, max_steps=4, learning_rate=1e-2, bf16=False
        )
        trainer.train()
        return losses(trainer)

    fused = KernelPatchCallback({"*.self_attn.*_proj": FusedLoRALinear()})
    plain, tiled = train(), train(PatchCallback(TILES), fused)
    assert len(plain) == 4 and plain.std() > 0.01
    torch.testing.assert_close(tiled, plain, rtol=0, atol=1e-4)
