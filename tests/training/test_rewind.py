"""A loss that is not finite or spikes: back to the copy, and the run is the one that never saw the data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from hf_effi import read_run
from hf_effi.callbacks import RewindCallback, RunRecordCallback
from hf_effi.checkpoint import measure_rewind
from hf_effi.errors import RefusedError
from hf_effi.functional import metrics
from tests.helpers import lm_dataset, push_args, tiny_qwen3, weights_of
from tests.helpers.sampling import StopAt

ROWS = 24  # 6 updates of 4


class Broken(Trainer):
    """The loss of some rows is multiplied, by NaN or by a large number."""

    factor = float("nan")
    bad: frozenset[int] = frozenset()

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        row = inputs.pop("row")
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss * self.factor if set(row.tolist()) & self.bad else loss


def run(
    folder: Path, bad: set[int] = frozenset(), without: set[int] = frozenset(), callbacks: Any = (), **over: Any
) -> Any:
    """Rows in order; those of `without` are not in the data."""
    factor, resume = over.pop("factor", float("nan")), over.pop("resume", None)
    rows = lm_dataset(ROWS, length=8).add_column("row", list(range(ROWS)))
    rows = rows.select([i for i in range(ROWS) if i not in without])
    settings = {
        "max_steps": len(rows) // 4, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant",
        "remove_unused_columns": False, "learning_rate": 1e-2, "save_strategy": "no",
    }  # fmt: skip
    torch.manual_seed(0)
    trainer = Broken(
        tiny_qwen3(num_hidden_layers=1, attention_dropout=0.1),
        push_args(folder, **{**settings, **over}),
        train_dataset=rows,
        callbacks=list(callbacks),
    )
    trainer.bad, trainer.factor = frozenset(bad), factor
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one: Any, other: Any) -> bool:
    left, right = weights_of(one.model), weights_of(other.model)
    states = [[v for e in t.optimizer.state_dict()["state"].values() for v in e.values()] for t in (one, other)]
    return all(torch.equal(left[name], right[name]) for name in left) and all(map(torch.equal, *states))


def test_without_a_fault_it_changes_nothing(tmp_path: Path) -> None:
    assert same(run(tmp_path / "stock"), run(tmp_path / "ours", callbacks=[RewindCallback("spike", every_steps=2)]))


#: rows that are bad, arguments, rows that the run never saw
CASES = {
    "copied each update": ({9}, {"every_steps": 1}, set(range(8, 12))),
    "copied before the update before": ({13}, {"every_steps": 2}, set(range(8, 16))),
    "the first update": ({0}, {"every_steps": 3}, set(range(4))),
    "and two more updates": ({5}, {"every_steps": 1, "skip_batches": 2}, set(range(4, 16))),
    "twice": ({5, 17}, {"every_steps": 1}, set(range(4, 8)) | set(range(16, 20))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_one_that_never_saw_the_data(tmp_path: Path, case: str) -> None:
    bad, settings, unseen = CASES[case]
    rewind = RewindCallback("nan", **settings)
    ours = run(tmp_path / "ours", bad=bad, callbacks=[rewind, RunRecordCallback()])
    assert same(ours, run(tmp_path / "never", without=unseen))
    assert rewind.rewinds == len(bad) and rewind.skipped == len(unseen) // 4
    assert ours.state.global_step == 6, "it counts the data that was passed"
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    assert all(entry["loss"] == entry["loss"] for entry in logged)
    assert logged[-1][metrics.REWINDS] == len(bad) and logged[-1][metrics.REWIND_SKIPPED] == len(unseen) // 4
    events = read_run(tmp_path / "ours")["events"]
    assert any(event.get("values", {}).get(metrics.REWINDS) == len(bad) for event in events)


def test_stock_does_not_come_back(tmp_path: Path) -> None:
    assert any(weight.isnan().any() for weight in weights_of(run(tmp_path, bad={5}).model).values())


def test_a_spike_and_a_rule_of_ones_own(tmp_path: Path) -> None:
    spike = RewindCallback("spike", every_steps=1, least=2, threshold=8.0)
    ours = run(tmp_path / "spike", bad={13}, factor=100.0, callbacks=[spike])
    never = run(tmp_path / "never", without=set(range(12, 16)))
    assert spike.rewinds == 1 and same(ours, never)
    seen: list[tuple[float, int]] = []

    def rule(loss: float, losses: Any) -> bool:
        seen.append((loss, len(losses)))
        return loss > 50

    own = RewindCallback(rule, every_steps=1)
    assert same(run(tmp_path / "own", bad={13}, factor=100.0, callbacks=[own]), never)
    assert [count for _, count in seen] == [0, 1, 2, 3, 3, 4], "the loss of the spike is no part of the window"


def test_a_resume_goes_on_with_count_and_window(tmp_path: Path) -> None:
    def callback() -> RewindCallback:
        return RewindCallback("spike", every_steps=1, least=2, threshold=8.0)

    save = {"save_strategy": "steps", "save_steps": 100}
    whole = run(tmp_path / "whole", bad={5, 17}, callbacks=[callback()], **save)
    run(tmp_path / "cut", bad={5, 17}, callbacks=[callback(), StopAt(3)], **save)
    again = callback()
    resumed = run(
        tmp_path / "cut", bad={5, 17}, callbacks=[again], resume=str(tmp_path / "cut" / "checkpoint-3"), **save
    )
    assert same(whole, resumed) and again.rewinds == 2
    assert whole.state.stateful_callbacks["hf_effi.rewind"] == resumed.state.stateful_callbacks["hf_effi.rewind"]


def test_too_many_rewinds_end_the_run_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="Update 3 has the loss nan, and this run .* max_rewinds=2 times"):
        run(tmp_path, bad=set(range(ROWS)), callbacks=[RewindCallback("nan", max_rewinds=2)])


def test_what_copies_cost_is_said(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_effi.callbacks.rewind"):
        rewind = RewindCallback(every_steps=1)
        trainer = run(tmp_path, callbacks=[rewind], max_steps=2)
        rewind._snapshot = type("Slow", (), {"seconds": 1e6})()
        rewind._has_told = False
        rewind._tell_of_cost(trainer.args)
    assert any("Copies into memory take" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"rewind_on": "loss"}, "rewind_on='loss' is not 'nan', 'spike' or a function"),
        ({"every_steps": 0}, "every_steps=0 must be an integer of at least 1"),
        ({"skip_batches": -1}, "skip_batches=-1"),
        ({"max_rewinds": 0}, "max_rewinds=0"),
        ({"rewind_on": "spike", "window": 5}, "window=5 must be an integer of at least 20"),
        ({"rewind_on": "spike", "threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 3.0}, "act with rewind_on='spike' only"),
    ],
)
def test_arguments_out_of_range(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewindCallback(**over)


def test_fp16_is_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from transformers import TrainerState

    args = SimpleNamespace(fp16=True, deepspeed=None, fsdp=None)
    with pytest.raises(RefusedError, match="fp16 training leaves out"):
        RewindCallback().on_train_begin(args, TrainerState(), None)


def test_measure_rewind_leaves_the_run_alone(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=2)
    before = {name: weight.clone() for name, weight in weights_of(trainer.model).items()}
    rng = torch.get_rng_state()
    cost = measure_rewind(trainer, repeats=1)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(trainer.model).items())
    trained = sum(p.nbytes for p in trainer.model.parameters())
    assert 3 * trained <= cost.nbytes < 3.2 * trained  # weights and two moments
    for value in (cost.take_seconds, cost.restore_seconds, cost.disk_save_seconds, cost.disk_load_seconds):
        assert value > 0
    with pytest.raises(ValueError, match="repeats=0"):
        measure_rewind(trainer, repeats=0)
    with pytest.raises(ValueError, match="no optimizer yet"):
        measure_rewind(Trainer(tiny_qwen3(num_hidden_layers=1), push_args(tmp_path / "new")))
