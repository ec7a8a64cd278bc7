"""PEFT's OSF: ranks by importance, what AdamW leaks, and the step between two tasks."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.osf import OSFLayer
from torch import nn
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi.callbacks import OSFProjectionCallback
from hf_effi.errors import RefusedError
from hf_effi.functional.osf import leaked_share
from hf_effi.recipes import osf_next_task, osf_rank_pattern
from tests.helpers import (
    binary_hash_reward,
    compare_runs,
    lm_dataset,
    prompt_dataset,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)
from tests.helpers.sampling import sampler_trainer, stop_and_resume

CONFIG = {"target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"], "effective_rank": 0.5}


def adapted(**over):
    return get_peft_model(tiny_qwen3(num_hidden_layers=1), OSFConfig(**{**CONFIG, **over}))


def inputs(rows=4):
    return {"input_ids": torch.tensor(lm_dataset(rows, length=8)["input_ids"])}


@torch.no_grad()
def logits(model):
    return model.eval()(**inputs()).logits


def leaks(model, start):
    """Return how much of a layer's change of U and V lies in the directions that are to stay: the norm, the share."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, OSFLayer):
            weight = layer.get_base_layer().weight
            left, _, right = torch.linalg.svd(weight, full_matrices=False)
            rank, now = layer.effective_rank["default"], layer.osf_svd_params["default"]
            for change, kept in (
                (now["U_low"].detach() - start[f"{name}.U"], left[:, :rank]),
                ((now["V_low"].detach() - start[f"{name}.V"]).T, right[:rank].T),
            ):
                found.append((float((kept.T @ change).norm()), leaked_share(change, kept)))
    return [max(column) for column in zip(*found, strict=True)]


def lows(model):
    layers = {name: one for name, one in model.named_modules() if isinstance(one, OSFLayer)}
    return {
        f"{name}.{key[0]}": layer.osf_svd_params["default"][key].detach().clone()
        for name, layer in layers.items()
        for key in ("U_low", "V_low")
    }


def run(folder, model, *callbacks, **over):
    start = lows(model)
    trainer = sampler_trainer(
        folder, Trainer, model=model, callbacks=callbacks, **{"max_steps": 4, "weight_decay": 0.1, **over}
    )
    trainer.train()
    return leaks(model, start)


def test_ranks_follow_the_importance_of_a_layer():
    """A layer that passes its input through keeps most: PEFT's effective_rank is what is not trained."""
    model = tiny_qwen3(num_hidden_layers=2)
    with torch.no_grad():
        for weight in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            weight.weight.zero_()
    real = torch.ones(4, 8, dtype=torch.long)
    real[:, 6:] = 0
    before = model.training
    pattern = osf_rank_pattern(model, [{**inputs(), "attention_mask": real}], minimum=0.1, target=0.5)
    assert model.training == before and not any(one._forward_hooks for one in model.modules())
    first, second = pattern.values()
    assert list(pattern) == [rf"(?:^|\.)model\.layers\.{n}\..*" for n in (0, 1)] and 0.1 < first < 0.5 < second < 0.9
    assert first + second == pytest.approx(1.0, abs=1e-3)
    adapter = get_peft_model(model, OSFConfig(target_modules=["up_proj"], rank_pattern=pattern))
    for number, share in enumerate((first, second)):
        layer = adapter.base_model.model.model.layers[number].mlp.up_proj
        assert layer.effective_rank["default"] == int(32 * share)
        assert layer.osf_svd_params["default"]["U_low"].shape == (128, 32 - int(32 * share))
    with pytest.raises(ValueError, match="no token"):
        osf_rank_pattern(model, [])
    with pytest.raises(RefusedError, match="no GradientCheckpointingLayer"):
        osf_rank_pattern(nn.Linear(2, 2), [])


def test_nothing_changes_at_first_and_between_tasks(tmp_path):
    plain = tiny_qwen3(num_hidden_layers=1)
    model = adapted()
    assert (logits(model) - logits(plain)).abs().max() <= 1e-5
    run(tmp_path, model)
    old, learned = dict(model.named_parameters()), logits(model)
    assert (learned - logits(plain)).abs().max() > 1e-3
    assert len(osf_next_task(model)) == 4
    assert (logits(model) - learned).abs().max() <= 1e-4  # sums in another order
    new = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(new) == 12 and all("osf_svd_params" in name and old[name] is not p for name, p in new.items())
    layers = [one for one in model.modules() if isinstance(one, OSFLayer)]
    assert all(not layer.merged and len(layer.hook_handles) == 2 for layer in layers)
    assert run(tmp_path, model, optim="sgd", weight_decay=0.0)[0] < 1e-5  # the new hooks know the new directions
    osf_next_task(model, OSFConfig(**{**CONFIG, "rank_pattern": {"up_proj": 3}}))
    assert {layer.effective_rank["default"] for layer in layers} == {3, 8, 16}
    merged = logits(model)
    assert (logits(model.merge_and_unload()) - merged).abs().max() <= 1e-4


def test_adamw_leaks_and_sgd_does_not(tmp_path):
    assert run(tmp_path, adapted(), optim="sgd", weight_decay=0.0)[0] < 1e-5
    size, share = run(tmp_path, adapted())
    print(f"AdamW leaks {size:.3f}, a share of {share:.3f} of the change")
    assert share > 0.1
    assert run(tmp_path, adapted(), OSFProjectionCallback())[0] < 1e-5


def test_resume(tmp_path):
    def make(folder, callbacks):
        callbacks = [*callbacks, OSFProjectionCallback()]
        return sampler_trainer(folder, Trainer, model=adapted(), callbacks=callbacks, max_steps=6)

    whole, broken, _ = stop_and_resume(tmp_path, make, step=3)
    compare_runs(whole, broken)


def test_sft_and_grpo(tmp_path):
    common = {
        "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "per_device_train_batch_size": 2,
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 1e-2,
    }  # fmt: skip
    for make in (
        lambda model, given: SFTTrainer(
            model, args=SFTConfig(str(tmp_path), **common, max_length=16), train_dataset=sft_dataset(4), **given
        ),
        lambda model, given: GRPOTrainer(
            model,
            binary_hash_reward,
            GRPOConfig(str(tmp_path), **common, num_generations=2, max_completion_length=4),
            train_dataset=prompt_dataset(4),
            **given,
        ),
    ):
        model = adapted()
        start = lows(model)
        make(model, {"processing_class": tiny_tokenizer(), "callbacks": [OSFProjectionCallback()]}).train()
        assert leaks(model, start)[0] < 1e-5


def test_what_is_refused(tmp_path):
    plain = tiny_qwen3(num_hidden_layers=1)
    trainer = sampler_trainer(tmp_path, Trainer, model=plain)
    with pytest.raises(RefusedError, match="finds no OSF layer"):
        OSFProjectionCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=plain)
    trainer = sampler_trainer(tmp_path, Trainer, model=plain)
    trainer.args.deepspeed = "on"
    with pytest.raises(RefusedError, match="DeepSpeed trains others"):
        OSFProjectionCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=plain)
    with pytest.raises(RefusedError, match="no OSF layer"):
        osf_next_task(get_peft_model(tiny_qwen3(num_hidden_layers=1), LoraConfig(target_modules=["q_proj"])))
    model = adapted()
    model.merge_adapter()
    with pytest.raises(RefusedError, match="merged: True"):
        osf_next_task(model)
