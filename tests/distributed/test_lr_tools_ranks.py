"""The range test and the recorded norms on two gloo processes: both ranks say the same, and no update is left."""

import os

import pytest
from transformers import Trainer

from hf_effi.callbacks import GradientNormsCallback
from hf_effi.schedules import lr_range_test
from tests.helpers import assert_bitwise_equal, run_distributed, tiny_qwen3, weights_of
from tests.helpers.sampling import sampler_trainer


def train(folder: str, tested: bool):
    recorder = GradientNormsCallback()
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    over = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": batch, "max_steps": 10}
    model = tiny_qwen3(num_hidden_layers=1)
    trainer = sampler_trainer(folder, Trainer, rows=40, callbacks=[recorder], model=model, **over)
    report = lr_range_test(trainer, steps=10, repeats=2, low=1e-3, high=1e3, stop_factor=2.0) if tested else None
    trainer.seen.clear()
    trainer.train()
    return trainer.seen, weights_of(trainer.model), recorder.norms, report and (str(report), report.curve)


def test_two_ranks_find_one_range_and_train_on_as_if_nothing_was(tmp_path):
    one, other = run_distributed(train, 2, str(tmp_path / "tested"), True)
    stock, _ = run_distributed(train, 2, str(tmp_path / "stock"), False)
    seen, weights, norms, (said, curve) = one
    assert (seen, norms, (said, curve)) == (other[0], other[2], other[3])
    assert (seen, norms) == (stock[0], stock[2])
    assert_bitwise_equal(weights, stock[1])
    assert_bitwise_equal(weights, other[1])
    alone = train(str(tmp_path / "alone"), True)
    assert [rate for rate, _, _ in curve] == [rate for rate, _, _ in alone[3][1]]
    # Above a rate of 1 the rounding of another order of additions has grown.
    assert [loss for _, loss, _ in curve][:5] == pytest.approx([loss for _, loss, _ in alone[3][1]][:5], rel=1e-4)
    assert norms.l1 == pytest.approx(alone[2].l1, rel=1e-3) and norms.l2 == pytest.approx(alone[2].l2, rel=1e-3)
