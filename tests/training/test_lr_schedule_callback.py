import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState

from hf_effi.callbacks.lr_schedule import STATE_KEY, LRScheduleCallback, check_scheduler
from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.schedules import (
    TokenCounter,
    constant,
    cosine,
    infinite,
    join,
    linear,
    one_cycle,
    power,
    rewarm_redecay,
    slow_start_fast_decay,
    token_indexed,
    wsd,
    wsd_s,
    wsdc,
)
from tests.helpers import run_distributed
from tests.training.lr_schedule_run import Recorder, StopAt, make_trainer, tiny_model, traced_run, train

LR = 1e-2
SCHEDULE = {"warmup_steps": 3, "decay_steps": 4}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def flat(applied):
    return [groups[0] for groups in applied]


def closed_form(schedule, steps=12, lr=LR):
    return [lr * schedule(t) for t in range(steps)]


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("schedule", [wsd(**SCHEDULE), wsd(12, **SCHEDULE), cosine(warmup_fraction=0.25), linear()])
def test_applied_and_logged_lr_equal_the_closed_form(tmp_path, schedule):
    applied, logged, _ = train(tmp_path, schedule)
    assert flat(applied) == closed_form(schedule.bind(12))
    assert logged == flat(applied)


def test_epochs_and_accumulation(tmp_path):
    applied, logged, trainer = train(
        tmp_path, wsd(**SCHEDULE), max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=4
    )
    assert trainer.state.max_steps == 12
    assert flat(applied) == closed_form(wsd(12, **SCHEDULE)) == logged


def test_a_constant_schedule_is_the_stock_trainer_to_the_bit(tmp_path):
    _, _, ours = train(tmp_path, constant())
    stock = make_trainer(tmp_path, [], lr_scheduler_type="constant")
    stock.train()
    assert same_weights(ours, stock)


def test_linear_is_the_stock_trainer_to_the_bit(tmp_path):
    _, _, ours = train(tmp_path, linear())
    stock = make_trainer(tmp_path, [])
    stock.train()
    assert same_weights(ours, stock)


def test_every_group_keeps_its_own_base_lr(tmp_path):
    model = tiny_model()
    embedding = list(model.get_input_embeddings().parameters())
    ids = {id(p) for p in embedding}
    others = [p for p in model.parameters() if id(p) not in ids]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": embedding, "lr": 1e-3}], lr=LR)
    applied, _, _ = train(tmp_path, wsd(**SCHEDULE), model=model, optimizers=(optimizer, None))
    schedule = wsd(12, **SCHEDULE)
    assert applied == [[LR * schedule(t), 1e-3 * schedule(t)] for t in range(12)]


def test_with_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    applied, logged, _ = train(tmp_path, wsd(**SCHEDULE), model=model)
    assert flat(applied) == closed_form(wsd(12, **SCHEDULE)) == logged


@pytest.mark.parametrize("cut", [2, 6, 10])
def test_stop_and_resume_is_the_uninterrupted_run(tmp_path, cut):
    """In the warm-up, on the plateau and in the decay."""
    whole, logged, trainer = train(tmp_path / "whole", wsd(**SCHEDULE))
    first, first_logged, _ = train(tmp_path / "cut", wsd(**SCHEDULE), extra=[StopAt(cut)], save_strategy="steps")
    rest, rest_logged, resumed = train(
        tmp_path / "cut", wsd(**SCHEDULE), resume=str(tmp_path / "cut" / f"checkpoint-{cut}")
    )
    assert first + rest == whole and len(first) == cut
    assert first_logged + rest_logged == logged
    assert same_weights(trainer, resumed)


class DecayAt(TrainerCallback):
    def __init__(self, schedule_callback, step):
        self.schedule_callback, self.step = schedule_callback, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.schedule_callback.start_decay(4, shape="linear")


def run_on_demand(out, resume=None, cut=None, **changes):
    callback, recorder = LRScheduleCallback(wsd(warmup_steps=2, open_ended=True)), Recorder()
    extra = [DecayAt(callback, 5)] + ([StopAt(cut)] if cut else [])
    trainer = make_trainer(out, [callback, recorder, *extra], save_strategy="steps", save_steps=100, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return recorder.applied, recorder.logged, trainer


def test_start_decay_during_training_then_resume_in_it(tmp_path):
    whole, logged, trainer = run_on_demand(tmp_path / "whole")
    expected = wsd(warmup_steps=2).start_decay(at=5, decay_steps=4, shape="linear")
    assert flat(whole) == closed_form(expected, 9) == logged
    assert trainer.state.global_step == 9, "training ends with the decay"
    assert (tmp_path / "whole" / "checkpoint-9").is_dir()
    first, _, _ = run_on_demand(tmp_path / "cut", cut=7)
    rest, _, resumed = run_on_demand(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-7"))
    assert first + rest == whole and same_weights(trainer, resumed)


def checkpoint(tmp_path, schedule, step=6, **changes):
    train(tmp_path, schedule, extra=[StopAt(step)], save_strategy="steps", **changes)
    return str(tmp_path / f"checkpoint-{step}")


def test_the_checkpoint_carries_the_schedule_as_json(tmp_path):
    path = checkpoint(tmp_path, wsd(**SCHEDULE))
    stored = json.loads((Path(path) / "trainer_state.json").read_text())["stateful_callbacks"][STATE_KEY]
    assert stored["current"] == wsd(12, **SCHEDULE).spec()
    assert TrainerState.load_from_json(str(Path(path) / "trainer_state.json")).global_step == 6


def test_another_length_is_an_error_until_said_otherwise(tmp_path):
    path = checkpoint(tmp_path, wsd(**SCHEDULE))
    with pytest.raises(MismatchError, match="total_steps: 12 -> 20"):
        train(tmp_path, wsd(**SCHEDULE), resume=path, max_steps=20)
    applied, _, _ = train(tmp_path, wsd(**SCHEDULE), resume=path, max_steps=20, on_mismatch="new")
    assert flat(applied) == closed_form(wsd(20, **SCHEDULE), 20)[6:]
    applied, _, _ = train(tmp_path, linear(), resume=path, max_steps=12, on_mismatch="stored")
    assert flat(applied) == closed_form(wsd(12, **SCHEDULE))[6:]


def test_a_decaying_run_is_not_lifted_by_accident(tmp_path):
    path = checkpoint(tmp_path, wsd(**SCHEDULE), step=10)
    with pytest.raises(MismatchError, match="would lift it"):
        train(tmp_path, wsd(**SCHEDULE), resume=path, max_steps=20, on_mismatch="new")


def test_another_learning_rate_is_not_ignored(tmp_path):
    path = checkpoint(tmp_path, wsd(**SCHEDULE))
    with pytest.raises(MismatchError, match="learning_rate=0.01, this run has 0.005"):
        train(tmp_path, wsd(**SCHEDULE), resume=path, learning_rate=5e-3)
    applied, _, _ = train(tmp_path, wsd(**SCHEDULE), resume=path, learning_rate=5e-3, on_mismatch="new")
    assert flat(applied) == pytest.approx(closed_form(wsd(12, **SCHEDULE), lr=5e-3)[6:], rel=1e-12)


def test_a_checkpoint_of_a_stock_run_needs_a_word(tmp_path):
    stock = make_trainer(tmp_path, [StopAt(6)], save_strategy="steps")
    stock.train()
    path = str(tmp_path / "checkpoint-6")
    with pytest.raises(MismatchError, match="without LRScheduleCallback"):
        train(tmp_path, wsd(**SCHEDULE), resume=path)
    applied, _, _ = train(tmp_path, wsd(**SCHEDULE), resume=path, on_mismatch="new")
    assert flat(applied) == closed_form(wsd(12, **SCHEDULE))[6:]


def test_train_twice(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [LRScheduleCallback(wsd(**SCHEDULE)), recorder])
    trainer.train()
    trainer.train()
    assert flat(recorder.applied) == pytest.approx(closed_form(wsd(12, **SCHEDULE)) * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine'"),
        ({"warmup_steps": 2}, "warmup_steps=2"),
        ({"max_steps": 13}, "total_steps=12, but the run has 13"),
        ({"max_steps": 11}, "total_steps=12, but the run has 11"),
    ],
)
def test_settings_that_would_be_ignored_raise(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, wsd(12, **SCHEDULE), **changes)


def test_schedulers_of_others_are_refused_by_name(tmp_path):
    from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper, DummyScheduler
    from transformers.optimization import GreedyLR, LayerWiseDummyScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    wrapped = DeepSpeedSchedulerWrapper(torch.optim.lr_scheduler.ConstantLR(optimizer), optimizer)
    for scheduler in (wrapped, DummyScheduler(optimizer)):
        with pytest.raises(RefusedError, match="DeepSpeed owns the LR scheduler"):
            check_scheduler(scheduler)
    for scheduler in (torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), GreedyLR(optimizer)):
        with pytest.raises(RefusedError, match=f"{type(scheduler).__name__} is driven by an evaluation metric"):
            check_scheduler(scheduler)
    with pytest.raises(RefusedError, match="layer-wise"):
        check_scheduler(object.__new__(LayerWiseDummyScheduler))
    step = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(RefusedError, match="StepLR"):
        train(tmp_path, linear(), optimizers=(optimizer, step))


def test_start_decay_outside_training_and_bad_arguments():
    with pytest.raises(ValueError, match="no training runs"):
        LRScheduleCallback(wsd()).start_decay(3)
    with pytest.raises(ValueError, match="is not a Schedule"):
        LRScheduleCallback("wsd")
    with pytest.raises(ValueError, match="on_mismatch='yes'"):
        LRScheduleCallback(wsd(), on_mismatch="yes")


def two_processes(out, stop_at=None):
    return run_distributed(traced_run, 2, str(out), stop_at)


def test_two_processes_follow_the_same_lrs(tmp_path):
    traces = two_processes(tmp_path)
    assert [trace["world"] for trace in traces] == [2, 2]
    expected = closed_form(wsd(12, **SCHEDULE))
    assert flat(traces[0]["applied"]) == flat(traces[1]["applied"]) == expected == traces[0]["logged"]


@pytest.mark.parametrize("cut", [5, 10])
def test_one_process_goes_on_where_two_stopped(tmp_path, cut):
    """On the plateau and in the middle of the decay: the series is that of the uninterrupted run, bit for bit."""
    first = two_processes(tmp_path, cut)[0]
    rest, logged, _ = train(
        tmp_path, wsd(**SCHEDULE), resume=str(tmp_path / f"checkpoint-{cut}"), gradient_accumulation_steps=4
    )
    assert flat(first["applied"]) + flat(rest) == closed_form(wsd(12, **SCHEDULE)) == first["logged"] + logged


def test_a_checkpoint_of_one_process_resumes_the_schedule_of_any_world(tmp_path):
    """The stored state has no trace of the world size: only updates and multipliers."""
    path = checkpoint(tmp_path, wsd(**SCHEDULE), per_device_train_batch_size=4)
    applied, _, _ = train(
        tmp_path, wsd(**SCHEDULE), resume=path, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert flat(applied) == closed_form(wsd(12, **SCHEDULE))[6:]


def test_metric_driven_trainer_is_refused_through_train(tmp_path):
    optimizer = torch.optim.SGD(tiny_model().parameters(), lr=LR)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    trainer = make_trainer(tmp_path, [LRScheduleCallback(wsd())], optimizers=(optimizer, plateau))
    assert isinstance(trainer, Trainer)
    with pytest.raises(RefusedError, match="evaluation metric"):
        trainer.train()


@pytest.mark.parametrize(
    "schedule",
    [
        wsd_s(budgets=(0.5, 1.0), decay_fraction=0.3),
        wsdc(),
        infinite(warmup_steps=1),
        rewarm_redecay(data_fractions=(0.5, 0.5)),
        slow_start_fast_decay(),
        join(schedules=(constant(), linear()), boundaries=(4,)),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_each_family_through_train(tmp_path, schedule):
    applied, logged, _ = train(tmp_path, schedule)
    assert flat(applied) == closed_form(schedule.bind(12)) == logged


class Momenta(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.values.append(kwargs["optimizer"].param_groups[0]["betas"][0])


def test_one_cycle_cycles_beta1_also_after_a_resume(tmp_path):
    seen, schedule = Momenta(), one_cycle(12)
    whole, _, trainer = train(tmp_path / "whole", one_cycle(), extra=[seen])
    assert seen.values == [schedule.momentum(t) for t in range(12)] and flat(whole) == closed_form(schedule)
    train(tmp_path / "cut", one_cycle(), extra=[StopAt(5)], save_strategy="steps")
    seen = Momenta()
    _, _, resumed = train(tmp_path / "cut", one_cycle(), resume=str(tmp_path / "cut" / "checkpoint-5"), extra=[seen])
    assert seen.values == [schedule.momentum(t) for t in range(5, 12)] and same_weights(trainer, resumed)


def test_an_absolute_schedule_checks_the_learning_rate(tmp_path):
    schedule = power(tokens_per_step=2**22, max_lr=LR)
    applied, _, _ = train(tmp_path, schedule)
    assert flat(applied) == closed_form(schedule.bind(12))
    with pytest.raises(ValueError, match="optimizer LR of 0.02, but the optimizer has 0.01"):
        train(tmp_path, power(tokens_per_step=2**22))


class GrowAt(TrainerCallback):
    """Makes the batch twice as large after an update, and says so to the schedule."""

    def __init__(self, schedule_callback, step):
        self.schedule_callback, self.step = schedule_callback, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            args.gradient_accumulation_steps *= 2
            self.schedule_callback.change_batch(2 * 16)


def run_growing(out, resume=None, cut=None):
    callback, recorder = LRScheduleCallback(power(tokens_per_step=16, a=0.05, sequence_length=16)), Recorder()
    extra = [GrowAt(callback, 4)] + ([StopAt(cut)] if cut else [])
    trainer = make_trainer(out, [callback, recorder, *extra], learning_rate=0.02, save_strategy="no")
    trainer.train(resume_from_checkpoint=resume)
    return recorder.applied, recorder.logged, callback


def test_power_follows_a_batch_that_a_callback_changes_and_a_checkpoint_keeps_it(tmp_path):
    whole, logged, callback = run_growing(tmp_path / "whole")
    plain = power(12, tokens_per_step=16, a=0.05, sequence_length=16, max_lr=1e9, reference_lr=0.02)
    expected = plain.with_batch(4, 32).replace(max_lr=0.02)
    assert callback.current == expected and flat(whole) == closed_form(expected, lr=0.02) == logged
    first, _, _ = run_growing(tmp_path / "cut", cut=6)
    rest, _, resumed = run_growing(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-6"))
    assert first + rest == whole and resumed.current == expected
    with pytest.raises(ValueError, match="no training runs"):
        LRScheduleCallback(wsd()).change_batch(3)
    with pytest.raises(ValueError, match="wsd does not depend on the batch size"):
        callback = LRScheduleCallback(wsd())
        train_with = make_trainer(tmp_path, [callback, GrowAt(callback, 4)])
        train_with.train()


class Feed(TrainerCallback):
    """Every second update consumes only half of its tokens."""

    def __init__(self, counter):
        self.counter = counter

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.counter.add(16 if state.global_step % 2 == 0 else 8)


def test_token_indexed_follows_the_counter_and_resumes(tmp_path):
    def parts():
        counter = TokenCounter(full_step=16)
        return {"counter": counter, "extra": [Feed(counter)]}

    whole, logged, _ = train(tmp_path / "whole", token_indexed(schedule=linear()), **parts())
    progress = [sum(1.0 if s % 2 == 0 else 0.5 for s in range(t)) for t in range(12)]
    assert flat(whole) == [LR * linear(12)(p) for p in progress] == logged
    options = parts()
    options["extra"].append(StopAt(5))
    first, _, _ = train(tmp_path / "cut", token_indexed(schedule=linear()), save_strategy="steps", **options)
    rest, _, _ = train(
        tmp_path / "cut", token_indexed(schedule=linear()), resume=str(tmp_path / "cut" / "checkpoint-5"), **parts()
    )
    assert first + rest == whole
    with pytest.raises(ValueError, match="needs counter"):
        LRScheduleCallback(token_indexed(schedule=linear()))


def test_two_schedules_for_one_lr_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="Two schedules want to set the LR"):
        train(tmp_path, linear(), extra=[LRScheduleCallback(cosine())])


def test_config_and_callback_are_refused_together(tmp_path):
    from hf_effi.trainers.trainer import EffiTrainer, EffiTrainingArguments

    args = EffiTrainingArguments(
        str(tmp_path), max_steps=2, lr_schedule="wsd", use_cpu=True, bf16=False, save_strategy="no", report_to="none"
    )
    trainer = make_trainer(tmp_path, [LRScheduleCallback(linear())], trainer_class=EffiTrainer, args=args)
    with pytest.raises(RefusedError, match="lr_schedule in the config"):
        trainer.train()
