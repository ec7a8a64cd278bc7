import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from hf_effi.callbacks.sampler import SamplerCallback
from hf_effi.errors import MismatchError, RefusedError
from hf_effi.samplers import EffiSampler, SelfPacedSampler, ShuffledSampler
from hf_effi.trainers.mixins.sampler import SAMPLER_FILE, SamplerMixin
from tests.helpers import assert_bitwise_equal, compare_runs, grpo_args, run_grpo
from tests.helpers.sampling import StopAt, sampler_trainer, stop_and_resume


class Forward(EffiSampler):
    learns = False

    def order(self, epoch):
        return torch.arange(self.num_rows).roll(epoch)


class Half(Forward):
    """Gives half of the rows per epoch."""

    def __len__(self):
        return self.num_rows // 2

    def order(self, epoch):
        return super().order(epoch)[: len(self)]


class Learned(Forward):
    learns = True
    shift = 0

    def order(self, epoch):
        return super().order(epoch + self.shift)

    def learned_state(self):
        return {"shift": self.shift}

    def load_learned_state(self, state):
        self.shift = state["shift"]

    def _cache_key(self):
        return self.epoch, self.shift


class Plan(Forward):
    single_pass = True


def expected(sampler, epochs, batch=4):
    rows = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        rows += [order[i : i + batch] for i in range(0, len(order), batch)]
    return rows


def test_without_a_sampler_the_mixin_is_the_stock_trainer(tmp_path):
    stock, ours = sampler_trainer(tmp_path, Trainer), sampler_trainer(tmp_path)
    stock.train()
    ours.train()
    assert ours.seen == stock.seen
    compare_runs(stock, ours)


def test_trainer_follows_the_order_in_every_epoch(tmp_path):
    trainer = sampler_trainer(tmp_path, train_sampler=ShuffledSampler(24, seed=5))
    trainer.train()
    assert trainer.seen == expected(ShuffledSampler(24, seed=5), 3)


def test_an_epoch_of_another_length_sets_the_number_of_steps(tmp_path):
    trainer = sampler_trainer(tmp_path, train_sampler=Half(24))
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 9
    assert trainer.seen == expected(Half(24), 3)


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stop_in_epoch_two_and_resume(tmp_path, workers, way):
    def make(folder, callbacks):
        sampler = ShuffledSampler(24, seed=2)
        over = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        if way == "mixin":
            return sampler_trainer(folder, callbacks=callbacks, train_sampler=sampler, **over)
        return sampler_trainer(folder, Trainer, callbacks=[*callbacks, SamplerCallback(sampler)], **over)

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=8)
    assert two == one == expected(ShuffledSampler(24, seed=2), 3)
    compare_runs(whole, broken)


def test_resume_with_accumulation_and_a_ragged_last_batch(tmp_path):
    def make(folder, callbacks):
        return sampler_trainer(
            folder,
            rows=22,
            callbacks=callbacks,
            train_sampler=ShuffledSampler(22),
            gradient_accumulation_steps=2,
        )

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=5)
    assert two == one == expected(ShuffledSampler(22), 3)
    compare_runs(whole, broken)


def test_dispatch_batches(tmp_path):
    trainer = sampler_trainer(
        tmp_path, train_sampler=ShuffledSampler(24), accelerator_config={"dispatch_batches": True}
    )
    trainer.train()
    assert trainer.seen == expected(ShuffledSampler(24), 3)


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_resume_with_workers_dispatched_or_not(tmp_path, dispatch, persistent):
    def make(folder, callbacks):
        return sampler_trainer(
            folder,
            callbacks=callbacks,
            train_sampler=ShuffledSampler(24, seed=2),
            dataloader_num_workers=2,
            dataloader_persistent_workers=persistent,
            dataloader_prefetch_factor=3,
            accelerator_config={"dispatch_batches": dispatch},
        )

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=8)
    assert two == one == expected(ShuffledSampler(24, seed=2), 3)
    compare_runs(whole, broken)


def by_row(model, rows):
    return [float((row * 7) % 24) for row in rows]


def test_a_measuring_sampler_reaches_persistent_workers(tmp_path):
    """Its order is decided after the workers of the first epoch were started."""

    def make(folder, callbacks, workers=2):
        return sampler_trainer(
            folder,
            callbacks=callbacks,
            train_sampler=SelfPacedSampler(24, by_row, share=0.3, share_step=0.3),
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
        )

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=8)
    plain = make(tmp_path / "plain", [], workers=0)
    plain.train()
    assert two == one == plain.seen
    compare_runs(whole, broken)


def test_rule_b_state_is_saved_and_loaded(tmp_path):
    sampler = Learned(24)
    sampler.shift = 3
    trainer = sampler_trainer(tmp_path, train_sampler=sampler, callbacks=[StopAt(7)])
    trainer.train()
    fresh = Learned(24)
    resumed = sampler_trainer(tmp_path, train_sampler=fresh)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert fresh.shift == 3
    sampler.shift = 3
    assert trainer.seen + resumed.seen == expected(sampler, 3)


def test_callback_equals_mixin(tmp_path):
    ours = sampler_trainer(tmp_path, train_sampler=ShuffledSampler(24))
    ours.train()
    stock = sampler_trainer(tmp_path, Trainer, callbacks=[SamplerCallback(ShuffledSampler(24))])
    stock.train()
    assert stock.seen == ours.seen
    assert_bitwise_equal(ours.model, stock.model)


def test_callback_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(RefusedError, match=r"learns during training.*SamplerMixin"):
        SamplerCallback(Learned(24))
    with pytest.raises(ValueError, match="not an EffiSampler"):
        SamplerCallback([1, 2])
    with pytest.raises(RefusedError, match="12 samples and the Trainer has counted its steps with 24"):
        sampler_trainer(tmp_path, Trainer, callbacks=[SamplerCallback(Half(24))]).train()


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_a_checkpoint_of_another_order_is_refused(tmp_path, way):
    def make(sampler, callbacks=()):
        if way == "mixin":
            return sampler_trainer(tmp_path, callbacks=callbacks, train_sampler=sampler)
        more = [SamplerCallback(sampler)] if sampler else []
        return sampler_trainer(tmp_path, Trainer, callbacks=[*callbacks, *more])

    checkpoint = str(tmp_path / "checkpoint-2")
    make(ShuffledSampler(24), [StopAt(2)]).train()
    with pytest.raises(MismatchError, match="other settings, seed or scores"):
        make(ShuffledSampler(24, seed=1)).train(resume_from_checkpoint=checkpoint)
    make(None, [StopAt(2)]).train()
    if way == "mixin":
        (tmp_path / "checkpoint-2" / SAMPLER_FILE).unlink()
    else:
        state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
        assert "hf_effi.sampler" not in state["stateful_callbacks"]
    with pytest.raises(MismatchError, match="without"):
        make(ShuffledSampler(24)).train(resume_from_checkpoint=checkpoint)


def test_refusals_name_the_fix(tmp_path):
    with pytest.raises(ValueError, match="made for 23 rows, but train_dataset has 24"):
        sampler_trainer(tmp_path, train_sampler=ShuffledSampler(23))
    with pytest.raises(RefusedError, match="train_sampling_strategy='sequential'"):
        sampler_trainer(tmp_path, train_sampler=ShuffledSampler(24), train_sampling_strategy="sequential")
    with pytest.raises(RefusedError, match="ignore_data_skip=True"):
        sampler_trainer(tmp_path, train_sampler=ShuffledSampler(24), ignore_data_skip=True)
    with pytest.raises(ValueError, match=r"train_sampler=\[0\] is not an EffiSampler"):
        sampler_trainer(tmp_path, train_sampler=[0])
    sampler = ShuffledSampler(24)
    sampler.start_from(1, 3)
    with pytest.raises(ValueError, match="skipped twice"):
        sampler_trainer(tmp_path, train_sampler=sampler).train()


def test_a_stream_is_refused(tmp_path):
    class StreamTrainer(SamplerMixin, Trainer):
        def __init__(self, **kwargs):
            kwargs["train_dataset"] = kwargs["train_dataset"].to_iterable_dataset()
            super().__init__(**kwargs)

    with pytest.raises(RefusedError, match="train_dataset is a stream"):
        sampler_trainer(tmp_path, StreamTrainer, train_sampler=ShuffledSampler(24), max_steps=3)
    stream = type("Loader", (), {"dataset": Dataset.from_dict({"a": [1]}).to_iterable_dataset()})()
    callback, args = SamplerCallback(ShuffledSampler(24)), sampler_trainer(tmp_path).args
    with pytest.raises(RefusedError, match="train_dataset is a stream"):
        callback.on_train_begin(args, None, None, train_dataloader=stream)


def test_a_run_longer_than_the_plan_is_refused_before_the_first_step(tmp_path):
    trainer = sampler_trainer(tmp_path, train_sampler=Plan(24))
    with pytest.raises(ValueError, match="plan of 6 steps for the whole run, but the run has 18"):
        trainer.train()
    assert trainer.seen == []
    trainer = sampler_trainer(tmp_path, train_sampler=Plan(24), num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 6


def test_grpo_gets_its_own_layout(tmp_path):
    from trl import GRPOTrainer

    class Noting(SamplerMixin, GRPOTrainer):
        seen = ()

        def _generate_and_score_completions(self, inputs):
            self.seen = (*self.seen, *[row["prompt"].split(":")[0] for row in inputs])
            return super()._generate_and_score_completions(inputs)

    trainer = run_grpo(Noting, grpo_args(tmp_path), train_sampler=Forward(16))
    assert trainer.seen == tuple("001122334455")
