"""Fast Forward through `trainer.train()`: it changes nothing, and tells a low learning rate from a good one."""

import copy
import json
import logging

import pytest
import torch
from transformers import Trainer

from hf_effi.callbacks import FastForwardCallback
from hf_effi.callbacks.fast_forward import STATE_KEY
from hf_effi.errors import RefusedError
from tests.helpers import compare_runs, lm_dataset, tiny_qwen3
from tests.helpers.compare import record_run
from tests.helpers.sampling import StopAt, sampler_trainer

STEPS = 8


def make(folder, *callbacks, **over):
    rows = lm_dataset(6, length=8).add_column("row", list(range(6)))
    over = {"eval_dataset": rows, "lr_scheduler_type": "constant", "max_steps": STEPS, **over}
    model = tiny_qwen3(num_hidden_layers=1, attention_dropout=0.1)
    return sampler_trainer(folder, Trainer, callbacks=callbacks, model=model, **over)


def make_one():
    return FastForwardCallback(2, rows=4, longest=7, limit=3, patience=2)


def run(folder, *callbacks, resume=None, **over):
    trainer = make(folder, *callbacks, **over)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def low(tmp_path_factory):
    """A run with a learning rate that is far too low, and what it said."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_effi.callbacks.fast_forward").addHandler(handler)
    diagnosis = make_one()
    trainer = run(tmp_path_factory.mktemp("low"), diagnosis, learning_rate=1e-5)
    logging.getLogger("hf_effi.callbacks.fast_forward").removeHandler(handler)
    return trainer, diagnosis, said


def test_nothing_of_the_run_changes(tmp_path, low):
    stock, ours = run(tmp_path, learning_rate=1e-5), copy.deepcopy(record_run(low[0]))
    for entry in ours.log_history:
        entry.pop("effi/fast_forward_steps", None)
    compare_runs(record_run(stock), ours)


def test_a_low_rate_is_named_once_and_a_high_one_is_not(tmp_path, low, caplog):
    trainer, diagnosis, said = low
    assert diagnosis.walks == [(2, 7), (4, 7), (6, 7), (8, 7)] and diagnosis.typical_steps == 7
    assert len(said) == 1 and "Update 4: the last 2 walks went on for more than 3 updates" in said[0]
    assert "(this one for 7 or more)" in said[0] and said[0].endswith("raise the learning rate.")
    logged = [entry for entry in trainer.state.log_history if "effi/fast_forward_steps" in entry]
    assert {entry["step"]: entry["effi/fast_forward_steps"] for entry in logged} == {2: 7, 4: 7, 6: 7, 8: 7}
    high = make_one()
    run(tmp_path, high, learning_rate=0.3)
    assert high.typical_steps < 3 and "raise the learning rate" not in caplog.text


def test_a_resumed_run_goes_on_with_its_walks(tmp_path, low):
    run(tmp_path, make_one(), StopAt(5), learning_rate=1e-5)
    diagnosis = make_one()
    trainer = run(tmp_path, diagnosis, resume=str(tmp_path / "checkpoint-5"), learning_rate=1e-5)
    assert diagnosis.walks == low[1].walks
    assert trainer.state.stateful_callbacks[STATE_KEY] == low[0].state.stateful_callbacks[STATE_KEY]


def test_a_function_of_the_user_is_the_loss(tmp_path):
    calls = []

    def distance(model):
        calls.append(torch.is_grad_enabled() or model.training)
        return float(-len(calls))

    diagnosis = FastForwardCallback(4, longest=6, limit=2, evaluate=distance)
    run(tmp_path, diagnosis, eval_dataset=None, max_steps=4)
    assert diagnosis.walks == [(4, 6)] and calls == [False] * 7


def test_it_needs_rows(tmp_path):
    with pytest.raises(RefusedError, match="the Trainer has none. Pass eval_dataset="):
        run(tmp_path, FastForwardCallback(), eval_dataset=None)
    trainer = make(tmp_path, FastForwardCallback())
    trainer.args.fsdp = "on"
    with pytest.raises(RefusedError, match="FastForwardCallback needs whole parameters"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("loss", [lambda model: 1 / 0, lambda model: float("nan")], ids=["raises", "is no number"])
def test_a_loss_that_cannot_be_had_ends_the_walks_and_not_the_run(tmp_path, low, caplog, loss):
    diagnosis = FastForwardCallback(2, longest=7, limit=3, patience=2, evaluate=loss)
    trainer = run(tmp_path, diagnosis, learning_rate=1e-5)
    assert caplog.text.count("FastForwardCallback stopped its walks, and the run goes on") == 1
    assert diagnosis.walks == [] and trainer.state.global_step == STEPS
    for one, other in zip(trainer.model.parameters(), low[0].model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stored", [[1], {"walks": 3}, {"walks": [["a", "b"]]}])
def test_walks_that_cannot_be_read_end_no_run(tmp_path, caplog, stored):
    trainer = run(tmp_path, make_one(), StopAt(2), save_strategy="steps", save_steps=2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"][STATE_KEY] = state["stateful_callbacks"]["hf_effi.log_window"] = stored
    path.write_text(json.dumps(state))
    diagnosis = make_one()
    trainer = run(tmp_path, diagnosis, resume=str(path.parent), save_strategy="steps", save_steps=2)
    assert "it begins anew" in caplog.text and trainer.state.global_step == STEPS
    assert [step for step, _ in diagnosis.walks] == [4, 6, 8]
