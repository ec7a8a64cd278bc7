"""Presets through `trainer.train()`, and the warning where an ascending order meets a decay to zero."""

import warnings

import pytest
import torch
from transformers import Trainer

from hf_effi import LRScheduleCallback
from hf_effi.callbacks.sampler import SamplerCallback
from hf_effi.errors import DecayToZeroWarning
from hf_effi.recipes import cdma, cma, stability_gap
from hf_effi.samplers import QualityAscendingSampler, ShuffledSampler
from hf_effi.schedules import wsd
from tests.helpers import assert_bitwise_equal, compare_runs, weights_of
from tests.helpers.resume import weights_in
from tests.helpers.sampling import SamplerTrainer, sampler_trainer, stop_and_resume

ROWS = 48
SCORES = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize("cls", [Trainer, SamplerTrainer])
def test_cdma_on_a_stock_trainer_and_on_ours(tmp_path, cls):
    preset = cdma(SCORES)
    trainer = sampler_trainer(tmp_path, cls, rows=ROWS, callbacks=preset["callbacks"], num_train_epochs=1)
    trainer.train()
    served = [row for batch in trainer.seen for row in batch]
    assert bool((SCORES[served].diff() >= 0).all()) and sorted(served) == list(range(ROWS))
    found = rates(trainer)
    assert found[0] == found[8] == pytest.approx(1e-2)  # a warm-up of 5 % is one update here
    assert 1e-2 / 3 < found[-1] < 0.6e-2 and found[-1] < found[-2] < 1e-2
    assert any(
        not torch.equal(value, weights_of(trainer.model)[name])
        for name, value in weights_in(tmp_path / "averaged").items()
    )


@pytest.mark.parametrize("step", [5, 10])  # before the six last updates, and among them
def test_cma_resumes(tmp_path, step):
    def make(folder, callbacks):
        callbacks = [*cma(SCORES)["callbacks"], *callbacks]
        return sampler_trainer(folder, Trainer, rows=ROWS, callbacks=callbacks, num_train_epochs=1)

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=step)
    assert one == two
    compare_runs(whole, broken)
    assert_bitwise_equal(weights_in(tmp_path / "whole" / "averaged"), weights_in(tmp_path / "broken" / "averaged"))


def test_stability_gap_is_served_and_resumed(tmp_path):
    sources = ["web"] * 24 + ["medical"] * 24

    def make(folder, callbacks):
        preset = stability_gap(SCORES, sources, "medical", block=4, keep=0.25, new_share=0.75)
        return sampler_trainer(
            folder,
            rows=ROWS,
            callbacks=[*preset["callbacks"], *callbacks],
            train_sampler=preset["train_sampler"],
            num_train_epochs=1,
        )

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=5)
    assert one == two and len(one) == 8  # 6 kept rows, 4 times, 3 of them in each batch of 4
    best = set((SCORES[24:].topk(6).indices + 24).tolist())
    for batch in one:
        assert len(best & set(batch)) == 3 and sum(row < 24 for row in batch) == 1
    compare_runs(whole, broken)


def train(tmp_path, way, sampler, *callbacks, **over):
    callbacks = list(callbacks)
    if way == "callback":
        callbacks = [SamplerCallback(sampler), *callbacks]
        trainer = sampler_trainer(tmp_path, Trainer, rows=ROWS, callbacks=callbacks, num_train_epochs=1, **over)
    else:
        over["train_sampler"] = sampler
        trainer = sampler_trainer(tmp_path, rows=ROWS, callbacks=callbacks, num_train_epochs=1, **over)
    trainer.train()


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_an_ascending_order_with_a_decay_to_zero_is_named_and_goes_on(tmp_path, way):
    for scheduler in ("linear", "cosine"):
        with pytest.warns(
            DecayToZeroWarning, match="QualityAscendingSampler serves the rows with the highest"
        ) as seen:
            train(tmp_path, way, QualityAscendingSampler(SCORES), lr_scheduler_type=scheduler)
        assert len([w for w in seen if w.category is DecayToZeroWarning]) == 1
    with pytest.warns(DecayToZeroWarning, match="ends at 0.05 of its peak"):
        train(tmp_path, way, QualityAscendingSampler(SCORES), LRScheduleCallback(wsd(floor=0.05)))


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_it_is_silent_where_nothing_fights(tmp_path, way):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DecayToZeroWarning)
        train(tmp_path, way, ShuffledSampler(ROWS), lr_scheduler_type="cosine")
        train(tmp_path, way, QualityAscendingSampler(SCORES, descending=True), lr_scheduler_type="cosine")
        train(tmp_path, way, QualityAscendingSampler(SCORES), lr_scheduler_type="constant")
        # The callback with the schedule comes after the one with the sampler, and is heard all the same.
        train(tmp_path, way, QualityAscendingSampler(SCORES), LRScheduleCallback(wsd(floor=1 / 3)))


def test_cdma_with_a_final_ratio_near_zero_warns_of_both(tmp_path):
    callbacks = cdma(SCORES, final_ratio=0.05)["callbacks"]
    trainer = sampler_trainer(tmp_path, Trainer, rows=ROWS, callbacks=callbacks, num_train_epochs=1)
    with pytest.warns(DecayToZeroWarning) as seen:
        trainer.train()
    texts = [str(w.message) for w in seen if w.category is DecayToZeroWarning]
    assert len(texts) == 2 and any("serves the rows" in t for t in texts) and any("average" in t for t in texts)
