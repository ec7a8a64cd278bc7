"""What a resumed run follows: the one decision behind callback, config field and `to_lambda_lr`."""

import dataclasses
import json
import math
import random
import sys
import types
from dataclasses import dataclass

import pytest
import torch

import hf_effi.functional.schedules as S
from hf_effi.errors import BrokenFileError, MismatchError
from hf_effi.functional.schedules import (
    Followed,
    Schedule,
    check_storable,
    classes_in,
    make_schedule,
    settle,
    to_lambda_lr,
)


def followed(schedule, *lrs, rate=None, own=None, steps=None, **more):
    return Followed(schedule, schedule, lrs, rate, own, steps or schedule.total_steps, **more)


# ---- settle, by hand ----


def test_without_a_difference_the_run_goes_on_as_stored():
    old = dataclasses.replace(followed(S.wsd(10, open_ended=True), 0.5, 0.1, rate=0.5), decay_asked_at=4)
    old = dataclasses.replace(old, current=old.built.start_decay(4, 2))
    for mode in ("error", "stored", "new"):
        assert settle(old, followed(S.wsd(10, open_ended=True), 0.5, 0.5, rate=0.5), mode, step=5) == old


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (followed(S.linear(20), 1.0, rate=1.0), "total_steps: 10 -> 20"),
        (followed(S.linear(10, floor=0.1), 1.0, rate=1.0), "floor: 0.0 -> 0.1"),
        (followed(S.cosine(10), 1.0, rate=1.0), "linear -> cosine"),
        (followed(S.linear(10), 1.0, rate=0.5), "learning_rate=1.0, this run has 0.5"),
        (followed(S.linear(10), 0.5, rate=1.0, own=(0.5,)), r"LRs \[1.0\], this one has \[0.5\]"),
        (followed(S.linear(10), 1.0, rate=1.0, steps=9), "10 updates, this run has 9"),
    ],
)
def test_error_names_each_difference(asked, words):
    with pytest.raises(MismatchError, match=words):
        settle(followed(S.linear(10), 1.0, rate=1.0), asked)


def test_error_names_all_differences_at_once():
    with pytest.raises(MismatchError, match="another schedule .*, and with learning_rate=1.0"):
        settle(followed(S.linear(10), 1.0, rate=1.0), followed(S.linear(20), 0.5, rate=0.5))


def test_stored_is_what_was_applied_and_new_what_is_asked():
    old = followed(S.constant(9), 1e-3, rate=1e-3)
    stored = settle(old, followed(S.constant(9), 5e-4, rate=5e-4), "stored", step=3)
    assert stored == old
    assert settle(stored, followed(S.constant(9), 1e-3, rate=1e-3), "new", step=6).base_lrs == (1e-3,)
    assert settle(stored, followed(S.constant(9), 1e-3, rate=1e-3), "error", step=6) == old
    with pytest.raises(MismatchError):
        settle(stored, followed(S.constant(9), 5e-4, rate=5e-4), "error", step=6)


def test_groups_keep_their_ratios_and_an_optimizer_that_is_passed_has_the_word():
    old = followed(S.constant(9), 1e-2, 1e-3, rate=1e-2)
    assert settle(old, followed(S.constant(9), 1e-2, 1e-2, rate=2e-2), "new").base_lrs == (2e-2, 2e-3)
    own = followed(S.constant(9), 1e-2, 1e-3, rate=5e-5, own=(1e-2, 1e-3))
    new = followed(S.constant(9), 2e-2, 5e-3, rate=5e-5, own=(2e-2, 5e-3))
    switched = settle(own, new, "new")
    assert switched.base_lrs == (2e-2, 5e-3) and switched.learning_rate == 5e-5
    assert settle(own, new, "stored").base_lrs == (1e-2, 1e-3)
    # The same optimizer with another learning_rate: in proportion, and not a difference the next time.
    scaled = settle(own, dataclasses.replace(own, learning_rate=1e-4), "new")
    assert scaled.base_lrs == (2e-2, 2e-3)
    assert settle(scaled, dataclasses.replace(own, learning_rate=1e-4), "error") == scaled
    with pytest.raises(MismatchError, match="2 parameter groups, the optimizer has 1"):
        settle(old, followed(S.constant(9), 1e-2, rate=1e-2), "new")


def test_stored_never_trains_at_zero_in_silence():
    asked = followed(S.linear(20), 1.0, rate=1.0)
    with pytest.raises(MismatchError, match=r"ends at update 10 with an LR of 0.* 10 updates.*extend_to"):
        settle(followed(S.linear(10), 1.0, rate=1.0), asked, "stored", step=5)
    for goes_on in (S.linear(10, floor=0.1), S.constant(10), S.wsd(10, open_ended=True)):
        assert settle(followed(goes_on, 1.0, rate=1.0), asked, "stored", step=5).current == goes_on
    shorter = followed(S.linear(8), 1.0, rate=1.0)
    assert settle(followed(S.linear(10), 1.0, rate=1.0), shorter, "stored", step=5).current == S.linear(10)


def test_new_does_not_lift_a_decaying_schedule_unless_allowed():
    old, new = followed(S.linear(10), 1.0, rate=1.0), followed(S.linear(20), 1.0, rate=1.0)
    with pytest.raises(MismatchError, match="would lift it"):
        settle(old, new, "new", step=5)
    assert settle(old, new, "new", step=5, allow_lr_jump=True).current == S.linear(20)
    # A learning rate is asked for with a number of its own: that is no accident.
    assert settle(old, followed(S.linear(10), 2.0, rate=2.0), "new", step=5).base_lrs == (2.0,)


def test_a_decay_that_was_started_survives_a_new_learning_rate_and_not_a_new_schedule():
    old = followed(S.wsd(20, open_ended=True), 1.0, rate=1.0)
    old = dataclasses.replace(old, current=old.built.start_decay(4, 2), decay_asked_at=4)
    kept = settle(old, followed(S.wsd(20, open_ended=True), 2.0, rate=2.0), "new", step=5)
    assert kept.current == old.current and kept.decay_asked_at == 4
    other = settle(old, followed(S.linear(20), 1.0, rate=1.0), "new", step=5, allow_lr_jump=True)
    assert other.current == S.linear(20) and other.decay_asked_at is None
    # It ends before the run, and the run with it: that was asked for.
    assert settle(old, followed(S.linear(30), 1.0, rate=1.0), "stored", step=5).current == old.current


def test_states_survive_json_and_those_of_earlier_versions_are_read():
    state = followed(S.cosine(10, floor=0.1), 1e-3, 3e-5, rate=1e-3, own=(1e-3, 3e-5))
    assert Followed.from_state(json.loads(json.dumps(state.state_dict()))) == state
    spec = S.cosine(10).spec()
    earlier = {"built": spec, "current": spec, "decay_asked_at": None, "learning_rate": 5e-4, "counter": None}
    read = Followed.from_state(earlier, base_lrs=[1e-3], learning_rate=1e-3, optimizer_lrs=None)
    assert read == followed(S.cosine(10), 1e-3, rate=1e-3)
    with pytest.raises(BrokenFileError, match="schema 7, this version reads 1"):
        Followed.from_state({**state.state_dict(), "schema": 7})


# ---- the same decision in a loop without a Trainer ----


def loop(schedule, lr, until, state=None, **options):
    """Return the LRs of both groups up to `until`, and the state."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": group * lr} for group in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=lr)
    scheduler, lrs = to_lambda_lr(schedule, optimizer, **options), []
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(json.loads(json.dumps(state["scheduler"])))
    while scheduler.last_epoch < until:
        lrs.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return lrs, {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


def test_a_loop_does_not_ignore_another_lr():
    _, state = loop(S.linear(10), 1.0, 4)
    with pytest.raises(MismatchError, match=r"LRs \[1.0, 0.1\], this one has \[0.5, 0.05\]"):
        loop(S.linear(10), 0.5, 6, state)
    assert loop(S.linear(10), 0.5, 6, state, on_mismatch="stored")[0] == [[0.6, 0.6 * 0.1], [0.5, 0.05]]
    lrs, state = loop(S.linear(10), 0.5, 6, state, on_mismatch="new")
    assert lrs == [[0.5 * 0.6, 0.05 * 0.6], [0.25, 0.025]]
    assert loop(S.linear(10), 0.5, 7, state)[0] == [[0.5 * 0.4, 0.05 * 0.4]]


def test_a_loop_reads_the_state_of_an_earlier_version_and_refuses_a_foreign_one():
    _, state = loop(S.wsd(10, decay_steps=2), 1.0, 4)
    spec = S.wsd(10, decay_steps=2).spec()
    names = ("base_lrs", "last_epoch", "_step_count", "_last_lr")
    earlier = {**{name: state["scheduler"][name] for name in names}, "built": spec, "schedule": spec}
    assert loop(S.wsd(10, decay_steps=2), 1.0, 6, {**state, "scheduler": earlier})[0] == [[1.0, 0.1]] * 2
    with pytest.raises(MismatchError, match="holds no schedule, only _last_lr.*written by another scheduler"):
        loop(S.linear(10), 1.0, 6, {**state, "scheduler": {name: earlier[name] for name in names}})


CURVES = {
    "constant": lambda t, total: 1.0,
    "linear": lambda t, total: 1 - t / total,
    "cosine": lambda t, total: (1 + math.cos(math.pi * t / total)) / 2,
    "floor": lambda t, total: 0.2 + 0.8 * (1 - t / total),
}
BUILD = {"constant": S.constant, "linear": S.linear, "cosine": S.cosine, "floor": lambda n: S.linear(n, floor=0.2)}


def applied_multiplier(name, total, t):
    return CURVES[name](min(t, total), total)


def judge(applied, asked, mode, step):
    """
    Return what a run follows by the words of the contract, or `None` where it refuses; runs are (curve, length, lr).
    """
    if applied is None or applied == asked:
        return asked
    if mode == "error":
        return None
    if mode == "stored":
        ends_at_zero = applied_multiplier(*applied[:2], applied[1]) <= 1e-12
        return None if asked[1] > applied[1] and ends_at_zero else applied
    if applied[:2] != asked[:2]:
        now, before = (applied_multiplier(*applied[:2], t) for t in (step, step - 1))
        if now < before and applied_multiplier(*asked[:2], step) > before * (1 + 1e-9):
            return None
    return asked


def random_chain(seed):
    """Return segments (curve, length, lr, mode, until) of a run that is stopped and resumed."""
    rng, chain, step = random.Random(seed), [], 0
    name, total, lr = rng.choice(list(CURVES)), 12, 0.01
    for _ in range(5):
        step += rng.randint(1, 2)
        chain.append((name, total, lr, rng.choice(["error", "stored", "stored", "new", "new"]), step))
        name = rng.choice([name, name, *CURVES])
        total, lr = rng.choice([total, total, 12, 16, 10]), rng.choice([lr, lr, 0.01, 0.02, 0.005])
    return chain


@pytest.mark.filterwarnings("ignore::hf_effi.errors.PastEndWarning")
def test_random_chains_of_resumes_follow_the_contract():
    refused = 0
    for seed in range(400):
        applied, state, step = None, None, 0
        for name, total, lr, mode, until in random_chain(seed):
            now = judge(applied, (name, total, lr), mode, step)
            if now is None:
                refused += 1
                with pytest.raises(MismatchError):
                    loop(BUILD[name](total), lr, until, state, on_mismatch=mode)
                continue
            applied = now
            lrs, state = loop(BUILD[name](total), lr, until, state, on_mismatch=mode)
            expected = [applied[2] * applied_multiplier(*applied[:2], t) for t in range(step, until)]
            assert [both[0] for both in lrs] == pytest.approx(expected, rel=1e-12), (seed, step)
            assert [both[1] for both in lrs] == pytest.approx([lr * 0.1 for lr in expected], rel=1e-12)
            step = until
    assert 300 < refused < 1200, "the chains must meet both"


# ---- classes of users ----


@dataclass(frozen=True)
class cosine(Schedule):
    """A user's class with the name of one of ours."""

    def _multiplier(self, t):
        return 0.25


@dataclass(frozen=True)
class Steps(Schedule):
    edges: tuple[int, ...] = (2,)

    def _multiplier(self, t):
        return 0.5 ** sum(t >= edge for edge in self.edges)


def test_every_built_in_is_in_the_table_and_nothing_else():
    from hf_effi.functional.schedules import _kinds, gallery

    found = {
        name
        for name in S.__all__
        if isinstance(getattr(S, name), type) and issubclass(getattr(S, name), Schedule) and name != "Schedule"
    }
    assert found == set(_kinds.BUILT_IN)
    for name in found:
        assert _kinds.built_in(name) is getattr(S, name) and _kinds.kind_of(getattr(S, name)) == name
    assert {schedule.spec()["kind"] for schedule in gallery(50)} <= found


def test_a_users_class_never_replaces_one_of_ours():
    assert S.cosine(10).spec()["kind"] == "cosine"
    assert type(Schedule.from_spec({"kind": "cosine", "params": {"total_steps": 10}})) is S.cosine
    assert type(make_schedule("cosine", total_steps=10)) is S.cosine
    assert type(Schedule.from_spec(S.join(10, schedules=(S.cosine(), S.linear()), boundaries=(5,)).spec())) is S.join
    spec = cosine(10).spec()
    assert spec["kind"] == f"{__name__}:cosine"
    assert type(Schedule.from_spec(json.loads(json.dumps(spec)))) is cosine
    assert not S.same_schedule(cosine(10), S.cosine(10))


def test_a_users_schedule_is_stored_by_its_path_also_inside_another():
    whole = S.join(10, schedules=(Steps(edges=(1, 3)), S.linear()), boundaries=(5,))
    again = Schedule.from_spec(json.loads(json.dumps(whole.spec())))
    assert again == whole and [again(t) for t in range(5)] == [1.0, 0.5, 0.5, 0.25, 0.25]
    assert classes_in(whole) == (S.join, Steps, S.linear)


def test_a_spec_imports_nothing():
    name = "hf_effi_no_such_module_of_a_card"
    with pytest.raises(ValueError, match="import its module before training"):
        Schedule.from_spec({"kind": f"{name}:Evil", "params": {}})
    with pytest.raises(ValueError, match="import its module"):
        Schedule.from_spec({"kind": "antigravity:Evil", "params": {}})
    assert "antigravity" not in sys.modules and name not in sys.modules


@pytest.mark.parametrize("kind", [f"{__name__}:Steps", "Steps"])
def test_a_config_or_card_names_only_ours(kind):
    for build in (
        lambda: make_schedule(kind),
        lambda: make_schedule("scale", schedule={"kind": kind, "params": {}}),
        lambda: make_schedule("join", schedules=[{"kind": kind, "params": {}}, {"kind": "linear", "params": {}}]),
    ):
        with pytest.raises(ValueError, match="is not a schedule. Known: constant.*goes as an object into LRSchedule"):
            build()


def twin(module, name="Twin", value=0.5):
    """Return a schedule class as another module of the user would define it."""
    made = types.new_class(name, (Schedule,), exec_body=lambda body: body.update(__module__=module))
    made._multiplier = lambda self, t: value
    made.__qualname__ = name
    return dataclass(frozen=True)(made)


def test_two_classes_of_one_name():
    one, other = twin("mine.a"), twin("mine.b", value=0.25)
    assert one(5).spec()["kind"] == "mine.a:Twin" and other(5).spec()["kind"] == "mine.b:Twin"
    assert type(Schedule.from_spec(one(5).spec())) is one and type(Schedule.from_spec(other(5).spec())) is other
    with pytest.raises(ValueError, match="2 schedule classes of yours: mine.a:Twin, mine.b:Twin"):
        Schedule.from_spec({"kind": "Twin", "params": {}})  # as checkpoints of earlier versions call it
    again = twin("mine.a", value=0.125)  # a notebook cell that was run twice
    with pytest.raises(ValueError, match="2 schedule classes of yours"):
        Schedule.from_spec(one(5).spec())
    assert type(Schedule.from_spec(one(5).spec(), prefer=(again,))) is again
    both = S.join(10, schedules=(one(5), again(5)), boundaries=(5,))
    with pytest.raises(ValueError, match="join cannot be stored.*2 schedule classes of yours"):
        check_storable(both)


def test_a_script_that_runs_and_the_same_script_imported():
    here = twin("train_it", "Moved")
    assert type(Schedule.from_spec({"kind": "__main__:Moved", "params": {"total_steps": 5}})) is here


def test_what_a_checkpoint_cannot_hold_is_refused_before_training():
    @dataclass(frozen=True)
    class WithFunction(Schedule):
        curve: object = None

        def _multiplier(self, t):
            return 1.0

    class NoField(Schedule):
        def __init__(self, total_steps, level):
            super().__init__(total_steps)
            object.__setattr__(self, "level", level)

        def _multiplier(self, t):
            return self.level

    class Forgets(Schedule):
        def __init__(self, total_steps=None, level=1.0):
            super().__init__(total_steps)
            object.__setattr__(self, "level", level)

        def _multiplier(self, t):
            return self.level

    for schedule, words in (
        (WithFunction(5, lambda t: 1.0), "curve=<function .* is no JSON"),
        (NoField(5, 0.5), r"fails .*Decorate the class with @dataclass\(frozen=True\)"),
        (Forgets(5, 0.5), "has other values"),
    ):
        with pytest.raises(ValueError, match=words):
            check_storable(schedule)
        with pytest.raises(ValueError, match=words):
            loop(schedule, 1.0, 1)
    for schedule in (Steps(5), cosine(5), *S.gallery(30)):
        check_storable(schedule)
