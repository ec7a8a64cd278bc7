"""
AutoLRS beside what keeps a state: probes are undone, so nobody else may have seen them. All by what `train()` leaves.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_effi import (
    EffiTrainer,
    EffiTrainingArguments,
    HubCallback,
    LRScheduleCallback,
    RunRecordCallback,
    TrainDoctor,
    WeightAveragingCallback,
    read_run,
)
from hf_effi.callbacks import AdaLoRACallback, AutoLRSCallback, HypergradientCallback, RandomLTDCallback, auto_lrs
from hf_effi.callbacks.probing import trained_steps
from hf_effi.callbacks.reptile import ReptileCallback
from hf_effi.checkpoint import average_checkpoints
from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.schedules.planner_loss import curve_from_trainer_state
from hf_effi.report.run_data import load_run
from hf_effi.samplers import MeasuringSampler
from hf_effi.schedules import branch_cooldown, constant, cosine
from hf_effi.trainers.mixins import SequenceLengthMixin
from hf_effi.trainers.mixins import hub as _hub_mixin
from hf_effi.trainers.mixins.batch_transform import BatchTransform, BatchTransformMixin
from tests.helpers.callback_cases import adalora_model, flat, plain_model, rows, without_network

PROBES = [update for first in (1, 9, 17) for update in range(first, first + 4)]
TRAINING = [update for update in range(1, 31) if update not in PROBES]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def search(high=5.0, **over):
    """Probes of two updates each at 1-4, 9-12 and 17-20 of 30; LRs up to one that wrecks the model."""
    settings = {"stage_steps": 4, "probes": 2, "max_stage_steps": 4, "validation": False, **over}
    return AutoLRSCallback(1e-3, high, **settings)


def make(folder, *callbacks, cls=Trainer, args_cls=TrainingArguments, model=None, **over):
    settings = {
        "output_dir": str(folder),
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    names = ("sequence_length", "batch_transform", "train_sampler", "optimizers")
    extra = {name: over.pop(name) for name in names if name in over}
    data = over.pop("train_dataset", None) or rows()
    args = args_cls(**{**settings, **over})
    model = model or plain_model()
    return cls(model, args, train_dataset=data, eval_dataset=rows(4), callbacks=list(callbacks), **extra)


def run(folder, *callbacks, resume=None, **over):
    trainer = make(folder, *callbacks, **over)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Weights(TrainerCallback):
    """Keeps the weights after every update, and before and after what callbacks do at its end."""

    def __init__(self):
        self.after = {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.after[state.global_step] = flat(kwargs["model"])

    def on_epoch_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = flat(kwargs["model"])


class Moment(TrainerCallback):
    """The weights at `on_step_end`, where it stands in the list."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.at[state.global_step] = flat(kwargs["model"])


class StopAt(TrainerCallback):
    def __init__(self, step, save=True):
        self.step, self.save = step, save

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save, control.should_training_stop = self.save, True


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_reptile_steps_from_weights_of_training_alone(tmp_path, first):
    """Every third update of training goes half the way back to where the last Reptile step ended."""
    before, weights, pair = Moment(), Weights(), [search(), ReptileCallback(3, 0.5)]
    run(tmp_path, before, *(pair if first else pair[::-1]), weights)
    reference = flat(plain_model())
    steps = TRAINING[2::3]
    assert steps == [7, 14, 21, 24, 27, 30]
    for step in TRAINING:
        expected = before.at[step]
        if step in steps:
            expected = reference + 0.5 * (expected - reference)
            reference = expected
        torch.testing.assert_close(weights.after[step], expected, rtol=0, atol=1e-6)
    for first in (1, 9, 17):
        assert torch.equal(weights.after[first + 3], weights.after[first - 1])


@pytest.mark.parametrize("first", [True, False])
def test_an_average_is_of_weights_of_training(tmp_path, first):
    """Of the last six updates of training, four apart: 18 would be one of them, and is a probe."""
    weights = Weights()
    pair = [search(), WeightAveragingCallback(4, every_steps=4, kind="uniform")]
    trainer = run(tmp_path, *(pair if first else pair[::-1]), weights)
    steps = json.loads((tmp_path / "averaged" / "average.json").read_text())["steps"]
    assert steps == TRAINING[-13::4] == [14, 22, 26, 30]
    expected = sum(weights.after[step].double() for step in steps) / 4
    saved = load_file(tmp_path / "averaged" / "model.safetensors")
    found = torch.cat([saved[name].flatten() for name, _ in trainer.model.named_parameters()])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_the_average_sees_what_reptile_did_at_the_same_update(tmp_path):
    found = []
    for order in (1, -1):
        pair = [ReptileCallback(3, 0.5), WeightAveragingCallback(1, swap_in=True)][::order]
        found.append((weights := Weights(), flat(run(tmp_path, *pair, weights).model))[1])
        assert torch.equal(found[-1], weights.after[30])
    assert torch.equal(*found)


@pytest.mark.parametrize("swap_in", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_a_run_that_stops_inside_of_a_probe_ends_with_the_weights_of_training(tmp_path, swap_in, order):
    weights, average = Weights(), WeightAveragingCallback(2, every_steps=16, swap_in=swap_in, kind="uniform")
    trainer = run(tmp_path, *[search(), average][::order], weights, StopAt(17))
    # Update 17 is the first of a probe; training ended with 16. The window began with update 6: 18 - 16 of training.
    assert not torch.equal(weights.after[17], weights.after[16])
    assert torch.equal(flat(trainer.model), weights.after[6] if swap_in else weights.after[16])


def test_adalora_counts_updates_of_training(tmp_path):
    class Ranks(TrainerCallback):
        def __init__(self, adalora):
            self.adalora, self.seen = adalora, {}

        def on_step_end(self, args, state, control, **kwargs):
            self.seen[state.global_step] = sum(self.adalora.ranks().values())

    alone = AdaLoRACallback(set_total_step=True)
    plain, beside = Ranks(alone), Ranks(AdaLoRACallback(set_total_step=True))
    run(tmp_path, alone, plain, model=adalora_model(), max_steps=18)
    run(tmp_path, beside.adalora, search(), beside, model=adalora_model())
    # The same budget after the same number of updates of training: 9 ranks at first, 3 at the end.
    assert [beside.seen[update] for update in TRAINING] == [plain.seen[update] for update in range(1, 19)]
    assert plain.seen[1] == 9 and plain.seen[18] == 3
    with pytest.raises(ValueError, match="total_step=30 and the run has 18 updates of training"):
        run(tmp_path, AdaLoRACallback(), search(), model=adalora_model())


# --- data and counters that depend on the step -----------------------------------------------------------------------


def expected_progress():
    """(finished updates of training, all of them) for each of the 30 updates."""
    return [(sum(one < update for one in TRAINING), 18) for update in range(1, 31)]


@pytest.mark.parametrize("order", [1, -1])
def test_dropped_tokens_follow_updates_of_training(tmp_path, order):
    dropping, kept = RandomLTDCallback(2, 8, multiple=1), {}

    class Kept(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            kept[state.global_step + 1] = dropping.dropping.kept or 8

    trainer = run(tmp_path, *[search(), dropping][::order], Kept())
    # ceil(0.7 * 18) = 13 updates from 2 to 8 tokens.
    from hf_effi.functional.random_ltd import kept_tokens

    assert [kept[u] for u in range(1, 31)] == [kept_tokens(done, 13, 2, 8, 1) for done, _ in expected_progress()]
    # Two rows of 8 tokens: two whole layers, and one of what is kept, in the updates of training.
    expected = sum(2 * (2 * 8 + kept[update]) for update in TRAINING)
    stored = trainer.state.stateful_callbacks["hf_effi.random_ltd"]
    assert stored == {"layer_tokens": expected, "full_layer_tokens": 18 * 2 * 3 * 8}


def test_lengths_and_transforms_follow_updates_of_training(tmp_path):
    class Both(SequenceLengthMixin, BatchTransformMixin, Trainer):
        pass

    lengths, transforms = [], []

    def length(step, total):
        lengths.append((step, total))
        return 8

    class Note(BatchTransform):
        def __call__(self, batch, step, total_steps, generator):
            transforms.append((step, total_steps, int(torch.randint(1 << 30, (), generator=generator))))
            return batch

    run(tmp_path, search(), cls=Both, sequence_length=length, batch_transform=Note())
    assert lengths == expected_progress()
    assert [found[:2] for found in transforms] == expected_progress()
    assert len({drawn for _, _, drawn in transforms}) == 30, "chance is still another one in each update"


def test_a_sampler_that_measures_looks_at_the_weights_of_training(tmp_path):
    """Epochs of 3 updates: the second one begins after update 3, in the middle of a probe."""
    seen = []

    class Measuring(MeasuringSampler):
        def rows_to_measure(self, epoch):
            return list(range(6))

        def choose(self, epoch, chosen, values):
            return torch.arange(6)

    def measure(model, numbers):
        seen.append(flat(model))
        return [0.0] * len(numbers)

    class Sampled(EffiTrainer):
        pass

    weights = Weights()
    sampler = Measuring(6, measure)
    run(
        tmp_path,
        search(),
        weights,
        cls=Sampled,
        args_cls=EffiTrainingArguments,
        train_sampler=sampler,
        train_dataset=rows(6),
        run_record=False,
    )
    assert len(seen) == 10
    for epoch, found in enumerate(seen):
        update = 3 * epoch
        undone = max(one for one in range(update + 1) if one == 0 or one in TRAINING)
        assert torch.equal(found, weights.after[undone]), f"epoch {epoch}"
    assert not torch.equal(weights.after[3], weights.after[0]), "update 3 was inside of a probe"


# --- logs, evaluations, checkpoints ----------------------------------------------------------------------------------


def test_no_log_entry_mixes_probes_and_training(tmp_path):
    trainer = run(tmp_path, search(), logging_steps=5)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [4, 5, 8, 10, 12, 15, 16, 20, 25, 30]
    assert [entry["step"] for entry in entries if "effi/probe" in entry] == [4, 10, 12, 20]
    assert not [e for e in run(tmp_path, search(), logging_strategy="no").state.log_history if "loss" in e]


def test_curves_and_records_are_of_training(tmp_path):
    trainer = run(tmp_path, search(), RunRecordCallback(), logging_steps=1, save_strategy="steps", save_steps=30)
    record = read_run(tmp_path)
    assert [entry["step"] for entry in record["log_history"] if "loss" in entry] == TRAINING
    marked = [event["step"] for event in record["events"] if "effi/probe" in event.get("values", {})]
    assert marked == PROBES, "probes are in the record, and marked"
    assert record["totals"]["probe_updates"] == 12 and record["totals"]["updates"] == 30
    (tmp_path / "effi" / "effi_run.json").unlink()
    assert [entry["step"] for entry in load_run(tmp_path)["log_history"] if "loss" in entry] == TRAINING
    curve = curve_from_trainer_state(tmp_path / "checkpoint-30")
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert curve.steps == tuple(range(1, 19)) and curve.losses == tuple(losses[update] for update in TRAINING)


def test_doctors_do_not_judge_probes(tmp_path, monkeypatch):
    """Every other probe gives NaN."""
    monkeypatch.setattr(auto_lrs, "propose_lr", lambda tried, *args: 1e-3 if tried else 1e30)
    doctor = TrainDoctor(say=lambda sentence: None)
    trainer = run(tmp_path, doctor, search(), logging_steps=1)
    broken = [entry["step"] for entry in trainer.state.log_history if not math.isfinite(entry.get("grad_norm", 0.0))]
    assert broken == [2, 10, 18]
    assert doctor.findings == []


def test_a_multiplier_on_a_constant_schedule_is_no_finding(tmp_path):
    doctor = TrainDoctor(say=lambda sentence: None)
    trainer = run(tmp_path, HypergradientCallback(kappa=0.2), doctor, logging_steps=1)
    lrs = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(lrs)) > 10 and doctor.findings == []


def test_a_resumed_search_is_no_restarted_optimizer(tmp_path):
    run(tmp_path, search(), StopAt(19), save_strategy="steps")
    doctor = TrainDoctor(say=lambda sentence: None)
    run(tmp_path, doctor, search(), resume=str(tmp_path / "checkpoint-19"))
    assert doctor.findings == []


def test_evaluations_leave_probes_out_and_early_stopping_waits(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    trainer = run(tmp_path, search(high=1e-2), EarlyStoppingCallback(1000), **settings)
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [update for update in TRAINING if update % 2 == 0]
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) in evaluated


def test_checkpoints_wait_for_the_end_of_a_probe(tmp_path):
    """Those that fall due at 3, 9 and 18 would hold a probe, or be inside of one."""
    weights = Weights()
    run(tmp_path, search(), weights, save_strategy="steps", save_steps=3)
    saved = sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == [4, 6, 10, 12, 15, 18, 21, 24, 27, 30]
    for step in saved:
        stored = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        undone = max([0, *(one for one in TRAINING if one <= step)])
        found = torch.cat([stored[name].flatten() for name, _ in plain_model().named_parameters()])
        assert torch.equal(found, weights.after[undone]), step


def test_what_reads_checkpoints_leaves_those_inside_of_a_probe_out(tmp_path):
    run(tmp_path, search(), save_strategy="steps", save_steps=6)
    run(tmp_path, search(), StopAt(19), resume=str(tmp_path / "checkpoint-18"), save_strategy="steps", save_steps=6)
    assert (tmp_path / "checkpoint-19").is_dir()
    for later in (24, 30):
        (tmp_path / f"checkpoint-{later}").rename(tmp_path / f"later-{later}")
    assert average_checkpoints(tmp_path, tmp_path / "made", 2) == [12, 18]
    with pytest.raises(RefusedError, match="holds the weights of a probe"):
        branch_cooldown(tmp_path / "checkpoint-19", 4, tmp_path / "branch", schedule=constant())


def test_weights_of_a_probe_are_not_uploaded(tmp_path, monkeypatch):
    """Update 19 is the first of a probe's two, and somebody asks for a checkpoint there."""
    without_network(monkeypatch)
    stock = make(tmp_path / "stock", search(), StopAt(19), save_strategy="steps", save_steps=9)
    stock.create_model_card = lambda *args, **kwargs: None
    hub = HubCallback(stock, "me/run")
    stock.add_callback(hub)
    stock.train()
    assert (tmp_path / "stock" / "checkpoint-19").is_dir()
    # The one that was due at 9 is written at 10, the end of that probe.
    assert hub.uploader.pushed == [
        "Training in progress, checkpoint-10",
        "Training in progress, checkpoint-18",
        "End of training, checkpoint-18",
    ]

    pushed = []

    class Pushing(EffiTrainer):
        hub_model_id = "me/run"

        def init_hf_repo(self, *args, **kwargs):
            self.hub_model_id = "me/run"

        def create_model_card(self, *args, **kwargs):
            pass

    monkeypatch.setattr(_hub_mixin, "push_checkpoint", lambda uploader, folder, path, *rest: pushed.append(path))
    settings = {"save_strategy": "steps", "save_steps": 9, "push_to_hub": True, "run_record": False}
    run(tmp_path / "effi", search(), StopAt(19), cls=Pushing, args_cls=EffiTrainingArguments, **settings)
    assert [path.rpartition("-")[2] for path in pushed] == ["10", "18"]


# --- the search itself -----------------------------------------------------------------------------------------------


def test_a_second_training_begins_anew(tmp_path):
    callback = search()
    trainer = make(tmp_path, callback)
    trainer.train()
    first = callback.progress
    trainer.model.load_state_dict(plain_model().state_dict())
    trainer.optimizer = None
    trainer.train()
    assert callback.progress is not first and len(callback.progress["history"]) == 3
    assert callback.progress["useful_steps"] == 18


def test_an_error_inside_of_a_probe_leaves_nothing_to_the_next_training(tmp_path):
    class Explode(TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 3:
                raise RuntimeError("node lost")

    callback, explode, reptile, weights = search(), Explode(), ReptileCallback(3, 0.5), Weights()
    trainer = make(tmp_path, callback, reptile, explode, weights)
    with pytest.raises(RuntimeError, match="node lost"):
        trainer.train()
    explode.armed, model = False, plain_model()
    trainer.model.load_state_dict(model.state_dict())
    trainer.optimizer = None
    set_seed(3)  # as the Trainer does when it is built
    trainer.train()
    fresh = Weights()
    run(tmp_path / "fresh", search(), ReptileCallback(3, 0.5), fresh)
    assert [s for s in range(31) if not torch.equal(weights.after[s], fresh.after[s])] == []
    assert len(trainer.model._forward_hooks) == 0
    # Another trainer of this process, without a search, counts all of its updates.
    other = Weights()
    run(tmp_path / "other", ReptileCallback(3, 0.0625), other, max_steps=3)
    moved = (other.after[3] - other.after[0]).norm() / (other.after[2] - other.after[0]).norm()
    assert moved < 0.2


def test_after_running_out_of_memory_the_probe_is_undone(tmp_path):
    """`auto_find_batch_size` begins again with the weights that the model has."""

    class OutOfMemory(TrainerCallback):
        def __init__(self):
            self.batch_sizes, self.begun = [], []

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                self.begun.append(flat(kwargs["model"]))

        def on_step_end(self, args, state, control, **kwargs):
            self.batch_sizes.append(state.train_batch_size)
            if len(self.batch_sizes) == 3:
                raise RuntimeError("CUDA out of memory.")

    spy = OutOfMemory()
    run(tmp_path, search(), spy, auto_find_batch_size=True)
    assert spy.batch_sizes[2] > spy.batch_sizes[3]
    assert torch.equal(spy.begun[0], spy.begun[1])


def _scheduler(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", ["callback", "config", "optimizers"])
def test_a_schedule_beside_the_search_is_refused_by_name(tmp_path, case, order):
    model, callbacks, over = plain_model(), [search()], {}
    if case == "callback":
        callbacks.append(LRScheduleCallback(cosine()))
    elif case == "config":
        over = {"cls": EffiTrainer, "args_cls": EffiTrainingArguments, "lr_schedule": "cosine", "run_record": False}
    else:
        over = {"optimizers": _scheduler(model)}
    words = "the scheduler in `optimizers` moves it" if case == "optimizers" else "Two schedules want to set the LR"
    with pytest.raises(RefusedError, match=words):
        run(tmp_path, *callbacks[::order], model=model, **over)


def test_a_search_that_was_left_is_not_taken_up_again(tmp_path):
    """Without the search the updates after 14 are training, also those that it had planned to undo."""
    run(tmp_path, search(), StopAt(14), save_strategy="steps")
    trained = {}

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trained[state.global_step] = trained_steps(state)

    run(tmp_path, Count(), StopAt(19), resume=str(tmp_path / "checkpoint-14"), save_strategy="steps")
    assert trained == {step: step - 8 for step in range(15, 20)}
    with pytest.raises(MismatchError, match="step 19 was trained without AutoLRSCallback since update 14"):
        run(tmp_path, search(), resume=str(tmp_path / "checkpoint-19"))


def test_a_log_that_would_stay_nan_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="logging_nan_inf_filter=False"):
        run(tmp_path, search(), logging_nan_inf_filter=False)
