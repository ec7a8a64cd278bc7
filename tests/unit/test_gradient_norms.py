"""Norms of a gradient, a record of them, and the schedule that it gives: by hand."""

import json
import math

import pytest
import torch
from transformers import TrainerState

from hf_effi.callbacks import GradientNormsCallback
from hf_effi.callbacks.gradient_norms import STATE_KEY, read_norms
from hf_effi.errors import BrokenFileError, MismatchError
from hf_effi.functional.gradient_norms import GradientNorms, sum_norms, unclipped
from hf_effi.functional.schedules import refined_by_gradient_norm
from hf_effi.schedules import norms_of


def sums(*gradients):
    return tuple(part.item() for part in sum_norms(gradients))


def test_sums_by_hand():
    assert sums() == (0, 0)
    assert sums(torch.zeros(2, 2), torch.zeros(())) == (0, 0)
    assert sums(torch.tensor([3.0, -4.0]), torch.tensor([[1.0], [-1.0]])) == pytest.approx((9, 27))
    sparse = torch.sparse_coo_tensor([[1, 1]], [2.0, -5.0], (4,), check_invariants=True)  # one element, twice
    assert sums(sparse, torch.ones(1, dtype=torch.float64)) == pytest.approx((4, 10))
    assert all(math.isnan(part) for part in sums(torch.tensor([1.0, math.nan])))
    assert sums(torch.tensor([math.inf])) == (math.inf, math.inf)


def test_half_precision_is_added_up_in_fp32():
    gradients = [torch.full((n,), 1.0, dtype=dtype) for n, dtype in ((1000, torch.bfloat16), (9, torch.float16))]
    assert sums(*gradients, torch.full((2,), -0.5)) == pytest.approx((1010, 1009.5), rel=1e-6)


def test_what_clipping_took_is_given_back():
    assert unclipped(absolute=0.7, squares=0.25, l2_before=5.0) == pytest.approx(7)
    assert unclipped(absolute=7.0, squares=25.0, l2_before=5.0) == 7
    assert unclipped(absolute=0.0, squares=0.0, l2_before=0.0) == 0


def test_norms_are_spread_over_the_updates():
    norms = GradientNorms((2, 4, 5), 7, l1=(3.0, 1.0, 5.0))
    assert norms.spread(norms.l1) == [3, 3, 2, 1, 5, 5, 5]
    assert GradientNorms((1,), 1, l2=(2.0,)).spread([2.0]) == [2]
    assert GradientNorms((3,), 4).spread([2.0]) == [2] * 4


@pytest.mark.parametrize("bad", [((), 3), ((0, 1), 3), ((2, 2), 3), ((3, 2), 3), ((1, 4), 3)])
def test_updates_that_cannot_be(bad):
    with pytest.raises(ValueError, match="ascending, from 1 to total="):
        GradientNorms(*bad)


def test_one_norm_for_each_update():
    with pytest.raises(ValueError, match="l1 has 1 norms for 2 updates"):
        GradientNorms((1, 2), 2, l1=(1.0,))


def test_the_schedule_of_a_record():
    golden = [0.084821, 0.321429, 1, 0.714286, 0.428571, 0.142857, 0.017857, 0]
    norms = GradientNorms(range(1, 9), 8, l2=(4, 2, 1, 1, 1, 1, 2, 2))
    assert refined_by_gradient_norm(norms, "sgd", 0.0, 8).trace() == pytest.approx(golden, abs=1e-6)
    with pytest.raises(MismatchError, match="has no L1 norms.*GradientNormsCallback"):
        refined_by_gradient_norm(norms)
    # Every second update: smoothed as logged, then on a line in between. The spike between two ones is gone.
    every = GradientNorms(range(2, 42, 2), 40, l1=[1.0] * 9 + [99.0] + [1.0] * 10)
    assert refined_by_gradient_norm(every, smooth=0.1, total_steps=40).trace() == pytest.approx(
        [(39 - t) / 39 for t in range(40)]
    )
    line = GradientNorms((1, 3), 3, l1=(1.0, 3.0))  # 1, 2, 3: weights 1, 1/2, 1/3
    assert refined_by_gradient_norm(line, smooth=0.0, total_steps=3).trace() == pytest.approx([1, 0.2, 0])


# --- where they are found -------------------------------------------------------------------------------------------


def record(**over):
    return {"updates": [1, 2, 3], "l1": [3.0, 2.0, 1.0], "l2": [1.0, 1.0, 1.0], "total": 3, "logged": 3, **over}


def state_file(folder, step, **over):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"global_step": step, "max_steps": 3, "log_history": [], "stateful_callbacks": {}, **over}
    (folder / "trainer_state.json").write_text(json.dumps(content))


def test_a_folder_gives_its_latest_checkpoint(tmp_path):
    kept = {STATE_KEY: record()}
    state_file(tmp_path / "checkpoint-2", 2, stateful_callbacks={STATE_KEY: record(updates=[1], l1=[9], l2=[9])})
    state_file(tmp_path / "checkpoint-3", 3, stateful_callbacks=kept)
    norms = norms_of(tmp_path)
    assert norms == norms_of(str(tmp_path / "checkpoint-3")) == norms_of(TrainerState(stateful_callbacks=kept))
    assert (norms.updates, norms.l1, norms.l2, norms.total) == ((1, 2, 3), (3, 2, 1), (1, 1, 1), 3)
    with pytest.raises(MismatchError, match="end at update 1 of 3"):
        norms_of(tmp_path / "checkpoint-2")


def test_the_log_gives_what_it_has(tmp_path):
    log = [{"step": step, "grad_norm": float(step)} for step in (2, 4)] + [{"step": 3, "grad_norm": math.nan}]
    state_file(tmp_path, 4, log_history=[*log, {"step": 1, "grad_norm": 9.0, "effi/probe": 1.0}], max_steps=4)
    assert norms_of(tmp_path) == GradientNorms((2, 4), 4, l2=(2.0, 4.0))
    both = {"effi/gradient_l1": 7.0, "effi/gradient_l2": 2.0, "grad_norm": 1.0}
    found = norms_of({"log_history": [{"step": 4, **both}], "max_steps": 4})
    assert found == GradientNorms((4,), 4, l1=(7.0,), l2=(2.0,))


def test_what_has_none_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint, no trainer_state.json and no run record"):
        norms_of(tmp_path)
    state_file(tmp_path, 3)
    for empty in (tmp_path, GradientNormsCallback(), TrainerState(), {"log_history": [{"step": 1, "loss": 2.0}]}):
        with pytest.raises(MismatchError, match="no gradient norms"):
            norms_of(empty)
    with pytest.raises(ValueError, match="run is int"):
        norms_of(3)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(BrokenFileError, match="no state of a Trainer"):
        norms_of(tmp_path)


@pytest.mark.parametrize("broken", [[], {"updates": [1]}, record(l1=[1.0]), record(l2="abc"), record(total=2)])
def test_a_damaged_record_is_named(broken):
    with pytest.raises(ValueError):
        read_norms(broken)


@pytest.mark.parametrize("bad", [0, -1, 1.0, True])
def test_the_interval_is_checked(bad):
    with pytest.raises(ValueError, match="every_steps="):
        GradientNormsCallback(bad)
