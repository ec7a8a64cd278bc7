import itertools

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_effi.callbacks import MultigridLRCallback
from hf_effi.callbacks.adaptive_lr import AccuracyGradientCallback, GradientSNRCallback, HypergradientCallback
from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.data import Multigrid
from hf_effi.errors import RefusedError
from hf_effi.functional.schedules import wsd
from hf_effi.trainers.mixins import SequenceLengthMixin
from tests.training.lr_schedule_run import Recorder, StopAt, make_trainer, rows
from tests.unit.test_schedule_free import Moves


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


class Rules(TrainerCallback):
    """Notes the multiplier of each rule when the optimizer steps."""

    def __init__(self, *callbacks):
        self.callbacks, self.seen = callbacks, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append([callback.rule.multiplier for callback in self.callbacks])


FLAT = {"window": 1, "quiet": 1, "threshold": 10.0, "greater_is_better": False}
THREE = {
    "gradient_accumulation_steps": 3,
    "per_device_train_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_dataset": rows(4),
}


def three():
    return (
        AccuracyGradientCallback("eval_loss", **FLAT),
        GradientSNRCallback(0.5, 0.01),
        HypergradientCallback(kappa=0.2),
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_multipliers_compose_in_any_order(tmp_path, order):
    """The LR of each update is the scheduled one times all three multipliers."""
    callbacks = three()
    rules = Rules(*callbacks)
    lrs, logged, trainer = run(tmp_path, [callbacks[i] for i in order] + [rules], **THREE)
    assert min(len({seen[i] for seen in rules.seen}) for i in range(3)) > 1, "each of them acts"
    expected = [1e-2 * (1 - t / 12) * a * b * c for t, (a, b, c) in enumerate(rules.seen)]
    assert lrs == pytest.approx(expected, rel=1e-12) and logged == lrs
    names = ("accuracy_gradient", "gradient_snr", "hypergradient")
    entries = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [[entry[f"effi/lr_factor/{name}"] for name in names] for entry in entries] == rules.seen
    one = run(tmp_path, list(three()), **THREE)
    assert one[0] == lrs and same(one[2], trainer), "the order of the callbacks changes no bit"


def test_three_multipliers_and_a_schedule_resume(tmp_path):
    def build(folder, *more, resume=None):
        callbacks = [LRScheduleCallback(wsd(warmup_steps=2)), *three(), *more]
        return run(tmp_path / folder, callbacks, resume=resume, save_strategy="steps", save_steps=100, **THREE)

    whole, _, trainer = build("whole")
    first, _, _ = build("cut", StopAt(7))
    rest, logged, resumed = build("cut", resume=str(tmp_path / "cut" / "checkpoint-7"))
    assert first + rest == whole and logged == rest and same(trainer, resumed)


def test_a_multiplier_that_is_taken_out_leaves_the_others(tmp_path):
    class TakeOut(TrainerCallback):
        def __init__(self):
            self.trainer = None

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (4, 8):
                self.trainer.remove_callback(GradientSNRCallback if state.global_step == 4 else HypergradientCallback)

    _, snr, hyper = three()
    rules, recorder, take_out = Rules(snr, hyper), Recorder(), TakeOut()
    changes = {"gradient_accumulation_steps": 3, "lr_scheduler_type": "constant"}
    trainer = take_out.trainer = make_trainer(tmp_path, [snr, hyper, rules, recorder, take_out], **changes)
    trainer.train()
    lrs = [groups[0] for groups in recorder.applied]
    expected = [a * b if t < 4 else b if t < 8 else 1.0 for t, (a, b) in enumerate(rules.seen)]
    assert lrs == pytest.approx([1e-2 * m for m in expected], rel=1e-12)
    assert len(set(expected[4:8])) > 1


def test_the_rule_of_shapes_composes(tmp_path):
    shapes = Multigrid(8, long_cycle=(2, 1), short_cycle=(2, 1), final_share=0.2)

    class Shaped(SequenceLengthMixin, Trainer):
        def __init__(self, **kwargs):
            super().__init__(sequence_length=shapes, **kwargs)

    hyper = HypergradientCallback(kappa=0.2)
    rules, settings = Rules(hyper), {"lr_scheduler_type": "constant", "trainer_class": Shaped}
    lrs, _, _ = run(tmp_path, [hyper, MultigridLRCallback(shapes), rules], **settings)
    divisors = [shapes.divisor(t, 12) for t in range(12)]
    assert set(divisors) == {1, 2, 4}
    assert lrs == pytest.approx([1e-2 * c * m for c, (m,) in zip(divisors, rules.seen, strict=True)], rel=1e-12)


def test_two_of_a_kind_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="Two callbacks multiply the LR by one rule"):
        run(tmp_path, [HypergradientCallback(), HypergradientCallback(kappa=0.3)])


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="at least 3 micro-batches"):
        run(tmp_path, [GradientSNRCallback()])
    with pytest.raises(RefusedError, match="eval_strategy"):
        run(tmp_path, [AccuracyGradientCallback()])


def test_schedule_free_is_guarded(tmp_path):
    model = make_trainer(tmp_path, []).model

    optimizer = Moves(model.parameters(), lr=0.1)
    with pytest.raises(RefusedError, match="Moves averages its iterates"):
        run(tmp_path, [LRScheduleCallback(wsd())], model=model, optimizers=(optimizer, None))
