"""`StragglerCallback` where there is nobody to compare with, and its arguments. What it finds needs two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_effi.callbacks import StragglerCallback
from tests.helpers import lm_dataset, push_args, tiny_qwen3


def test_one_process_has_nobody_to_compare_with_and_trains_all_the_same(tmp_path: Path, caplog: Any) -> None:
    callback = StragglerCallback()
    trainer = Trainer(
        tiny_qwen3(num_hidden_layers=1), push_args(tmp_path), train_dataset=lm_dataset(8), callbacks=[callback]
    )
    trainer.train()
    said = [record.getMessage() for record in caplog.records if "StragglerCallback" in record.getMessage()]
    assert said == [
        "StragglerCallback measures nothing, and the run goes on: it compares processes, and there is one."
    ]
    assert trainer.state.global_step == trainer.state.max_steps > 0 and callback.reports == []
    assert not any("effi/straggler" in key for entry in trainer.state.log_history for key in entry)
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())


def test_a_failure_ends_the_measuring_and_not_the_run(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    """As on two processes, of which this one cannot read its clock."""
    callback = StragglerCallback()
    trainer = Trainer(
        tiny_qwen3(num_hidden_layers=1), push_args(tmp_path), train_dataset=lm_dataset(8), callbacks=[callback]
    )
    begin = callback.on_train_begin

    def begin_to_measure(args: Any, *rest: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(type(args), "world_size", 2)
            begin(args, *rest, **kwargs)
        assert callback._hooks

    callback.on_train_begin = begin_to_measure
    monkeypatch.setattr(callback, "_now", lambda: 1 / 0)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps > 0
    assert caplog.text.count("measures nothing, and the run goes on: ZeroDivisionError") == 1
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())


@pytest.mark.parametrize(("sent", "told"), [(None, 1), (True, 1), (False, 0)])
def test_buffers_that_are_sent_in_the_forward_are_told(
    tmp_path: Path, caplog: Any, monkeypatch: Any, sent, told
) -> None:
    args = push_args(tmp_path, ddp_broadcast_buffers=sent)
    trainer = Trainer(tiny_qwen3(num_hidden_layers=1), args, train_dataset=lm_dataset(8))
    assert next(trainer.model.buffers(), None) is not None
    callback = StragglerCallback()
    with monkeypatch.context() as patched:
        patched.setattr(type(args), "world_size", 2)
        callback.on_train_begin(args, trainer.state, trainer.control, model=trainer.model)
    callback.on_train_end(args, trainer.state, trainer.control)
    assert caplog.text.count("Set ddp_broadcast_buffers=False") == told


@pytest.mark.parametrize(
    ("over", "words"),
    [({"every_logs": 0}, "every_logs=0"), ({"ratio": 0.9}, "ratio=0.9"), ({"persistence": 1.5}, "persistence=1.5")],
)
def test_arguments_out_of_range(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StragglerCallback(**over)
