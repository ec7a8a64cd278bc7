"""
`LRScheduleCallback` and `lr_schedule=` are one method: the same LRs, the same state, the same refusals, on any chain.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyScheduler

from hf_effi import EffiTrainer, EffiTrainingArguments, LRScheduleCallback
from hf_effi.callbacks.lr_schedule import STATE_KEY, taken_over
from hf_effi.checkpoint.log_window import KEY as LOG_WINDOW
from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.schedules import linear, make_schedule, wsd
from hf_effi.schedules import branch_cooldown
from tests.training.lr_schedule_run import Recorder, StopAt, make_trainer, rows
from tests.unit.test_schedule_followed import applied_multiplier, judge
from tests.unit.test_schedule_free import Moves

DOORS = ("callback", "config")
KINDS = {"floor": ("linear", {"floor": 0.2})}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Tiny(torch.nn.Module):
    """A model whose update costs nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(32, 2), torch.nn.Linear(2, 1)

    def forward(self, input_ids, labels=None):
        return {"loss": (self.head(self.table(input_ids)) - 1).square().mean()}


def build(door, out, kind="linear", mode="error", extra=(), base=Trainer, model=None, optimizers=None, **over):
    """Return a trainer of either door, which notes the LRs that it applied."""
    name, kwargs = KINDS.get(kind, (kind, {}))
    kwargs = {**kwargs, **over.pop("schedule", {})}
    settings = {
        "max_steps": 12,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
    }
    settings |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    settings |= {"logging_steps": 1, **over}
    recorder, model = Recorder(), model or Tiny()
    if door == "callback":
        callbacks = [LRScheduleCallback(make_schedule(name, **kwargs), mode)]
        args, cls = TrainingArguments(str(out), **settings), base
    else:
        callbacks, cls = [], EffiTrainer if base is Trainer else type("Effi", (EffiTrainer, base), {})
        config = {"lr_schedule": name, "lr_schedule_kwargs": kwargs, "lr_schedule_on_mismatch": mode}
        args = EffiTrainingArguments(str(out), **config, run_record=False, **settings)
    optimizers = optimizers(model) if optimizers else (None, None)
    trainer = cls(model, args, train_dataset=rows(), callbacks=[*callbacks, recorder, *extra], optimizers=optimizers)
    trainer.recorder = recorder
    trainer.schedule = trainer.lr_schedule if door == "config" else callbacks[0]
    return trainer


def go(door, out, until, resume=None, **options):
    """Train up to an update, and return the LRs of the first group or the error."""
    trainer = build(door, out, extra=[StopAt(until)], **options)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        return error
    assert [groups[0] for groups in trainer.recorder.applied] == trainer.recorder.logged
    return [groups[0] for groups in trainer.recorder.applied]


def stored(out, step):
    found = json.loads((Path(out) / f"checkpoint-{step}" / "trainer_state.json").read_text())["stateful_callbacks"]
    return {key: value for key, value in found.items() if key != LOG_WINDOW}  # of who saves, not of a schedule


def chain_of(seed):
    rng, chain, step = random.Random(seed), [], 0
    kind, total, lr = rng.choice(["constant", "linear", "cosine", "floor"]), 12, 0.01
    for _ in range(4):
        step += rng.randint(1, 3)
        chain.append((kind, total, lr, rng.choice(["error", "stored", "stored", "new", "new"]), step))
        kind = rng.choice([kind, kind, "constant", "linear", "cosine", "floor"])
        total, lr = rng.choice([total, total, 16]), rng.choice([lr, lr, 0.02, 0.005])
    return chain


@pytest.mark.filterwarnings("ignore::hf_effi.errors.PastEndWarning")
@pytest.mark.parametrize("seed", range(6))
def test_any_chain_of_resumes_is_the_same_through_both_doors_and_through_both_in_turn(tmp_path, seed):
    applied, step = None, 0
    for index, (kind, total, lr, mode, until) in enumerate(chain_of(seed)):
        now = judge(applied, (kind, total, lr), mode, step)
        options = {"kind": kind, "max_steps": total, "learning_rate": lr, "mode": mode}
        found = {}
        for door in (*DOORS, "in turn"):
            resume = str(tmp_path / door / f"checkpoint-{step}") if step else None
            through = DOORS[index % 2] if door == "in turn" else door
            found[door] = go(through, tmp_path / door, until, resume, **options)
        if now is None:
            assert len({str(error) for error in found.values()}) == 1, found
            assert all(isinstance(error, MismatchError) for error in found.values()), found
            continue
        applied = now
        expected = [applied[2] * applied_multiplier(*applied[:2], t) for t in range(step, until)]
        assert found["callback"] == pytest.approx(expected, rel=1e-12)
        assert found["callback"] == found["config"] == found["in turn"]
        entries = [stored(tmp_path / door, until) for door in found]
        assert entries[0] == entries[1] == entries[2] and entries[0][STATE_KEY]["learning_rate"] == applied[2]
        step = until


@pytest.mark.parametrize("door", DOORS)
def test_state_records_what_was_applied(tmp_path, door):
    """5e-4 was asked for and 1e-3 applied: 'new' at 1e-3 is 1e-3, not twice that."""
    assert go(door, tmp_path, 3, kind="constant", learning_rate=1e-3) == [1e-3] * 3
    again = {"kind": "constant", "resume": True}
    assert go(door, tmp_path, 6, mode="stored", learning_rate=5e-4, **again) == [1e-3] * 3
    assert "learning_rate=0.001, this run has 0.0005" in str(go(door, tmp_path, 9, learning_rate=5e-4, **again))
    assert go(door, tmp_path, 9, mode="new", learning_rate=1e-3, **again) == [1e-3] * 3
    assert go(door, tmp_path, 12, mode="error", learning_rate=1e-3, **again) == [1e-3] * 3


@pytest.mark.parametrize("door", DOORS)
def test_a_longer_run_with_the_stored_schedule_is_refused_and_not_trained_at_zero(tmp_path, door):
    go(door, tmp_path, 6, max_steps=8)
    refusal = go(door, tmp_path, 18, max_steps=18, mode="stored", resume=True)
    assert "ends at update 8 with an LR of 0, and the run has 18: 10 updates would change nothing" in str(refusal)


def two_groups(model, lr=1e-2, head=1e-3):
    groups = [{"params": list(model.table.parameters())}, {"params": list(model.head.parameters()), "lr": head}]
    return torch.optim.AdamW(groups, lr=lr), None


class OwnGroups(Trainer):
    """Builds its groups itself, the head with a tenth of the LR."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            lr = self.args.learning_rate
            self.optimizer = two_groups(self.model, lr, lr / 10)[0]
        return self.optimizer


def groups_of(door, out, until, **options):
    resume = out.exists() or None  # before the Trainer makes the folder
    trainer = build(door, out, extra=[StopAt(until)], **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.recorder.applied, trainer


@pytest.mark.parametrize("door", DOORS)
def test_groups_of_the_trainer_keep_their_ratio(tmp_path, door):
    def lrs(lr, steps):
        return [pytest.approx([lr * (1 - t / 12), lr / 10 * (1 - t / 12)], rel=1e-12) for t in steps]

    assert groups_of(door, tmp_path / "a", 3, base=OwnGroups)[0] == lrs(1e-2, range(3))
    stays = {"base": OwnGroups, "learning_rate": 4e-3}
    assert groups_of(door, tmp_path / "a", 5, mode="stored", **stays)[0] == lrs(1e-2, range(3, 5))
    assert groups_of(door, tmp_path / "a", 7, mode="new", **stays)[0] == lrs(4e-3, range(5, 7))
    assert groups_of(door, tmp_path / "a", 9, mode="error", **stays)[0] == lrs(4e-3, range(7, 9))


@pytest.mark.parametrize("door", DOORS)
def test_an_optimizer_that_is_passed_says_its_lrs_itself(tmp_path, door):
    def lrs(*bases, steps):
        return [pytest.approx([lr * (1 - t / 12) for lr in bases], rel=1e-12) for t in steps]

    def run(until, mode, *bases, **options):
        return groups_of(
            door, tmp_path / "a", until, mode=mode, optimizers=lambda m: two_groups(m, *bases), **options
        )[0]

    assert run(3, "error", 1e-2, 1e-3) == lrs(1e-2, 1e-3, steps=range(3))
    with pytest.raises(MismatchError, match=r"LRs \[0.01, 0.001\], this one has \[0.01, 0.002\]"):
        run(5, "error", 1e-2, 2e-3)
    assert run(5, "stored", 1e-2, 2e-3) == lrs(1e-2, 1e-3, steps=range(3, 5))
    assert run(7, "new", 5e-3, 2e-3) == lrs(5e-3, 2e-3, steps=range(5, 7))
    assert run(9, "error", 5e-3, 2e-3) == lrs(5e-3, 2e-3, steps=range(7, 9))
    # learning_rate alone: in proportion.
    assert run(11, "new", 5e-3, 2e-3, learning_rate=5e-3) == lrs(2.5e-3, 1e-3, steps=range(9, 11))
    assert run(12, "error", 5e-3, 2e-3, learning_rate=5e-3) == lrs(2.5e-3, 1e-3, steps=range(11, 12))


@pytest.mark.parametrize("door", DOORS)
def test_one_trainer_that_trains_again(tmp_path, door):
    """From the start, from a checkpoint of another LR, and from the start: each time the LRs that are asked for."""
    go(door, tmp_path / "old", 4, learning_rate=2e-2)
    trainer = build(door, tmp_path / "new", mode="stored")
    fresh, resumed = [1e-2 * (1 - t / 12) for t in range(12)], [2e-2 * (1 - t / 12) for t in range(4, 12)]
    for expected, checkpoint in ((fresh, None), (resumed, str(tmp_path / "old" / "checkpoint-4")), (fresh, None)):
        trainer.recorder.applied.clear()
        trainer.train(resume_from_checkpoint=checkpoint)
        assert [lrs[0] for lrs in trainer.recorder.applied] == pytest.approx(expected, rel=1e-12)
    trainer.args.learning_rate = 3e-2  # which the stock Trainer ignores from its second call on
    trainer.recorder.applied.clear()
    trainer.train()
    assert [lrs[0] for lrs in trainer.recorder.applied] == pytest.approx([3 * lr for lr in fresh], rel=1e-12)


def as_earlier_versions_wrote(door, folder, rate):
    """Turn a checkpoint into that of an earlier version; `rate` is the learning rate that it would have stored."""
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text())
    entry = state["stateful_callbacks"].pop(STATE_KEY)
    if door == "callback":
        kept = {name: entry[name] for name in ("built", "current", "decay_asked_at", "counter")}
        state["stateful_callbacks"][STATE_KEY] = {**kept, "learning_rate": rate}
    else:
        known = torch.load(folder / "scheduler.pt", weights_only=True)
        known = {name: known[name] for name in ("base_lrs", "last_epoch", "_step_count", "_last_lr")}
        torch.save({**known, "built": entry["built"], "schedule": entry["current"]}, folder / "scheduler.pt")
    file.write_text(json.dumps(state))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mode", ["error", "stored", "new"])
def test_checkpoints_of_earlier_versions(tmp_path, door, mode):
    """They stored the learning rate that was asked for (5e-3); 1e-2 is what they had applied."""
    go(door, tmp_path, 4)
    as_earlier_versions_wrote(door, tmp_path / "checkpoint-4", 5e-3)
    refusal = go(door, tmp_path, 8, resume=str(tmp_path / "checkpoint-4"), max_steps=20)
    assert "total_steps: 12 -> 20" in str(refusal)
    assert go(door, tmp_path, 6, resume=True) == [1e-2 * (1 - t / 12) for t in range(4, 6)]
    as_earlier_versions_wrote(door, tmp_path / "checkpoint-6", 5e-3)
    found = go(door, tmp_path, 8, resume=True, mode=mode, learning_rate=4e-3)
    if mode == "error":
        assert "learning_rate=0.01, this run has 0.004" in str(found)
    else:
        lr = {"stored": 1e-2, "new": 4e-3}[mode]
        assert found == pytest.approx([lr * (1 - t / 12) for t in range(6, 8)], rel=1e-12)


@pytest.mark.parametrize("door", DOORS)
def test_a_checkpoint_that_another_schedule_has_trained(tmp_path, door):
    """None at all, and one whose entry was only carried along."""
    stock = make_trainer(tmp_path / "stock", [StopAt(4)], model=Tiny())
    stock.train()
    assert "trained without LRScheduleCallback or lr_schedule, so" in str(go(door, tmp_path / "stock", 6, resume=True))
    assert go(door, tmp_path / "stock", 6, resume=True, mode="new", kind="constant") == [1e-2] * 2
    go(door, tmp_path / "part", 4)
    carried = make_trainer(tmp_path / "part", [StopAt(6)], model=Tiny())
    carried.train(resume_from_checkpoint=True)
    refusal = go(door, tmp_path / "part", 8, resume=True)
    assert "trained without LRScheduleCallback or lr_schedule since update 4" in str(refusal)
    with pytest.raises(ValueError, match="without LRScheduleCallback or lr_schedule"):
        branch_cooldown(tmp_path / "part" / "checkpoint-6", 2, tmp_path / "branch")


@pytest.mark.parametrize("door", DOORS)
def test_a_checkpoint_of_weights_alone_keeps_its_place(tmp_path, door):
    first = build(door, tmp_path, extra=[StopAt(5)], save_only_model=True)
    first.train()
    assert go(door, tmp_path, 8, resume=True) == [1e-2 * (1 - t / 12) for t in range(5, 8)]


@pytest.mark.parametrize("door", DOORS)
def test_start_decay_and_a_branch(tmp_path, door):
    class Decay(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.schedule.start_decay(3, shape="linear")

    plateau = {"kind": "wsd", "schedule": {"warmup_steps": 2, "open_ended": True}}
    trainer = build(door, tmp_path / "a", extra=[Decay()], **plateau)
    trainer.train()
    expected = wsd(warmup_steps=2).start_decay(at=4, decay_steps=3, shape="linear")
    assert [lrs[0] for lrs in trainer.recorder.applied] == [1e-2 * expected(t) for t in range(7)]
    assert trainer.state.global_step == 7, "training ends with the decay"
    go(door, tmp_path / "b", 4, **plateau)
    branch = branch_cooldown(tmp_path / "b" / "checkpoint-4", 3, tmp_path / "branch", shape="linear")
    recorder = Recorder()
    end = make_trainer(branch.output_dir, [branch.callback(), recorder], model=Tiny(), max_steps=branch.total_steps)
    end.train(resume_from_checkpoint=branch.checkpoint)
    assert [lrs[0] for lrs in recorder.applied] == [1e-2 * expected(t) for t in range(4, 7)]


@pytest.mark.parametrize("door", DOORS)
def test_the_same_refusals(tmp_path, door):
    def refuse(words, **options):
        with pytest.raises(ValueError, match=words):
            build(door, tmp_path, **options).train()

    refuse("lr_scheduler_type='cosine'", lr_scheduler_type="cosine")
    refuse("warmup_steps=2", warmup_steps=2)
    refuse("total_steps=9, but the run has 12", schedule={"total_steps": 9})
    refuse("Moves averages its iterates", optimizers=lambda m: (Moves(m.parameters(), lr=1.0), None))
    refuse("optimizer LR of 0.02, but the optimizer has 0.01", kind="power", schedule={"tokens_per_step": 2**22})

    class LayerWise(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            one = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
            self.lr_scheduler = LayerWiseDummyScheduler(optimizer_dict={0: one}, lr=1e-2)
            return self.lr_scheduler

    refuse("layer-wise optimizer steps its own", base=LayerWise)


def test_both_doors_have_the_weights_of_each_other_to_the_bit(tmp_path):
    weights = []
    for door in DOORS:
        trainer = build(door, tmp_path / door, kind="cosine")
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_the_config_can_change_between_two_calls(tmp_path):
    """As a search over hyperparameters changes it."""
    trainer = build("config", tmp_path, kind="linear")
    trainer.train()
    trainer.args.lr_schedule, trainer.args.lr_schedule_kwargs = "constant", None
    trainer.recorder.applied.clear()
    trainer.train()
    assert [lrs[0] for lrs in trainer.recorder.applied] == pytest.approx([1e-2] * 12)
    trainer.args.lr_schedule = None
    trainer.recorder.applied.clear()
    trainer.train()
    assert trainer.recorder.applied[-1][0] == pytest.approx(1e-2 / 12), "the Trainer's own linear"
    assert trainer.lr_schedule is None


def test_a_scheduler_that_deepspeed_only_steps_is_taken_over_and_its_own_is_not():
    from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    inner = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert taken_over(DeepSpeedSchedulerWrapper(inner, optimizer)) is inner
    own = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(RefusedError, match="DeepSpeed owns the LR scheduler"):
        taken_over(DeepSpeedSchedulerWrapper(own, optimizer))


def test_a_schedule_of_ones_own_trains_and_resumes(tmp_path):
    from tests.unit.test_schedule_followed import Steps
    from tests.unit.test_schedule_followed import cosine as own_cosine

    for name, schedule, expected in (
        ("steps", Steps(edges=(2, 5)), [1e-2 * 0.5 ** (t >= 2) * 0.5 ** (t >= 5) for t in range(8)]),
        ("cosine", own_cosine(), [2.5e-3] * 8),
    ):
        lrs = []
        for until, resume in ((4, None), (8, True)):
            recorder = Recorder()
            callbacks = [LRScheduleCallback(schedule), recorder, StopAt(until)]
            make_trainer(tmp_path / name, callbacks, model=Tiny()).train(resume_from_checkpoint=resume)
            lrs += [groups[0] for groups in recorder.applied]
        assert lrs == expected
    refusal = go("config", tmp_path / "cosine", 12, kind="cosine", resume=True)
    assert "test_schedule_followed:cosine -> cosine" in str(refusal)
    assert linear(12).spec()["kind"] == "linear"


@pytest.mark.parametrize("door", DOORS)
def test_under_deepspeed_the_trainers_scheduler_is_followed_inside_the_wrapper(tmp_path, door):
    """DeepSpeed has a shallow copy of the trainer make the scheduler, wraps it, steps it and stores it itself."""
    import copy

    from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
    from transformers import TrainerState

    def engine(resumed=None, mode="error", lr=1e-2):
        trainer = build(door, tmp_path, mode=mode, learning_rate=lr)
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=lr)
        twin = copy.copy(trainer)
        inner = twin.create_scheduler(12, optimizer)
        if resumed is not None:
            optimizer.load_state_dict(resumed["optimizer"])
            inner.load_state_dict(resumed["scheduler"])
        wrapper, state = DeepSpeedSchedulerWrapper(inner, optimizer), TrainerState(max_steps=12)
        state.stateful_callbacks = {} if resumed is None else copy.deepcopy(resumed["entries"])
        state.global_step = start = 0 if resumed is None else 4
        parts = {"lr_scheduler": wrapper, "optimizer": optimizer, "model": trainer.model}
        trainer.schedule.on_train_begin(trainer.args, state, trainer.control, **parts)
        assert sum(isinstance(part, LRScheduleCallback) for part in trainer.callback_handler.callbacks) == 1
        lrs = []
        for _ in range(4):
            lrs.append(wrapper.get_last_lr()[0])
            assert lrs[-1] == optimizer.param_groups[0]["lr"]
            optimizer.step()
            inner.step()
            state.global_step += 1
            trainer.schedule.on_step_end(trainer.args, state, trainer.control, **parts)
        saved = {"optimizer": optimizer.state_dict(), "scheduler": inner.state_dict()}
        expected = [1 - t / 12 for t in range(start, start + 4)]
        return lrs, expected, {**saved, "entries": state.stateful_callbacks}

    lrs, expected, saved = engine()
    assert lrs == [1e-2 * m for m in expected]
    lrs, expected, _ = engine(saved)
    assert lrs == [1e-2 * m for m in expected]
    lrs, expected, _ = engine(saved, "new", 4e-3)
    assert lrs == pytest.approx([4e-3 * m for m in expected], rel=1e-12)
    with pytest.raises(MismatchError, match="learning_rate=0.01, this run has 0.004"):
        engine(saved, "error", 4e-3)
