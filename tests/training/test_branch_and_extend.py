import hashlib
from pathlib import Path

import pytest
import torch

from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.errors import BrokenFileError
from hf_effi.functional.schedules import cosine, wsd
from hf_effi.functional.schedules.extend import extend_to
from hf_effi.schedules.branch import branch_cooldown
from tests.training.lr_schedule_run import Recorder, StopAt, make_trainer, train

LR = 1e-2


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def fingerprint(folder):
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def same(one, other):
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_branch_is_the_run_that_decayed_there_and_leaves_the_trunk_alone(tmp_path):
    trunk = wsd(warmup_steps=2, open_ended=True)
    applied, _, _ = train(tmp_path / "trunk", trunk, save_strategy="steps", save_steps=6)
    before = fingerprint(tmp_path / "trunk")
    for length in (3, 5):
        branch = branch_cooldown(tmp_path / "trunk" / "checkpoint-6", length, tmp_path / f"branch{length}")
        recorder = Recorder()
        trainer = make_trainer(branch.output_dir, [branch.callback(), recorder], max_steps=branch.total_steps)
        trainer.train(resume_from_checkpoint=branch.checkpoint)
        expected = wsd(warmup_steps=2).start_decay(at=6, decay_steps=length)
        assert [g[0] for g in recorder.applied] == [LR * expected(t) for t in range(6, 6 + length)]
        # The same weights as one run from scratch with the decay planned.
        _, _, whole = train(tmp_path / f"whole{length}", expected, max_steps=6 + length)
        assert same(trainer, whole)
    assert fingerprint(tmp_path / "trunk") == before
    rest, _, _ = train(tmp_path / "trunk", trunk, resume=str(tmp_path / "trunk" / "checkpoint-6"))
    assert rest == applied[6:], "the trunk goes on as if nothing had happened"


def test_what_cannot_be_branched_is_refused(tmp_path):
    stock = make_trainer(tmp_path / "stock", [StopAt(3)], save_strategy="steps")
    stock.train()
    train(tmp_path / "cosine", cosine(), extra=[StopAt(3)], save_strategy="steps")
    train(tmp_path / "late", wsd(decay_steps=6), extra=[StopAt(9)], save_strategy="steps")
    with pytest.raises(ValueError, match="without LRScheduleCallback"):
        branch_cooldown(tmp_path / "stock" / "checkpoint-3", 2, tmp_path / "b")
    with pytest.raises(ValueError, match="no plateau"):
        branch_cooldown(tmp_path / "cosine" / "checkpoint-3", 2, tmp_path / "b")
    with pytest.raises(ValueError, match="starts once"):
        branch_cooldown(tmp_path / "late" / "checkpoint-9", 2, tmp_path / "b")
    with pytest.raises(BrokenFileError, match="no trainer_state.json"):
        branch_cooldown(tmp_path, 2, tmp_path / "b")
    with pytest.raises(ValueError, match="decay_steps=0"):
        branch_cooldown(tmp_path / "cosine" / "checkpoint-3", 0, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("method", ["cooldown", "plateau", "naive"])
def test_extended_run_is_one_run(tmp_path, method):
    """(k of the old run, then resume with the extended schedule) == the extended schedule from the start."""
    old = wsd(12, warmup_steps=2, decay_steps=4, shape="linear")
    new = extend_to(old, 18, at=7, method=method)
    train(tmp_path / "old", old, extra=[StopAt(7)], save_strategy="steps")
    applied, logged, resumed = train(
        tmp_path / "old", new, resume=str(tmp_path / "old" / "checkpoint-7"), max_steps=18, on_mismatch="new"
    )
    assert [g[0] for g in applied] == [LR * new(t) for t in range(7, 18)] == logged
    _, _, whole = train(tmp_path / "whole", new, max_steps=18)
    assert same(resumed, whole)


def test_extension_shapes():
    old = wsd(1000, warmup_fraction=0.02, decay_fraction=0.2, shape="linear")
    longer, lower, naive = (extend_to(old, 2000, method=m, at=500) for m in ("cooldown", "plateau", "naive"))
    for new in (longer, lower, naive):
        assert new.trace(500) == old.trace(500) and new(2000) == 0
    assert longer.decay_begin < naive.decay_begin == 1600
    assert lower(799) == 1 and lower(800) == pytest.approx(0.53, abs=0.02)
    soft = extend_to(old, 2000, method="plateau", transition_steps=100)
    values = soft.trace()
    assert max(abs(a - b) for a, b in zip(values[800:], values[801:], strict=False)) < 0.01
    assert all(a >= b - 1e-12 for a, b in zip(values[20:], values[21:], strict=False)), "never up"


def test_a_decaying_schedule_holds_what_it_has():
    old = cosine(100)
    new = extend_to(old, 150, at=60)
    assert new.trace(60) == old.trace(60) and new(60) == old(60) == new(100) and new(150) == 0
    mid = wsd(100, decay_fraction=0.5, shape="linear")
    new = extend_to(mid, 200, at=80)
    assert new.trace(80) == mid.trace(80) and new(80) == pytest.approx(mid(80))
    for bad, message in (({"total_steps": 90}, "total_steps=90"), ({"total_steps": 150, "at": 100}, "decay is over")):
        with pytest.raises(ValueError, match=message):
            extend_to(old, **bad)
    with pytest.raises(ValueError, match="has no end"):
        extend_to(wsd(10, open_ended=True), 20)


def test_callback_type_is_exported():
    assert LRScheduleCallback.__module__ == "hf_effi.callbacks.lr_schedule"
