"""`GradientNormsCallback` through `trainer.train()`: it changes nothing, and records raw gradients."""

import copy
import math

import pytest
import torch
from transformers import Trainer
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi import LRScheduleCallback
from hf_effi.callbacks import AutoLRSCallback, GradientNormsCallback
from hf_effi.callbacks.gradient_norms import STATE_KEY
from hf_effi.errors import RefusedError
from hf_effi.schedules import linear, lr_range_test, norms_of, refined_by_gradient_norm
from tests.helpers import compare_runs, lm_dataset, run_grpo, sft_dataset, tiny_qwen3, tiny_tokenizer
from tests.helpers.compare import record_run
from tests.helpers.grpo import grpo_args
from tests.helpers.sampling import StopAt, sampler_trainer

STEPS = 6
NAMES = ("effi/gradient_l1", "effi/gradient_l2")


def run(folder, *callbacks, resume=None, train=True, **over):
    given = {"max_steps": STEPS, "model": tiny_qwen3(num_hidden_layers=1, attention_dropout=0.1), "logging_steps": 2}
    trainer = sampler_trainer(folder, Trainer, callbacks=callbacks, **{**given, **over})
    if train:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def clipped(tmp_path_factory):
    recorder = GradientNormsCallback()
    return run(tmp_path_factory.mktemp("clipped"), recorder, max_grad_norm=0.1), recorder


def test_nothing_of_the_run_changes(tmp_path, clipped):
    ours = copy.deepcopy(record_run(clipped[0]))
    assert sum(entry.pop(name, None) is not None for entry in ours.log_history for name in NAMES) == 6
    compare_runs(run(tmp_path, max_grad_norm=0.1), ours)
    assert "_get_grad_norm" not in vars(clipped[0])


def test_the_norms_are_those_of_the_raw_gradient(tmp_path, clipped):
    """By a backward of the whole batch outside of the Trainer; clipping, accumulation and their absence agree."""
    first = clipped[0].seen[0]
    model = tiny_qwen3(num_hidden_layers=1)
    tokens = torch.tensor(lm_dataset(24, length=8)["input_ids"])[first]
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    l1 = sum(float(g.abs().sum()) for g in gradients)
    l2 = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    settings = [
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 1e-3},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ]
    for over in settings:
        recorder = GradientNormsCallback()
        plain = {"model": tiny_qwen3(num_hidden_layers=1), "max_steps": 1, "logging_steps": 1}
        trainer = run(tmp_path, recorder, **plain, **over)
        assert [row for batch in trainer.seen for row in batch] == first
        assert recorder.norms.l1 == pytest.approx([l1], rel=1e-5)
        assert recorder.norms.l2 == pytest.approx([l2], rel=1e-5)
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert [logged[name] for name in NAMES] == [*recorder.norms.l1, *recorder.norms.l2]
        assert logged["grad_norm"] == pytest.approx(l2, rel=1e-5)


def test_what_is_recorded_and_logged(clipped):
    trainer, recorder = clipped
    norms = recorder.norms
    assert norms.updates == tuple(range(1, STEPS + 1)) and norms.total == STEPS
    assert norms == norms_of(trainer) == norms_of(trainer.state) == norms_of(recorder)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name, values in zip(NAMES, (norms.l1, norms.l2), strict=True):
        assert [entry[name] for entry in entries] == pytest.approx(
            [(values[i] + values[i + 1]) / 2 for i in range(0, STEPS, 2)]
        )


def test_a_resumed_run_has_the_whole_record(tmp_path, clipped):
    run(tmp_path, GradientNormsCallback(), StopAt(3), max_grad_norm=0.1)
    recorder = GradientNormsCallback()
    again = run(tmp_path, recorder, resume=str(tmp_path / "checkpoint-3"), max_grad_norm=0.1)
    assert recorder.norms == clipped[1].norms
    assert again.state.stateful_callbacks[STATE_KEY] == clipped[0].state.stateful_callbacks[STATE_KEY]


def test_every_other_update_and_the_run_that_uses_it(tmp_path, clipped):
    recorder = GradientNormsCallback(2)
    first = run(tmp_path, recorder, LRScheduleCallback(linear()), max_grad_norm=0.1)
    assert recorder.norms.updates == (2, 4, 6)
    schedule = refined_by_gradient_norm(norms_of(first))
    second = run(tmp_path, LRScheduleCallback(schedule), logging_steps=1)
    rates = [entry["learning_rate"] for entry in second.state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-2 * m for m in schedule.bind(STEPS).trace()])
    assert max(rates) == 1e-2 and rates[-1] == 0


def test_an_update_that_overflowed_is_left_out(tmp_path):
    class Overflows(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.state.global_step == 2:
                model.lm_head.weight.grad.mul_(float("inf"))
            return loss

    recorder = GradientNormsCallback()
    trainer = sampler_trainer(
        tmp_path,
        Overflows,
        callbacks=[recorder],
        max_steps=4,
        model=tiny_qwen3(num_hidden_layers=1),
        max_grad_norm=0.0,
    )
    trainer.create_optimizer()
    trainer.optimizer.step = lambda closure=None: None  # as a loss scaler skips it
    trainer.train()
    assert recorder.norms.updates == (1, 2, 4)


def test_probes_are_left_out(tmp_path):
    recorder = GradientNormsCallback()
    search = AutoLRSCallback(1e-3, 1e-1, stage_steps=2, probes=2, max_stage_steps=2, validation=False)
    trainer = run(tmp_path, search, recorder, lr_scheduler_type="constant", max_steps=8)
    assert recorder.norms.updates == (1, 2, 3, 4) and recorder.norms.total == 4
    assert search.progress["useful_steps"] == 4 and trainer.state.global_step == 8


def test_where_the_norm_cannot_be_had_the_run_goes_on(tmp_path, caplog):
    class Silent(Trainer):
        def _get_grad_norm(self, model, grad_norm=None):
            return None

    recorder = GradientNormsCallback()
    trainer = sampler_trainer(
        tmp_path, Silent, callbacks=[recorder], max_steps=3, model=tiny_qwen3(num_hidden_layers=1)
    )
    trainer.train()
    assert recorder.norms is None and trainer.state.global_step == 3
    said = [record.getMessage() for record in caplog.records if "GradientNormsCallback" in record.getMessage()]
    assert len(said) == 1 and "took no norm of the gradient" in said[0]


def test_sft_and_grpo(tmp_path):
    recorder = GradientNormsCallback()
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True
    )
    rows = {"train_dataset": sft_dataset(16), "processing_class": tiny_tokenizer()}
    SFTTrainer(tiny_qwen3(num_hidden_layers=1), args, callbacks=[recorder], **rows).train()
    assert recorder.norms.updates == (1, 2) and min(recorder.norms.l1) > min(recorder.norms.l2) > 0
    recorder = GradientNormsCallback()
    trainer = run_grpo(GRPOTrainer, grpo_args(tmp_path, max_steps=1), callbacks=[recorder])
    assert recorder.norms.updates == (1,)
    with pytest.raises(RefusedError, match="that of GRPOTrainer does not fall while it learns"):
        lr_range_test(trainer)
