from functools import partial

import pytest
import torch
from transformers import Trainer

from hf_effi import PatchCallback
from hf_effi.kernels.tiled_mlp import tile_mlp
from hf_effi.memory.stream_layer import stream_layers
from hf_effi.memory.tiled_loss import tile_loss
from tests.helpers import compare_runs, sft_dataset, tiny_qwen3, tiny_tokenizer
from tests.helpers.sampling import sampler_trainer, stop_and_resume

CHUNKS = partial(stream_layers, num_chunks=3)


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def run(folder, *callbacks, **over):
    over = {"max_steps": 6, "gradient_accumulation_steps": 2, **over}
    trainer = sampler_trainer(folder, Trainer, callbacks=callbacks, model=tiny_qwen3(), **over)
    trainer.train()
    return trainer


@pytest.mark.parametrize("over", [{}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("patches", [[CHUNKS], [CHUNKS, tile_loss]])
def test_stock_trainer_has_the_same_losses(tmp_path, over, patches):
    plain, streamed = run(tmp_path, **over), run(tmp_path, PatchCallback(*patches), **over)
    assert len(losses(plain)) == 6 and losses(plain).std() > 0.01
    torch.testing.assert_close(losses(streamed), losses(plain), rtol=0, atol=1e-5)


def test_resume_equals_the_uninterrupted_run(tmp_path):
    def make(folder, callbacks):
        return sampler_trainer(folder, Trainer, callbacks=[*callbacks, PatchCallback(CHUNKS)])

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

    plain, streamed = train(), train(PatchCallback(CHUNKS))
    assert plain.std() > 0.01
    torch.testing.assert_close(streamed, plain, rtol=0, atol=1e-5)


def test_grpo_with_checkpointing_has_the_same_weights(tmp_path):
    """Generation and the model's own fused head go on as they are."""
    from trl import GRPOTrainer

    from tests.helpers import grpo_args, run_grpo, weights_of

    def train(*callbacks):
        args = grpo_args(tmp_path, gradient_checkpointing=True, optim="sgd", learning_rate=0.1)
        return run_grpo(GRPOTrainer, args, callbacks=list(callbacks))

    start = weights_of(tiny_qwen3(end_tokens=10))
    plain, ours = weights_of(train().model), weights_of(train(PatchCallback(tile_mlp, CHUNKS)).model)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(plain[name], start[name], atol=1e-5)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)
