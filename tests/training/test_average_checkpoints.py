"""Averaging what a run has saved: equal to the callback's average, weighed by its log, whole checkpoints only."""

import json
import logging
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from hf_effi import cli
from hf_effi.callbacks.weight_averaging import WeightAveragingCallback
from hf_effi.checkpoint import WeightFolder, average_checkpoints, plan_average
from hf_effi.checkpoint.merge_metrics import final_lr_ratio, smoothed_losses
from hf_effi.errors import BrokenFileError, DecayToZeroWarning, MismatchError, RefusedError
from hf_effi.functional.averaging import averaging_weights, trend_weights
from hf_effi.functional.merging import combine, metric_weights
from tests.helpers import assert_bitwise_equal, tiny_qwen3, weights_of
from tests.helpers.resume import weights_in
from tests.helpers.sampling import sampler_trainer


def save(model, folder, step, log=(), **options):
    """A checkpoint as far as an average reads it."""
    path = folder / f"checkpoint-{step}"
    model.save_pretrained(path, **options)
    state = {"global_step": step, "max_steps": 10, "log_history": list(log)}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run at a constant rate with its own average; checkpoints 2, 4, ..., 10, each evaluated."""
    folder = tmp_path_factory.mktemp("run")
    average = WeightAveragingCallback(3, every_steps=2, kind="uniform")
    over = {"save_strategy": "steps", "save_steps": 2, "max_steps": 10, "lr_scheduler_type": "constant"}
    sampler_trainer(folder, Trainer, callbacks=[average], **over).train()
    return folder


def log_of(run):
    return json.loads((run / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]


def states(run, *steps):
    return [weights_in(run / f"checkpoint-{step}") for step in steps]


def test_equals_the_callback(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DecayToZeroWarning)
        assert average_checkpoints(run, tmp_path / "made", 3, kind="uniform") == [6, 8, 10]
    assert_bitwise_equal(weights_in(tmp_path / "made"), weights_in(run / "averaged"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert {n: t.shape for n, t in weights_of(loaded).items()} == {
        n: t.shape for n, t in weights_of(tiny_qwen3(num_hidden_layers=1)).items()
    }
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert "trainer_state.json" not in names and "training_args.bin" not in names and "optimizer.pt" not in names
    about = json.loads((tmp_path / "made" / "average.json").read_text())
    assert about["steps"] == [6, 8, 10] and about["weights"] == [1 / 3] * 3 and about["kind"] == "uniform"


def test_trend_and_metrics_are_the_formulas(run, tmp_path):
    assert average_checkpoints(run, tmp_path / "trend", 4, kind="trend") == [4, 6, 8, 10]
    wanted = combine(states(run, 4, 6, 8, 10), trend_weights(4))
    assert_bitwise_equal(weights_in(tmp_path / "trend"), wanted)
    losses = [entry["loss"] for entry in log_of(run) if "loss" in entry]  # of the updates 1 to 10
    by_loss = plan_average(run, 3, kind="loss", penalty=16.0)
    assert by_loss.values == pytest.approx([sum(losses[a : a + 2]) / 2 for a in (4, 6, 8)])
    assert by_loss.weights == metric_weights(by_loss.values, 16.0)
    by_step = plan_average(run, 3, kind="step")
    assert by_step.weights == metric_weights([6, 8, 10], 4.0, greater_is_better=True)
    assert by_step.lr_ratio == 1.0 and by_step.advice is None
    assert plan_average(run, None, kind="uniform").steps == [2, 4, 6, 8, 10]
    for last in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="last="):
            plan_average(run, last)
    average_checkpoints(run, tmp_path / "none", 3, kind="loss", penalty=0)
    assert_bitwise_equal(weights_in(tmp_path / "none"), weights_in(run / "averaged"))  # uniform, to the bit


def test_metrics_of_the_log_and_decayed_rates(tmp_path, capsys):
    log = [
        {
            "step": step,
            "learning_rate": 0.1 * (4 - step) / 4,
            "eval_loss": 2.0 / step,
            "eval_f1": step / 4,
            "loss": 1.0,
        }
        for step in range(1, 5)
    ]
    for step in (2, 3, 4):
        save(tiny_qwen3(step, num_hidden_layers=1), tmp_path, step, log)
    by_loss = plan_average(tmp_path, 2, kind="eval_loss", penalty=1.0)
    assert by_loss.values == [2 / 3, 0.5] and by_loss.weights == pytest.approx([3 / 7, 4 / 7])
    by_f1 = plan_average(tmp_path, kind="eval_f1", penalty=1.0, greater_is_better=True)
    assert by_f1.weights == pytest.approx([2 / 9, 3 / 9, 4 / 9])
    with pytest.warns(DecayToZeroWarning, match="0 of its peak.*worth nothing"):
        average_checkpoints(tmp_path, tmp_path / "made", 2)
    assert cli.main(["average", str(tmp_path), "--dry-run"]) == 0 and "worth nothing" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"No 'eval_x' was logged at the updates \[3, 4\].*eval_f1, eval_loss"):
        plan_average(tmp_path, 2, kind="eval_x", greater_is_better=True)
    assert final_lr_ratio(log[:1], 4) is None and final_lr_ratio(log, 3) == pytest.approx(1 / 3)
    for step in (3, 4):
        assert smoothed_losses(log, [step], [2, 3, 4]) == [1.0]
    with pytest.raises(ValueError, match="after update 4 and up to 9"):
        smoothed_losses(log, [9], [4, 9])


def test_only_whole_checkpoints_count(tmp_path, caplog, capsys):
    models = [tiny_qwen3(seed, num_hidden_layers=1) for seed in range(3)]
    paths = [save(model, tmp_path, step) for step, model in zip((1, 2, 3), models, strict=True)]
    whole = (paths[2] / "model.safetensors").read_bytes()
    (paths[2] / "model.safetensors").write_bytes(whole[:-100])
    (tmp_path / ".hf_effi-tmp-0" / "checkpoint-4").mkdir(parents=True)  # in progress
    with caplog.at_level(logging.WARNING, "hf_effi"):
        assert average_checkpoints(tmp_path, tmp_path / "made", 2, kind="uniform") == [1, 2]
    assert "checkpoint-3 is not whole: model.safetensors has" in caplog.text
    assert cli.main(["average", str(tmp_path), "--dry-run"]) == 0
    assert "Left out: checkpoint-3 is not whole" in capsys.readouterr().out
    for name, value in combine(states(tmp_path, 1, 2), [0.5, 0.5]).items():
        torch.testing.assert_close(weights_in(tmp_path / "made")[name], value)


def test_shards_of_other_sizes_and_fewer_than_asked_for(tmp_path):
    models = [tiny_qwen3(seed, num_hidden_layers=1, tie_word_embeddings=True).to(torch.bfloat16) for seed in range(2)]
    for step, model in zip((9, 10), models, strict=True):  # 10 comes after 9, as a number
        save(model, tmp_path, step, max_shard_size="20KB" if step == 10 else "5GB")
    assert len(list((tmp_path / "checkpoint-10").glob("*.safetensors"))) > 1
    assert average_checkpoints(tmp_path, tmp_path / "made", kind="linear") == [9, 10]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    old, new = (weights_of(model) for model in models)
    low, high = averaging_weights(2, "linear")
    for name, value in weights_of(loaded).items():
        expected = low * old[name].double() + high * new[name].double()
        torch.testing.assert_close(value.double(), expected, atol=1e-3, rtol=1e-2)
        assert value.dtype is torch.bfloat16
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight  # tied, and averaged once


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint-N"):
        average_checkpoints(tmp_path, tmp_path / "made")
    save(tiny_qwen3(num_hidden_layers=1), tmp_path, 1)
    with pytest.raises(ValueError, match="exists already"):
        average_checkpoints(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="kind='mean'.*greater_is_better"):
        average_checkpoints(tmp_path, tmp_path / "made", kind="mean")
    with pytest.raises(ValueError, match="penalty=-1"):
        average_checkpoints(tmp_path, tmp_path / "made", kind="loss", penalty=-1)
    with pytest.raises(RefusedError, match="exact_delta=True is for LoRA"):
        average_checkpoints(tmp_path, tmp_path / "made", exact_delta=True)
    path = save(tiny_qwen3(num_hidden_layers=2), tmp_path, 2)
    with pytest.raises(MismatchError, match=r"hold other tensors: .*layers\.1"):
        average_checkpoints(tmp_path, tmp_path / "made")
    (path / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"checkpoint-2 has no model\.safetensors.*FULL_STATE_DICT"):
        average_checkpoints(tmp_path, tmp_path / "made")
    config = json.loads((path / "config.json").read_text())
    save(tiny_qwen3(num_hidden_layers=1, hidden_size=16), tmp_path, 2)
    with pytest.raises(MismatchError, match=r"has shape \[\d+, 32\] in .*checkpoint-1 and \[\d+, 16\]"):
        average_checkpoints(tmp_path, tmp_path / "made")
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(RefusedError, match="quantized"):
        average_checkpoints(tmp_path, tmp_path / "made")
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").rename(path / "part.safetensors")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../part.safetensors"}}')
    with pytest.raises(BrokenFileError, match="names no files of this folder"):
        WeightFolder(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "part.safetensors"}}')
    with pytest.raises(BrokenFileError, match=r"lacks tensors .*\['w'\]"):
        WeightFolder(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
