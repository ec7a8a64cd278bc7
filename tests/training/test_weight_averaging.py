"""The average of the last checkpoints through `trainer.train()`: the formula, resume, what it leaves alone."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_effi.callbacks.weight_averaging import AVERAGE_FILE, WeightAveragingCallback
from hf_effi.errors import BrokenFileError, DecayToZeroWarning, MismatchError, RefusedError
from hf_effi.functional.averaging import averaging_weights
from tests.helpers import assert_bitwise_equal, compare_runs, weights_of
from tests.helpers.resume import weights_in
from tests.helpers.sampling import StopAt, sampler_trainer, stop_and_resume


class Snapshots(TrainerCallback):
    """Keeps the weights after every update."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = weights_of(kwargs["model"])


def run(folder, *callbacks, **over):
    trainer = sampler_trainer(folder, Trainer, callbacks=callbacks, **{"lr_scheduler_type": "constant", **over})
    trainer.train()
    return trainer


def mean_of(snapshots, steps, weights):
    return {
        name: sum(w * snapshots[step][name].double() for step, w in zip(steps, weights, strict=True))
        for name in snapshots[steps[0]]
    }


@pytest.mark.parametrize(
    ("kind", "last", "every"), [("ema", 6, None), ("uniform", 3, 2), ("linear", 4, 3), ("ema", 1, 1)]
)
def test_saved_average_is_the_formula_and_training_is_unchanged(tmp_path, kind, last, every):
    stock, seen = run(tmp_path / "stock"), Snapshots()
    ours = run(tmp_path, seen, WeightAveragingCallback(last, every_steps=every, kind=kind))
    compare_runs(stock, ours)
    steps = [18 - (every or 1) * back for back in reversed(range(last))]
    found, expected = weights_in(tmp_path / "averaged"), mean_of(seen.after, steps, averaging_weights(last, kind))
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], atol=1e-6, rtol=1e-6)
    made = json.loads((tmp_path / "averaged" / "average.json").read_text())
    assert made["steps"] == steps and made["weights"] == pytest.approx(averaging_weights(last, kind))
    if last == 1:
        assert_bitwise_equal({n: t for n, t in weights_of(ours.model).items() if n in found}, found)


def test_a_run_shorter_than_the_window_averages_what_it_has(tmp_path):
    seen = Snapshots()
    run(tmp_path, seen, WeightAveragingCallback(6, every_steps=2, kind="uniform"), max_steps=5)
    expected = mean_of(seen.after, [1, 3, 5], [1 / 3] * 3)
    found = weights_in(tmp_path / "averaged")
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], atol=1e-6, rtol=1e-6)


def test_swap_in_says_so_and_the_model_is_what_was_saved(tmp_path, caplog):
    trainer = run(tmp_path, WeightAveragingCallback(3, every_steps=2, swap_in=True))
    found = weights_in(tmp_path / "averaged")
    assert_bitwise_equal({n: t for n, t in weights_of(trainer.model).items() if n in found}, found)
    assert "now holds the average of its weights after updates [14, 16, 18]" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged")
    assert_bitwise_equal(weights_of(loaded), weights_of(trainer.model))


@pytest.mark.parametrize("step", [9, 14, 15])  # before the window, on a snapshot, between two
def test_resume(tmp_path, step):
    def make(folder, callbacks):
        average = WeightAveragingCallback(3, every_steps=2, swap_in=True)
        return sampler_trainer(folder, Trainer, callbacks=[average, *callbacks], lr_scheduler_type="constant")

    whole, broken, _ = stop_and_resume(tmp_path, make, step=step)
    compare_runs(whole, broken)
    assert_bitwise_equal(weights_in(tmp_path / "whole" / "averaged"), weights_in(tmp_path / "broken" / "averaged"))


def test_resume_refuses_what_it_cannot_continue(tmp_path):
    run(tmp_path, WeightAveragingCallback(3, every_steps=2), StopAt(15))
    checkpoint = str(tmp_path / "checkpoint-15")

    def resume(**settings):
        callback = WeightAveragingCallback(**settings)
        trainer = sampler_trainer(tmp_path, Trainer, callbacks=[callback], lr_scheduler_type="constant")
        trainer.train(resume_from_checkpoint=checkpoint)

    with pytest.raises(MismatchError, match=r"updates \[10, 12, 14\] \(window\), but this run wants \[9, 12, 15\]"):
        resume(last=3, every_steps=3)
    (tmp_path / "checkpoint-15" / AVERAGE_FILE).unlink()
    with pytest.raises(BrokenFileError, match="is missing"):
        resume(last=3, every_steps=2)


def test_a_run_that_is_stopped_early_has_its_average(tmp_path):
    """Also where no snapshot of the window at the planned end was taken yet."""
    seen = Snapshots()
    run(tmp_path, seen, WeightAveragingCallback(2, every_steps=2, kind="uniform"), StopAt(5))
    found, expected = weights_in(tmp_path / "averaged"), mean_of(seen.after, [2, 4], [0.5, 0.5])
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], atol=1e-6, rtol=1e-6)


def test_a_run_without_a_snapshot_says_that_nothing_was_averaged(tmp_path, caplog):
    run(tmp_path, WeightAveragingCallback(3, every_steps=7), StopAt(3))
    assert "before the first snapshot: nothing was averaged" in caplog.text
    assert not (tmp_path / "averaged").exists()


def test_frozen_parameters_stay_and_are_not_copied(tmp_path):
    from tests.helpers import tiny_qwen3

    model = tiny_qwen3(num_hidden_layers=1)
    model.model.embed_tokens.weight.requires_grad_(False)
    held = []

    class Look(WeightAveragingCallback):
        def on_step_end(self, *args, **kwargs):
            super().on_step_end(*args, **kwargs)
            held.append(set(self._average.mean))

    run(tmp_path, Look(2, every_steps=1), model=model)
    assert "lm_head.weight" in held[-1] and "model.embed_tokens.weight" not in held[-1]
    name = "model.embed_tokens.weight"
    assert torch.equal(weights_in(tmp_path / "averaged")[name], model.state_dict()[name])


def test_adapters_alone_are_averaged_and_saved(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.helpers import tiny_qwen3

    model = get_peft_model(tiny_qwen3(num_hidden_layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    seen = Snapshots()
    run(tmp_path, seen, WeightAveragingCallback(2, every_steps=1, kind="uniform"), model=model)
    assert {path.name for path in (tmp_path / "averaged").iterdir()} >= {"adapter_model.safetensors", "average.json"}
    loaded = load_file(tmp_path / "averaged" / "adapter_model.safetensors")
    expected = mean_of(seen.after, [17, 18], [0.5, 0.5])
    assert len(loaded) == 2
    for name, value in loaded.items():
        live = expected[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(value.double(), live, atol=1e-6, rtol=1e-6)


def test_tied_weights_stay_tied(tmp_path):
    from tests.helpers import tiny_qwen3

    model = tiny_qwen3(num_hidden_layers=1, tie_word_embeddings=True)
    trainer = run(tmp_path, WeightAveragingCallback(2, every_steps=1, swap_in=True), model=model)
    assert trainer.model.lm_head.weight.data_ptr() == trainer.model.model.embed_tokens.weight.data_ptr()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged")
    assert_bitwise_equal(weights_of(loaded), weights_of(trainer.model))


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}, "both say"),
        ({"optim": "schedule_free_adamw"}, "averages its iterates itself"),
        ({"deepspeed": "on"}, "in shards"),
        ({"fsdp": "on"}, "in shards"),
    ],
)
def test_refusals(tmp_path, over, match):
    trainer = sampler_trainer(tmp_path, Trainer)
    for name, value in over.items():
        setattr(trainer.args, name, value)
    callback = WeightAveragingCallback(swap_in=True)
    with pytest.raises(RefusedError, match=match):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_decay_to_zero_is_named(tmp_path, scheduler):
    with pytest.warns(DecayToZeroWarning, match="worth little or nothing"):
        run(tmp_path, WeightAveragingCallback(), lr_scheduler_type=scheduler, num_train_epochs=1)


def test_a_constant_lr_is_not(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DecayToZeroWarning)
        run(tmp_path, WeightAveragingCallback(), num_train_epochs=1)
