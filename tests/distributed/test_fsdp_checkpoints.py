"""
Safe checkpoints of FSDP2 on two gloo processes, each of which writes its shards in the background; and conversions.

One launch trains in every mode, another one is killed inside a save; the tests look at what they left.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hf_effi.checkpoint import (
    convert_checkpoint,
    dcp_files,
    find_resumable,
    list_checkpoints,
    repair_run_dir,
    verify_checkpoint,
)
from hf_effi.checkpoint.manifest import read_manifest
from tests.helpers import assert_bitwise_equal, run_distributed
from tests.helpers.distributed import ChildFailure, Children, reference_to

#: name -> mode, lazy, kind of state
RUNS = {
    "stock": (None, False, "SHARDED_STATE_DICT"),
    "eager": ("thread", False, "SHARDED_STATE_DICT"),
    "lazy": ("thread", True, "SHARDED_STATE_DICT"),
    "whole": ("thread", True, "FULL_STATE_DICT"),
}
STEPS = 4


@mock.patch("hf_effi.checkpoint.safe._SMALL", 1)  # every file is written later
def trained(
    folder: str,
    mode: str | None = "thread",
    lazy: bool = False,
    kind: str | None = "SHARDED_STATE_DICT",
    rows: int = 2,
    resume: str | None = None,
    phase: str | None = None,
    meddling: bool = False,
    **over: Any,
) -> dict[str, Any]:
    """Train in fp64 with a save at each second update; `kind=None` is a plain process."""
    from accelerate.state import AcceleratorState
    from torch.distributed.tensor import DTensor
    from transformers import Trainer, TrainerCallback

    from hf_effi.checkpoint import SafeCheckpointer
    from hf_effi.checkpoint.copies import Copies
    from tests.helpers import lm_dataset, push_args, tiny_qwen3
    from tests.helpers.cpu_engines import engine_arguments

    AcceleratorState._reset_state()
    chosen: dict[str, Any] = {}
    if kind is not None:
        chosen = engine_arguments("fsdp2")
        chosen["fsdp_config"]["state_dict_type"] = kind
    settings = {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": rows, "weight_decay": 0.1}
    settings["lr_scheduler_type"] = "constant"
    args = push_args(Path(folder), **{**settings, **chosen, **over})
    trainer = Trainer(tiny_qwen3(tie_word_embeddings=True).double(), args, train_dataset=lm_dataset(40))

    class Meddling(TrainerCallback):
        """Changes a weight of one process, after the save of update 2 and before the next update."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2 and args.process_index == 1:
                with torch.no_grad():
                    next(model.parameters()).to_local().mul_(2)

    if meddling:
        trainer.add_callback(Meddling())
    checkpointer = None
    if mode is not None:
        on_error: Any = "warn" if meddling else "raise"
        checkpointer = SafeCheckpointer(mode, lazy=lazy, on_error=on_error)  # type: ignore[arg-type]

        def at(now: str) -> None:
            if now == phase and args.process_index == 1 and trainer.state.global_step >= 4:
                os.kill(os.getpid(), signal.SIGKILL)

        def save(*args: Any) -> None:
            real_save(*args)
            if phase == "after":  # handed over, and hardly written
                os.kill(os.getpid(), signal.SIGKILL)

        real_save, checkpointer._save = checkpointer._save, save  # type: ignore[method-assign]
        checkpointer.at = at  # type: ignore[method-assign]
        checkpointer.attach(trainer)
    waiting: list[int] = []
    real = Copies.begin
    Copies.begin = lambda copies: (waiting.append(copies.nbytes), real(copies))[1]  # type: ignore[assignment]
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        Copies.begin = real  # type: ignore[method-assign]
    state = trainer.model.state_dict()
    whole = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in state.items()}
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in whole.items()},
        "waiting": waiting,
        "planned": checkpointer and checkpointer._plans and checkpointer._plans.planned,
    }


def on_engine(calls: dict[str, dict[str, Any]], world: int | None = None) -> dict[str, Any]:
    from tests.helpers.cpu_engines import run_on_cpu

    if world == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in launcher.items()}
    run_on_cpu("fsdp2")
    return {name: trained(**call) for name, call in calls.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every run that the tests look at, by name: what it returned on each rank, and its folder as `path`."""
    root = tmp_path_factory.mktemp("fsdp")
    found: dict[str, Any] = {"path": root}
    plain = {"kind": None, "rows": 4, "save_total_limit": 10, "max_steps": 6}
    found["single"] = trained(str(root / "single"), **plain)
    convert_checkpoint(root / "single" / "checkpoint-2", root / "there" / "checkpoint-2", to="fsdp2")
    calls = {
        name: {"folder": str(root / name), "mode": mode, "lazy": lazy, "kind": kind}
        for name, (mode, lazy, kind) in RUNS.items()
    }
    for name in ("lazy", "whole"):  # by a stock Trainer
        resumed = {"resume": str(root / name / "checkpoint-2"), "mode": None, "lazy": False, "save_strategy": "no"}
        calls[f"resumed {name}"] = {**calls[name], **resumed}
    calls["meddled"] = {"folder": str(root / "meddled"), "lazy": True, "meddling": True}
    calls["there"] = {"folder": str(root / "there"), "resume": str(root / "there" / "checkpoint-2")}
    found |= {name: [] for name in calls}
    for rank in run_distributed(on_engine, 2, calls):
        for name, outcome in rank.items():
            found[name].append(outcome)
    convert_checkpoint(root / "there" / "checkpoint-4", root / "back" / "checkpoint-4", to="single")
    found["back"] = trained(str(root / "back"), None, resume=str(root / "back" / "checkpoint-4"), **plain)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.distcp")}


@pytest.mark.parametrize("name", ["eager", "lazy"])
def test_shards_are_those_of_stock_to_the_byte(runs: dict[str, Any], name: str) -> None:
    for step in (2, 4):
        ours, stock = (runs["path"] / run / f"checkpoint-{step}" for run in (name, "stock"))
        assert files_of(ours) == files_of(stock) and len(files_of(ours)) == 4
        report = verify_checkpoint(ours)
        assert report.whole and report.sealed
        assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= set(read_manifest(ours)["files"])
    for state in ("pytorch_model_fsdp_0", "optimizer_0"):
        metadata = [dcp_files._Reader(folder / state).read_metadata() for folder in (ours, stock)]
        assert metadata[0].state_dict_metadata == metadata[1].state_dict_metadata != {}
        assert metadata[0].storage_data == metadata[1].storage_data != {}
    assert runs[name][0]["planned"] == 2, "once for the weights and once for the optimizer, not at each save"
    assert [path.name for path in sorted((runs["path"] / name).iterdir()) if path.name.startswith(".")] == []
    for rank in (0, 1):
        assert_bitwise_equal(runs[name][rank]["weights"], runs["stock"][rank]["weights"])


def test_shards_wait_for_the_thread_that_copies_and_gathered_states_do_not(runs: dict[str, Any]) -> None:
    # In fp64 the weights under every name, of the tied one under both; two states of Adam, and `step` in fp32, once.
    weights = runs["stock"][0]["weights"]
    states = [tensor for name, tensor in weights.items() if name != "lm_head.weight"]
    total = sum(tensor.nbytes for tensor in weights.values()) + sum(2 * tensor.nbytes + 4 for tensor in states)
    for save in (0, 1):
        # Both processes have the `step`s, and one of them writes each.
        assert sum(rank["waiting"][save] for rank in runs["lazy"]) == total
        gathered = [4 * len(states), 0]  # of a gathered state only `step` is the optimizer's own memory
        assert [rank["waiting"][save] for rank in (*runs["eager"], *runs["whole"])] == [0, 0, *gathered]


@pytest.mark.parametrize("name", ["lazy", "whole"])
def test_a_stock_trainer_goes_on_from_it_to_the_bit(runs: dict[str, Any], name: str) -> None:
    folder = runs["path"] / name / "checkpoint-2"
    kind = {"lazy": "optimizer_0/.metadata", "whole": "optimizer.bin"}[name]
    assert kind in read_manifest(folder)["files"] and verify_checkpoint(folder).whole
    assert_bitwise_equal(runs[f"resumed {name}"][0]["weights"], runs["stock"][0]["weights"])


def test_lazy_under_ddp_where_one_process_writes(tmp_path: Path) -> None:
    first, second = run_distributed(trained, 2, str(tmp_path), "thread", True, None)
    assert min(first["waiting"]) > 0 and second["waiting"] == [0, 0]
    reports = list_checkpoints(tmp_path, "content")
    assert [(report.step, report.whole, report.sealed) for report in reports] == [(2, True, True), (4, True, True)]
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert_bitwise_equal(saved, {name: first["weights"][name] for name in saved})
    names = read_manifest(tmp_path / "checkpoint-4")["optimizer_parameters"]
    assert {name for group in names for name in group} == set(saved)


def test_on_another_number_of_processes(runs: dict[str, Any], tmp_path: Path) -> None:
    resume = str(runs["path"] / "lazy" / "checkpoint-2")
    call = {"folder": str(tmp_path), "resume": resume, "mode": "thread", "rows": 4}
    (found,) = run_distributed(on_engine, 1, {"one": call}, 1)
    for name, weight in runs["stock"][0]["weights"].items():
        torch.testing.assert_close(found["one"]["weights"][name], weight, rtol=0, atol=1e-9)
    report = verify_checkpoint(tmp_path / "checkpoint-4")
    assert report.whole and report.sealed and len(files_of(report.path)) == 2, "one process saves as one"


def test_one_process_to_two_of_fsdp2_and_back(runs: dict[str, Any]) -> None:
    whole = runs["single"]["weights"]
    for name, weight in runs["back"]["weights"].items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-9)
    assert runs["back"]["weights"].keys() == whole.keys()
    assert runs["there"][0]["planned"] == 2
    for layout in ("there/checkpoint-2", "back/checkpoint-4"):
        report = verify_checkpoint(runs["path"] / layout)
        assert report.whole and report.sealed


def test_what_is_converted_and_converted_back_is_what_it_was(runs: dict[str, Any], tmp_path: Path) -> None:
    first = runs["path"] / "single" / "checkpoint-2"
    back = convert_checkpoint(runs["path"] / "there" / "checkpoint-2", tmp_path / "checkpoint-2", to="single")
    optimizers = [torch.load(folder / "optimizer.pt") for folder in (first, back)]
    assert str(optimizers[0]["param_groups"]) == str(optimizers[1]["param_groups"])
    assert list(optimizers[0]["state"]) == list(optimizers[1]["state"]) != []
    for number, values in optimizers[0]["state"].items():
        for key, value in values.items():
            assert torch.equal(value, optimizers[1]["state"][number][key]), (number, key)
    weights = load_file(back / "model.safetensors")
    for name, weight in load_file(first / "model.safetensors").items():
        assert torch.equal(weight, weights[name])
    for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"):
        assert (back / name).read_bytes() == (first / name).read_bytes()


def test_a_copy_that_one_process_cannot_answer_for_fails_on_all(runs: dict[str, Any]) -> None:
    reports = list_checkpoints(runs["path"] / "meddled", "content")
    assert [(report.step, report.whole) for report in reports] == [(4, True)]
    assert [path.name for path in (runs["path"] / "meddled").iterdir()] == ["checkpoint-4"]


def killed(folder: Path, **over: Any) -> None:
    """Train on two processes that are killed, both once one is."""
    module, name, file = reference_to(on_engine)
    job = {
        "module": module,
        "name": name,
        "file": file,
        "args": ({"run": {"folder": str(folder), **over}},),
        "kwargs": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        children = Children(job, 2, Path(directory))
        try:
            with pytest.raises(ChildFailure, match="exit codes"):
                children.wait(240)
        finally:
            children.kill()


def test_a_killed_process_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    killed(tmp_path, mode="thread", phase="write")
    assert find_resumable(tmp_path).path == tmp_path / "checkpoint-2"
    assert all(report.whole for report in list_checkpoints(tmp_path, "content"))


def test_processes_that_write_outlive_trainers_that_are_killed(runs: dict[str, Any], tmp_path: Path) -> None:
    killed(tmp_path, mode="process", phase="after")
    repair_run_dir(tmp_path)  # waits for whoever still writes
    assert find_resumable(tmp_path).path == tmp_path / "checkpoint-2"
    assert files_of(tmp_path / "checkpoint-2") == files_of(runs["path"] / "stock" / "checkpoint-2") != {}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("optimizer_0/.metadata", "optimizer_0/.metadata is missing, as where not every process"),
        ("optimizer_0/__1_0.distcp", "optimizer_0/__1_0.distcp is missing, which its .metadata names"),
        ("pytorch_model_fsdp_0", "pytorch_model_fsdp_0 is missing"),
        ("cut optimizer_0/.metadata", "optimizer_0/.metadata ends early or is damaged"),
        ("cut pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp ends early ("),
    ],
)
def test_what_is_missing_of_a_checkpoint_without_a_manifest(
    runs: dict[str, Any], tmp_path: Path, harm: str, message: str
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(runs["path"] / "stock" / "checkpoint-2", folder)
    assert verify_checkpoint(folder).problem is None
    path = folder / harm.removeprefix("cut ")
    if harm.startswith("cut"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert message in (verify_checkpoint(folder, "size").problem or "")
    assert find_resumable(tmp_path).path is None
