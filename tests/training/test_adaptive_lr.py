import pytest
import torch

from hf_effi.callbacks.adaptive_lr import AccuracyGradientCallback, GradientSNRCallback, HypergradientCallback
from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.functional.schedules import ScheduleError, wsd
from tests.training.lr_schedule_run import Recorder, StopAt, make_trainer, rows


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(out, callbacks, resume=None, **changes):
    recorder = Recorder()
    trainer = make_trainer(out, [*callbacks, recorder], **changes)
    trainer.train(resume_from_checkpoint=resume)
    return [g[0] for g in recorder.applied], recorder.logged, trainer


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


CASES = {
    "hypergradient": (lambda: HypergradientCallback(kappa=0.2), {}),
    "snr": (lambda: GradientSNRCallback(), {"gradient_accumulation_steps": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_multiplier_acts_is_logged_and_resumes(tmp_path, name):
    make, changes = CASES[name]
    whole, logged, trainer = run(tmp_path / "whole", [LRScheduleCallback(wsd(warmup_steps=2)), make()], **changes)
    plain = [1e-2 * wsd(12, warmup_steps=2)(t) for t in range(12)]
    assert logged == whole and whole != plain
    parts = [LRScheduleCallback(wsd(warmup_steps=2)), make(), StopAt(7)]
    first, _, _ = run(tmp_path / "cut", parts, save_strategy="steps", **changes)
    rest, _, resumed = run(
        tmp_path / "cut",
        [LRScheduleCallback(wsd(warmup_steps=2)), make()],
        resume=str(tmp_path / "cut" / "checkpoint-7"),
        **changes,
    )
    assert first + rest == whole and same(trainer, resumed)


def test_accuracy_gradient_cuts_on_a_flat_metric(tmp_path):
    callback = AccuracyGradientCallback("eval_accuracy", window=1, quiet=1)
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        [callback, recorder],
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=rows(4),
        compute_metrics=lambda prediction: {"accuracy": 0.5},
    )
    trainer.train()
    lrs = [g[0] for g in recorder.applied]
    assert lrs[0] == 1e-2 and lrs[-1] < 1e-2 and recorder.logged == lrs
    assert all(a >= b for a, b in zip(lrs, lrs[1:], strict=False))


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ScheduleError, match="at least 3 micro-batches"):
        run(tmp_path, [GradientSNRCallback()])
    with pytest.raises(ScheduleError, match="eval_strategy"):
        run(tmp_path, [AccuracyGradientCallback()])


def test_schedule_free_is_guarded(tmp_path):
    model = make_trainer(tmp_path, []).model

    class AdamWScheduleFree(torch.optim.SGD):
        pass

    optimizer = AdamWScheduleFree(model.parameters(), lr=0.1)
    with pytest.raises(ScheduleError, match="AdamWScheduleFree averages its iterates"):
        run(tmp_path, [LRScheduleCallback(wsd())], model=model, optimizers=(optimizer, None))
