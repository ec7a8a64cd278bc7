"""Averaging what a run has saved: equal to the callback's average, loadable, in one file or in shards."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from hf_effi.callbacks.weight_averaging import WeightAveragingCallback
from hf_effi.checkpoint.average import average_checkpoints
from hf_effi.functional.averaging import averaging_weights
from tests.helpers import assert_bitwise_equal, tiny_qwen3, weights_of
from tests.helpers.resume import weights_in
from tests.helpers.sampling import sampler_trainer


@pytest.mark.parametrize("kind", ["ema", "uniform"])
def test_equals_the_callback(tmp_path, kind):
    average = WeightAveragingCallback(3, every_steps=2, kind=kind)
    over = {"save_strategy": "steps", "save_steps": 2, "max_steps": 10, "lr_scheduler_type": "constant"}
    sampler_trainer(tmp_path / "run", Trainer, callbacks=[average], **over).train()
    assert average_checkpoints(tmp_path / "run", tmp_path / "made", 3, kind=kind) == [6, 8, 10]
    assert_bitwise_equal(weights_in(tmp_path / "made"), weights_in(tmp_path / "run" / "averaged"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert {n: t.shape for n, t in weights_of(loaded).items()} == {
        n: t.shape for n, t in weights_of(tiny_qwen3(num_hidden_layers=1)).items()
    }
    assert not (tmp_path / "made" / "trainer_state.json").exists()


def test_shards_and_fewer_than_asked_for(tmp_path):
    models = [tiny_qwen3(seed, num_hidden_layers=1).to(torch.bfloat16) for seed in range(2)]
    for step, model in zip((9, 10), models, strict=True):  # 10 comes after 9, as a number
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="20KB")
    assert len(list((tmp_path / "checkpoint-9").glob("*.safetensors"))) > 1
    assert average_checkpoints(tmp_path, tmp_path / "made", kind="linear") == [9, 10]
    loaded = weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16))
    old, new = (weights_of(model) for model in models)
    low, high = averaging_weights(2, "linear")
    for name, value in loaded.items():
        expected = low * old[name].double() + high * new[name].double()
        torch.testing.assert_close(value.double(), expected, atol=1e-3, rtol=1e-2)
        assert value.dtype is torch.bfloat16


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"The checkpoints \[\]"):
        average_checkpoints(tmp_path, tmp_path / "made")
    tiny_qwen3(num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="exists already"):
        average_checkpoints(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="kind='mean'"):
        average_checkpoints(tmp_path, tmp_path / "made", kind="mean")
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match=r"\[1, 2\].*\[\['model.safetensors'\], \[\]\]"):
        average_checkpoints(tmp_path, tmp_path / "made")
    tiny_qwen3(num_hidden_layers=2).save_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="other tensors"):
        average_checkpoints(tmp_path, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
