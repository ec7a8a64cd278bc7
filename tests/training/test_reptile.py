import pytest
import torch
from transformers import Trainer

from hf_effi.callbacks.reptile import REFERENCE_FILE, ReptileCallback
from hf_effi.errors import BrokenFileError, RefusedError
from hf_effi.samplers import ReplaySampler
from tests.helpers import compare_runs, tiny_qwen3, weights_of
from tests.helpers.sampling import StopAt, sampler_trainer, stop_and_resume


def run(folder, *callbacks, **over):
    trainer = sampler_trainer(folder, Trainer, callbacks=callbacks, **over)
    trainer.train()
    return trainer


def test_beta_one_is_the_stock_trainer_to_the_bit(tmp_path):
    compare_runs(run(tmp_path), run(tmp_path, ReptileCallback(2, 1.0)))


def test_one_interval_by_hand(tmp_path):
    """Before the first Reptile step the run is the stock one, and the step takes it back by the formula."""
    start = weights_of(tiny_qwen3(num_hidden_layers=1))
    stock = weights_of(run(tmp_path, max_steps=4).model)
    ours = weights_of(run(tmp_path, ReptileCallback(4, 0.25), max_steps=4).model)
    for name in start:
        assert torch.equal(ours[name], start[name] + 0.25 * (stock[name] - start[name])), name


@pytest.mark.parametrize("last_partial", [False, True])
def test_the_end_of_a_run_inside_an_interval(tmp_path, last_partial):
    stock = weights_of(run(tmp_path, max_steps=3).model)
    start = weights_of(tiny_qwen3(num_hidden_layers=1))
    ours = weights_of(run(tmp_path, ReptileCallback(4, 0.5, last_partial=last_partial), max_steps=3).model)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = start[name] + 0.5 * (stock[name] - start[name]) if last_partial else stock[name]
    assert torch.equal(ours[name], expected)


@pytest.mark.parametrize("step", [8, 9])  # on a Reptile step, and between two
def test_resume(tmp_path, step):
    def make(folder, callbacks):
        return sampler_trainer(folder, Trainer, callbacks=[*callbacks, ReptileCallback(4, 0.3)])

    whole, broken, _ = stop_and_resume(tmp_path, make, step=step)
    compare_runs(whole, broken)


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_master_weights_out_of_reach_are_refused(tmp_path, name):
    trainer = sampler_trainer(tmp_path, Trainer)
    setattr(trainer.args, name, "on")
    with pytest.raises(RefusedError, match="master weights"):
        ReptileCallback(4, 0.3).on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_replay_with_reptile_steps_resumes(tmp_path):
    """Meta-experience replay: one old row in each batch of four, and a Reptile step every third update."""

    def make(folder, callbacks):
        replay = ReplaySampler([row < 8 for row in range(24)], rate=0.25, block=4)
        callbacks = [*callbacks, ReptileCallback(3, 0.3)]
        return sampler_trainer(folder, callbacks=callbacks, train_sampler=replay, num_train_epochs=1)

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=4)
    assert one == two and [sum(row < 8 for row in batch) for batch in one[:5]] == [1] * 5
    compare_runs(whole, broken)


def test_a_checkpoint_without_its_reference_is_refused(tmp_path):
    run(tmp_path, ReptileCallback(4, 0.3), StopAt(3))
    (tmp_path / "checkpoint-3" / REFERENCE_FILE).unlink()
    trainer = sampler_trainer(tmp_path, Trainer, callbacks=[ReptileCallback(4, 0.3)])
    with pytest.raises(BrokenFileError, match="is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
