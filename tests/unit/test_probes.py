"""Which updates are probes, who acts first, and who writes the LR: without a Trainer."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState

from hf_effi.callbacks import probing as probing
from hf_effi.callbacks._forward_watch import ForwardWatch
from hf_effi.callbacks._lr_factors import LRFactorCallback, LRFactors
from hf_effi.callbacks._lr_search import probe_blocks, share_stage
from hf_effi.callbacks._turns import MEASURE, READ, WRITE, TurnCallback, in_turn
from hf_effi.callbacks.owners import Role
from hf_effi.errors import RefusedError
from hf_effi.functional.probes import ProbePlan, is_probed, probing_model, stored_plan, without_probes
from hf_effi.schedules.range_test import lr_range_test

# --- the plan --------------------------------------------------------------------------------------------------------


def test_plan_by_hand():
    plan = ProbePlan(((1, 4, 2), (9, 12, 4)))
    assert [update for update in range(15) if plan.is_probe(update)] == [1, 2, 3, 4, 9, 10, 11, 12]
    assert [plan.trained(update) for update in range(15)] == [0, 0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6]
    assert [update for update in range(15) if not plan.undone(update)] == [1, 3, 9, 10, 11]
    assert [plan.update_of(count) for count in range(1, 7)] == [5, 6, 7, 8, 13, 14]
    assert plan.until(10) == ProbePlan(((1, 4, 2), (9, 10, 4))) and plan.until(0) == ProbePlan()
    assert not plan.until(10).undone(10) and plan.until(2).undone(2)


def test_plan_against_counting():
    rng = random.Random(0)
    for _ in range(200):
        blocks, end = [], 0
        for _ in range(rng.randrange(4)):
            first, length = end + rng.randint(1, 3), rng.randint(1, 3)
            end = first + length * rng.randint(1, 3) - 1
            blocks.append((first, end, length))
        plan = ProbePlan(tuple(blocks))
        probes = {update for first, last, _ in blocks for update in range(first, last + 1)}
        training = [update for update in range(1, 40) if update not in probes]
        for update in range(40):
            assert plan.is_probe(update) == (update in probes)
            assert plan.trained(update) == sum(one <= update for one in training)
            assert plan.until(update).trained(update) == plan.trained(update)
            assert plan.until(update).undone(update) == plan.undone(update)
        assert [plan.update_of(count + 1) for count in range(len(training))] == training


@pytest.mark.parametrize("blocks", [((0, 2, 1),), ((3, 2, 1),), ((1, 2, 0),), ((1, 4, 2), (4, 5, 1))])
def test_blocks_that_cannot_be_are_refused(blocks):
    with pytest.raises(ValueError, match="must ascend"):
        ProbePlan(blocks)


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_the_probes_of_a_run_are_those_that_its_stages_make(probes):
    """What is announced at any update equals what a walk through the stages does."""
    for max_steps in range(7, 60):
        stage, first, progress, walked, announced = 3, True, None, set(), []
        step = 0
        while step < max_steps:
            search, run, _ = share_stage(max_steps - step, stage, probes, first)
            if first and run <= 0:
                break
            progress = {"stage_steps": stage, "run_steps": run, "tried": [], "done": 0}
            if search:
                walked |= {*range(step + 1, step + search + 1)}
                announced.append(probe_blocks({**progress, "phase": "probe"}, step, max_steps, probes, 6))
                half = {**progress, "phase": "probe", "tried": [[0.1, 1.0]]}
                announced.append(probe_blocks(half, step + stage // probes, max_steps, probes, 6))
                step += search
            announced.append(probe_blocks({**progress, "phase": "run", "done": 1}, step + 1, max_steps, probes, 6))
            step, stage, first = step + run, min(2 * stage, 6), False
        for blocks in announced:
            covered = {update for a, b, _ in blocks for update in range(a, b + 1)}
            since = min(covered, default=max_steps)
            assert covered == {update for update in walked if update >= since}


def test_entries_of_probes_are_left_out():
    assert without_probes([{"loss": 1.0}, {"loss": 9.0, "effi/probe": 1.0}]) == [{"loss": 1.0}]


# --- the signal ------------------------------------------------------------------------------------------------------


def state_at(step, **over):
    return TrainerState(global_step=step, max_steps=30, **over)


def test_two_states_do_not_meet_and_checkpoints_know_the_past_alone():
    one, other = state_at(0), state_at(0)
    probing.announce_probes(one, "search", [(1, 4, 2), (9, 12, 2)])
    assert probing.in_probe(one, 1) and not probing.in_probe(other, 1)
    assert (probing.trained_total(one), probing.trained_total(other)) == (22, 30)
    one.global_step = 3
    probing.store_probes(one)
    assert "hf_effi.probes" in one.stateful_callbacks and json.dumps(one.stateful_callbacks)
    again = state_at(3, stateful_callbacks=json.loads(json.dumps(one.stateful_callbacks)))
    # Whoever made the probes is not there yet: the past counts, and nothing that was only planned.
    assert probing.trained_steps(again) == 0 and not probing.holds_training_weights(again)
    assert not probing.in_probe(again, 1) and probing.trained_total(again) == 27
    probing.announce_probes(again, "search", [(1, 4, 2), (9, 12, 2)])
    assert probing.plan_of(again) == probing.plan_of(one)


def test_two_searches_in_one_run_are_refused():
    state = state_at(0)
    probing.announce_probes(state, SimpleNamespace(), [(1, 4, 2)])
    with pytest.raises(RefusedError, match="SimpleNamespace and dict both try updates"):
        probing.announce_probes(state, {}, [(5, 6, 1)])


def test_training_weights_are_lent_or_refused():
    state, held = state_at(1), []

    class Lend:
        def __enter__(self):
            held.append("in")

        def __exit__(self, *exception):
            held.append("out")

    probing.announce_probes(state, "search", [(1, 2, 2)], Lend)
    with probing.training_weights(state):
        held.append("look")
    state.global_step = 2
    with probing.training_weights(state):
        held.append("free")
    assert held == ["in", "look", "out", "free"]
    lonely = state_at(1, stateful_callbacks={"hf_effi.probes": {"blocks": [[1, 1, 2]]}})
    with pytest.raises(RefusedError, match="Train on with the callback"), probing.training_weights(lonely):
        pass


def test_the_clock_is_kept_out_of_probes():
    state, control = state_at(0), TrainerControl()
    args = SimpleNamespace(logging_strategy="steps")
    probing.announce_probes(state, "search", [(3, 6, 2)])
    seen = []
    for step in range(1, 9):
        state.global_step = step
        control.should_save = control.should_evaluate = step % 3 == 0
        control.should_log = False
        probing.hold_back(args, state, control)
        seen.append((control.should_evaluate, control.should_save, control.should_log))
    # Due at 3, 6: no evaluation; the checkpoint of 3 waits for 4, where the first probe is undone.
    assert [evaluate for evaluate, _, _ in seen] == [False] * 8
    assert [save for _, save, _ in seen] == [False, False, False, True, False, True, False, False]
    assert [log for _, _, log in seen] == [False, True, False, False, False, True, False, False]


def test_models_under_a_range_test_are_not_counted():
    model = torch.nn.Linear(4, 1)
    with probing_model(model):
        assert is_probed(model)
        with probing_model(model):
            pass
        assert is_probed(model), "the outer one still holds it"
    assert not is_probed(model)

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(8, 4)

        def forward(self, input_ids):
            return self.table(input_ids).square().mean()

    model, batches = Tokens(), [{"input_ids": torch.arange(8).view(2, 4)} for _ in range(12)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = ForwardWatch(model)
    lr_range_test(model, optimizer, batches, lambda m, batch: m(**batch))
    assert watch.take() == (0, 0)
    model(**batches[0])
    assert watch.take() == (8, 8)


# --- turns -----------------------------------------------------------------------------------------------------------


class Noted(TurnCallback):
    role = property(lambda self: Role(self.turn_name, "Two of one name", "Keep one."))

    def __init__(self, turn_name, log):
        self.turn_name, self.log = turn_name, log


class Measures(Noted):
    @in_turn(MEASURE)
    def on_step_end(self, args, state, control, **kwargs):
        self.log.append((state.global_step, self.turn_name))


class Writes(Noted):
    @in_turn(WRITE)
    def on_step_end(self, args, state, control, **kwargs):
        self.log.append((state.global_step, self.turn_name))


class Reads(Noted):
    @in_turn(READ)
    def on_step_end(self, args, state, control, **kwargs):
        self.log.append((state.global_step, self.turn_name))


class ReadsMore(Reads):
    @in_turn(READ)
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)


def play(callbacks, state, steps):
    for callback in callbacks:
        callback.on_train_begin(None, state, None)
    for step in steps:
        for callback in callbacks:
            callback.on_step_begin(None, state, None)
        state.global_step = step
        for callback in callbacks:
            callback.on_step_end(None, state, None)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("reads", [Reads, ReadsMore])
def test_turns_do_not_follow_the_list(order, reads):
    log = []
    callbacks = [Measures("measure", log), Writes("write", log), reads("read", log)]
    play([callbacks[i] for i in order], state_at(0), (1, 2))
    assert log == [(step, name) for step in (1, 2) for name in ("measure", "write", "read")]


def test_a_callback_that_was_taken_out_has_no_turn():
    log, state = [], state_at(0)
    first, second = Reads("read", log), Writes("write", log)
    play([first, second], state, (1,))
    first.on_step_begin(None, state, None)
    state.global_step = 2
    first.on_step_end(None, state, None)
    assert log == [(1, "write"), (1, "read"), (2, "read")]


# --- the LR ----------------------------------------------------------------------------------------------------------


class Factor(LRFactorCallback):
    def __init__(self, factor, value, lowest=0.0):
        self.factor, self.value, self.lowest = factor, value, lowest

    @property
    def lowest_lr(self):
        return self.lowest

    def multiplier(self, state, scheduler):
        return self.value


class Loop:
    """A loop of a scheduler that halves the LR, and events as the Trainer sends them."""

    def __init__(self, *callbacks, base=(0.4, 0.8), skipped=()):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in base]
        self.optimizer = torch.optim.SGD(groups)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 0.5**step)
        self.callbacks, self.state, self.skipped = list(callbacks), state_at(0), skipped
        self.kwargs = {"lr_scheduler": self.scheduler, "optimizer": self.optimizer, "logs": {}}
        self.applied = []

    def run(self, steps):
        for _ in range(steps):
            self._send("on_step_begin")
            self._send("on_pre_optimizer_step")
            self.optimizer.step()
            lrs = [group["lr"] for group in self.optimizer.param_groups]
            assert lrs == self.scheduler.get_last_lr()
            self.applied.append(lrs)
            if self.state.global_step + 1 not in self.skipped:
                self.scheduler.step()
            self.state.global_step += 1
            self._send("on_step_end")

    def _send(self, event):
        for callback in self.callbacks:
            getattr(callback, event)(None, self.state, None, **self.kwargs)


@pytest.mark.parametrize("order", [1, -1])
def test_the_lr_is_the_product_for_every_group(order):
    loop = Loop(*[Factor("a", 0.3), Factor("b", 0.7), Factor("c", 1.9)][::order])
    loop.run(3)
    product = 0.3 * 0.7 * 1.9
    assert loop.applied == [[base * 0.5**step * product for base in (0.4, 0.8)] for step in range(3)]
    assert LRFactors.of(loop.state, loop.scheduler).applied == {"a": 0.3, "b": 0.7, "c": 1.9}


def test_taking_one_out_leaves_the_product_of_the_others():
    loop = Loop(Factor("a", 0.5), Factor("b", 4.0))
    loop.run(1)
    loop.callbacks.pop(0)
    loop.run(1)
    loop.callbacks.pop(0)
    loop.run(1)
    assert [lrs[0] for lrs in loop.applied] == [0.4 * 2, 0.2 * 4, 0.1]


def test_a_skipped_update_does_not_multiply_twice():
    """An fp16 overflow: the optimizer does nothing and the scheduler stays; the next update has the same LR."""
    loop = Loop(Factor("a", 0.5), Factor("b", 4.0), skipped=(2,))
    loop.run(3)
    assert [lrs[0] for lrs in loop.applied] == [0.8, 0.4, 0.4]


def test_the_highest_floor_holds():
    loop = Loop(Factor("a", 0.5, lowest=0.15), Factor("b", 0.5, lowest=0.12))
    loop.run(2)
    assert loop.applied == [[0.15, 0.2], [0.15, 0.15]]


def test_two_factors_of_one_name_are_refused():
    first, second, state = Factor("a", 0.5), Factor("a", 0.5), state_at(0)
    first.on_train_begin(None, state, None)
    with pytest.raises(RefusedError, match="Two callbacks multiply the LR by one rule"):
        second.on_train_begin(None, state, None)


def test_stored_plan_of_a_checkpoint_without_searches():
    assert stored_plan({}) == ProbePlan()
