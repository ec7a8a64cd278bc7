"""Folders of weights of strangers, changed at random: merged, or refused in one sentence; nothing is left behind."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hf_effi.checkpoint import WeightFolder, add_instruction_delta, average_checkpoints
from tests.helpers.audit import files_below
from tests.helpers.fuzz import damaged, mutated
from tests.unit.test_fuzz_files import SEEDS, check_sentence

ADAPTER = {
    "peft_type": "LORA",
    "r": 1,
    "lora_alpha": 2,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {"x": 1},
    "alpha_pattern": {"x": 3},
    "target_modules": ["q_proj"],
    "init_lora_weights": True,
}
LOG = [{"step": step, "loss": 1.0 / step, "eval_loss": 2.0, "learning_rate": 0.1} for step in (1, 2)]


@pytest.mark.parametrize("seed", SEEDS)
def test_adapters_and_logs(tmp_path, seed):
    rng, made, refused = random.Random(seed), 0, 0
    weights = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(3, 1)}
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(weights, folder / "adapter_model.safetensors")
        state = {"global_step": step, "max_steps": 2, "log_history": LOG[:step]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    whole = (folder / "adapter_model.safetensors").read_bytes()
    for _ in range(40):
        config = json.dumps(mutated(ADAPTER, rng))
        for step in (1, 2):
            (tmp_path / "run" / f"checkpoint-{step}" / "adapter_config.json").write_text(config)
        state = {"global_step": 2, "max_steps": 2, "log_history": mutated(LOG, rng)}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        (folder / "adapter_model.safetensors").write_bytes(damaged(whole, rng) if rng.random() < 0.3 else whole)
        kind = rng.choice(("loss", "eval_loss", "step", "trend"))
        try:
            average_checkpoints(tmp_path / "run", tmp_path / "made", kind=kind, exact_delta=rng.random() < 0.7)
            made += 1
            shutil.rmtree(tmp_path / "made")
        except ValueError as error:
            check_sentence(error)
            refused += 1
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert made > 5 and refused > 5


@pytest.mark.parametrize("seed", SEEDS)
def test_indices_and_configurations(tmp_path, seed):
    rng, read, refused = random.Random(seed), 0, 0
    for name in ("base", "cpt"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2)}, tmp_path / name / "one.safetensors")
        index = {"metadata": {"total_size": 8}, "weight_map": {"w": "one.safetensors"}}
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = {"config.json": {"model_type": "x", "eos_token_id": [1]}, "tokenizer_config.json": {"chat_template": "x"},
             "model.safetensors.index.json": index}  # fmt: skip
    for name in parts:
        (tmp_path / "base" / name).write_text(json.dumps(parts[name]))
    kept = files_below(tmp_path)
    for _ in range(60):
        for name, content in parts.items():
            text = json.dumps(content if rng.random() < 0.5 else mutated(content, rng)).encode()
            (tmp_path / "cpt" / name).write_bytes(text if rng.random() < 0.8 else damaged(text, rng))
        try:
            assert list(WeightFolder(tmp_path / "cpt")) == ["w"]
            add_instruction_delta(tmp_path / "base", tmp_path / "base", tmp_path / "cpt", tmp_path / "made")
            read += 1
            shutil.rmtree(tmp_path / "made")
        except ValueError as error:
            check_sentence(error)
            refused += 1
        assert files_below(tmp_path) >= kept and not (tmp_path / "made").exists()
    assert read > 5 and refused > 5
