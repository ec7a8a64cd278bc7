"""NF4 and LoRA through bitsandbytes under `EffiGRPOTrainer`, with QeRL's noise on: trained, exact, and small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bench.qerl import weight_bytes
from hf_effi.functional.rollouts import AdaptiveNoise
from tests.helpers import TableReward, save_tiny, tiny_llama, tiny_tokenizer
from tests.training.test_grpo_filter import metric
from tests.training.test_rollout_noise import Watches, train


def nf4_model(folder: Path) -> Any:
    whole = tiny_llama(hidden_size=64, end_tokens=10)
    path = save_tiny(whole, tiny_tokenizer(), folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu")
    # As it was made: bitsandbytes repacks its weights on a CPU when a model is called in evaluation.
    return model.train()


@pytest.mark.parametrize("norms", [None, ["input_layernorm", "norm"]], ids=["frozen norms", "trained norms"])
def test_nf4_and_lora_train_with_the_noise_on(tmp_path: Path, norms: list[str] | None) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=norms)
    noise = AdaptiveNoise(0.2, 0.05, num_stages=3)
    over = {"learning_rate": 3e-2, "reward_funcs": TableReward([[1.0, 0.0]])}  # TRL trains them in bf16: small is none
    model = nf4_model(tmp_path / "model")
    trainer = train(tmp_path, Watches, model=model, peft_config=config, rollout_noise=noise, **over)
    assert metric(trainer, "effi/aqn_applied") == pytest.approx([0.2, 0.1, 0.05], rel=0.2)
    assert trainer.looked >= 3 and len(trainer.turns) == 3  # each forward of the training saw clean norms
    packed = [p for p in trainer.model.parameters() if hasattr(p, "quant_state") and p.dtype == torch.uint8]
    assert len(packed) == 14 and not any(p.requires_grad for p in packed)
    moved = [n for n, p in trainer.model.named_parameters() if "lora_B" in n and p.any()]
    assert len(moved) == 14
    fresh = dict(tiny_llama(hidden_size=64).named_parameters())
    for name, scale in trainer._noise.norms.items():
        own = fresh[name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")]
        assert torch.equal(scale, own) != scale.requires_grad, name


def test_packed_weights_take_four_bits_and_a_scale_for_64_of_them(tmp_path: Path) -> None:
    model = nf4_model(tmp_path)
    whole = tiny_llama(hidden_size=64)
    linear = sum(m.weight.numel() for n, m in whole.named_modules() if n.startswith("model.layers") and "proj" in n)
    layers = [m for n, m in model.named_modules() if "proj" in n]
    assert len(layers) == 14
    codes = model.model.layers[0].mlp.up_proj.weight.quant_state.code
    found = sum(weight_bytes(layer) for layer in layers) - len(layers) * 4 * codes.numel()
    assert found == linear // 2 + linear // 64 * 4  # 4.5 bits each; the table of 16 values aside
    assert weight_bytes(model) < weight_bytes(whole)
