"""A stock Trainer calls callbacks in this order, with these parts and one shared state."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch

from tests.contract._seams import CALLBACK_EVENTS, CALLBACK_PARTS, EVENTS
from tests.contract._upstream import resolve, tree_of
from tests.helpers import (
    lm_dataset,
    tiny_qwen3,
)

# --- names and signatures ------------------------------------------------------------------------------------------


def test_one_state_is_shared_by_the_callbacks_of_a_run_and_each_training_has_a_new_one(tmp_path):
    """Claims of one owner lie on the state; what is no field of it goes into no file."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Notes(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_init_end(self, args, state, control, **kwargs):
            self.seen.append(state)

        def on_train_begin(self, args, state, control, **kwargs):
            self.seen.append(state)

    one, two = Notes(), Notes()
    args = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(tiny_qwen3(num_hidden_layers=1), args, train_dataset=lm_dataset(8), callbacks=[one, two])
    trainer.train()
    trainer.train()
    assert [id(state) for state in one.seen] == [id(state) for state in two.seen]
    assert len({id(state) for state in one.seen}) == 3, "when it is built, and for each training"
    trainer.state.is_no_field = object()
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert "is_no_field" not in (tmp_path / "state.json").read_text()


def test_callback_events():
    found = {name for name in dir(resolve(f"{EVENTS}:TrainerCallback")) if name.startswith("on_")}
    missing, new = set(CALLBACK_EVENTS.split()) - found, found - set(CALLBACK_EVENTS.split())
    assert not missing and not new, f"TrainerCallback events gone: {sorted(missing)}; new: {sorted(new)}"
    call = next(
        node
        for node in ast.walk(tree_of(f"{EVENTS}:CallbackHandler.call_event"))
        if isinstance(node, ast.Call) and any(keyword.arg == "model" for keyword in node.keywords)
    )
    passed = {keyword.arg for keyword in call.keywords if keyword.arg}
    assert passed == CALLBACK_PARTS, f"CallbackHandler.call_event passes {sorted(passed)}"


# --- a stock Trainer with a callback -------------------------------------------------------------------------------


def test_callback_events_in_order_with_their_parts_and_state(tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[str] = []
            self.rates: list[float] = []
            self.restored: Any = None

        def _note(self, name: str, state: Any, kwargs: Any) -> None:
            self.seen.append(name)
            assert set(kwargs) >= CALLBACK_PARTS, f"{name} lacks {CALLBACK_PARTS - set(kwargs)}"
            if name == "on_train_begin":
                self.restored = state.stateful_callbacks.get("hf_effi.test")
                scheduler = kwargs["lr_scheduler"]
                assert type(scheduler).__name__ == "LambdaLR", "the scheduler is wrapped now"
                for attribute in ("lr_lambdas", "base_lrs", "last_epoch", "_last_lr"):
                    assert hasattr(scheduler, attribute), f"LambdaLR.{attribute} is gone"
                scheduler.lr_lambdas = [lambda step: 1.0 / (1 + step)] * len(scheduler.lr_lambdas)
            if name == "on_pre_optimizer_step":
                self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])
            if name == "on_step_end":
                state.stateful_callbacks["hf_effi.test"] = {"seen_steps": state.global_step}

    for event in CALLBACK_EVENTS.split():
        if event != "on_init_end":

            def method(self: Any, args: Any, state: Any, control: Any, _event: str = event, **kwargs: Any) -> None:
                self._note(_event, state, kwargs)

            setattr(Recorder, event, method)

    def train(steps: int, resume: bool) -> Any:
        args = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            save_steps=2,
            max_steps=steps,
            learning_rate=0.5,
        )
        recorder = Recorder()
        trainer = Trainer(model=tiny_qwen3(), args=args, train_dataset=lm_dataset(32), callbacks=[recorder])
        trainer.train(resume_from_checkpoint=resume or None)
        return recorder, trainer

    recorder, trainer = train(2, False)
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    expected = ["on_train_begin", "on_epoch_begin", *step, *step, "on_save", "on_epoch_end", "on_log", "on_train_end"]
    assert recorder.seen == expected
    assert recorder.rates == [0.5, 0.25], "one scheduler step per optimizer step; the lambda can be replaced"
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == recorder.rates, "the logged learning rate is the one that was used"

    recorder, _ = train(4, True)
    assert recorder.restored == {"seen_steps": 2}, "state.stateful_callbacks no longer survives a resume"
    assert recorder.rates[0] == pytest.approx(0.5 / 3), "after a resume the scheduler goes on where it was"


def test_what_probes_and_factors_of_the_lr_lean_on(tmp_path):
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import Trainer, TrainingArguments

    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = LambdaLR(torch.optim.SGD([parameter], lr=0.5), lambda step: 1.0)
    mine = scheduler._last_lr = [0.25]
    assert scheduler.get_last_lr() == [0.25], "what the Trainer logs is what was put there"
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler._last_lr is not mine and scheduler._last_lr == [0.5], "a step puts a list of its own there"

    args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = Trainer(tiny_qwen3(), args, train_dataset=lm_dataset(4))
    first = type(trainer.callback_handler.callbacks[0]).__name__
    assert first == "DefaultFlowCallback", "what falls due is decided before any callback of the user"
    trainer.state._hf_effi_test = object()
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert "_hf_effi_test" not in (tmp_path / "state.json").read_text(), "attributes that are no fields are not saved"
