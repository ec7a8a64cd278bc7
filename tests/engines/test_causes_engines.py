"""The readings of two gloo processes, by DDP and FSDP2, are those of one with the joint batch; ZeRO is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_effi.callbacks import CausesCallback, StragglerCallback, TrainDoctor
from hf_effi.errors import RefusedError
from tests.engines.runs import LENGTH, Place, finish
from tests.helpers import lm_dataset, run_distributed, tiny_qwen3
from tests.helpers.cpu_engines import run_on_cpu


class Fails:
    """A part that one process cannot measure."""

    def due(self, step: int) -> bool:
        return step == 2

    def measure(self, moment: Any) -> dict[str, float]:
        if moment.args.process_index == 1:
            raise RuntimeError("no such number here")
        return {"effi/causes/here": 1.0}


def _seconds(self: Any, first: Any, last: Any) -> float:
    return 1.0 + 0.5 * int(os.environ["RANK"])


def trainer_of(place: Place, callbacks: list[Any], **over: Any) -> Trainer:
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"max_steps": 3, "per_device_train_batch_size": batch, "max_grad_norm": 0.5, "optim": "sgd", **over}
    rows = lm_dataset(16, length=LENGTH)
    return Trainer(
        tiny_qwen3(num_hidden_layers=2), place.arguments(**settings), train_dataset=rows, callbacks=callbacks
    )


def all_runs(engine: str, folder: str) -> dict[str, Any]:
    run_on_cpu(engine)
    place = Place(engine, Path(folder))
    if engine == "zero2":
        try:
            trainer_of(place, [CausesCallback(2)]).train()
        except RefusedError as error:
            return {"refused": str(error)}
        return {"refused": ""}
    callback = CausesCallback(2)
    trainer = trainer_of(place, [callback])
    outcome = finish(trainer)
    found: dict[str, Any] = {"latest": callback.latest, "weights": outcome.weights, "logged": outcome.log}
    found["stock"] = finish(trainer_of(place, [])).weights
    if engine == "ddp" and os.environ.get("WORLD_SIZE") == "2":
        failing = trainer_of(place, [CausesCallback(2, parts=[Fails()])], max_steps=5)
        failing.train()
        updates = [entry["effi/causes/update"] for entry in failing.state.log_history if "effi/causes/update" in entry]
        found["failed"] = failing.state.global_step, updates
        doctor = TrainDoctor(say=lambda sentence: None)
        slow = trainer_of(place, [CausesCallback(2), doctor], max_steps=8, logging_steps=2)
        # What the clocks say, whatever else runs on this machine: the second process takes half as long again.
        seconds, StragglerCallback._seconds = StragglerCallback._seconds, _seconds
        slow.train()
        StragglerCallback._seconds = seconds
        hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in slow.model.parameters())
        found["slow"] = [one.rule for one in doctor.findings], [one.problem for one in doctor.findings], hooks
        own = StragglerCallback()
        beside = CausesCallback(2)
        trainer_of(place, [beside, own]).train()
        found["beside"] = beside._straggler is None
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> dict[str, list[Any]]:
    def of(engine: str, world: int) -> Any:
        return run_distributed(all_runs, world, engine, str(tmp_path_factory.mktemp("run")), timeout=600)

    return {"one": of("ddp", 1), "ddp": of("ddp", 2), "fsdp2": of("fsdp2", 2), "zero2": of("zero2", 2)}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_read_what_one_does(found: dict[str, list[Any]], engine: str) -> None:
    own = {name: value for name, value in found["one"][0]["latest"].items() if "straggler" not in name}
    for rank in found[engine]:
        assert rank["latest"] == pytest.approx(own, rel=2e-3, abs=1e-4)
    weights, stock = found[engine][0]["weights"], found[engine][0]["stock"]
    assert weights and all(torch.equal(weights[name], stock[name]) for name in weights)


def test_zero_is_refused_by_name(found: dict[str, list[Any]]) -> None:
    assert all("DeepSpeed keeps them in parts" in rank["refused"] for rank in found["zero2"])


def test_where_one_process_fails_all_stop_reading_and_none_waits(found: dict[str, list[Any]]) -> None:
    """The part fails before the third update: the first one has been read, and the third is not."""
    for rank in found["ddp"]:
        steps, updates = rank["failed"]
        assert steps == 5 and updates == [1.0]


def test_the_slow_process_is_named_by_the_doctor(found: dict[str, list[Any]]) -> None:
    rules, problems, hooks = found["ddp"][0]["slow"]
    assert "straggler" in rules and "Process 1 takes" in problems[rules.index("straggler")] and hooks == 0
    assert all(rank["beside"] for rank in found["ddp"])
