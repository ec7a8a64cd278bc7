"""
`examples/scale_out`: two roles, and two machines, started by the launch file that people run on GPUs.

A CPU needs three things, and the files of the example stay as they are: a `vllm` on the path that is our own server,
the shims of `on_cpu.py` around the training script, and fp32.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engines._vllm_runs import tiny_model
from tests.helpers import assert_bitwise_equal, prompt_dataset, save_tiny, tiny_tokenizer
from tests.helpers.distributed import ROOT, child_environment
from tests.helpers.vllm_server import free_port

EXAMPLE = ROOT / "examples" / "scale_out"
#: the engine's name in `launch.sh` -> what `on_cpu.py` calls it
ENGINES = {"ddp": "ddp", "deepspeed": "zero3", "fsdp2": "fsdp2"}
UPDATES = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A model, prompts and a `vllm`."""
    folder = tmp_path_factory.mktemp("scale_out")
    save_tiny(tiny_model(), tiny_tokenizer(), folder / "model")
    (folder / "data").mkdir()
    prompt_dataset(16).to_json(folder / "data" / "train.jsonl")
    (folder / "bin").mkdir()
    vllm = folder / "bin" / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.engines.tiny_vllm "$@"\n')
    vllm.chmod(0o755)
    return folder


@contextlib.contextmanager
def started(place: Path, name: str, engine: str, options: str = "", **environment: Any) -> Iterator[Any]:
    """`launch.sh` in a session of its own, which ends with the context; its output is in the file `NAME.log`."""
    environment = {
        "MODEL": place / "model",
        "ENGINE": engine,
        "LAUNCH_OPTIONS": f"--mixed_precision no {options}",
        "MAIN_PORT": free_port(),
        "SERVER_PORT": free_port(),
        "GROUP_PORT": free_port(),
        "SERVER_LOG": place / f"{name}.vllm.log",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
        "PATH": f"{place / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **environment,
    }
    settings: Mapping[str, Any] = {
        "dataset": place / "data",
        "reward": "tests.helpers.binary_hash_reward",
        "output_dir": place / name,
        "max_steps": UPDATES,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
        "gradient_checkpointing": "false",
        "bf16": "false",
        "use_cpu": str(engine == "ddp").lower(),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": "true",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = ["bash", str(EXAMPLE / "launch.sh"), "-m", "tests.engines.on_cpu", ENGINES[engine]]
    with (place / f"{name}.log").open("w") as sink:
        process = subprocess.Popen(
            [*command, str(EXAMPLE / "train.py"), *words, "--difficulty_range", "0", "1", "--prune_rate", "0.5"],
            cwd=ROOT,
            env=child_environment({key: str(value) for key, value in environment.items()}),
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def said(place: Path, name: str) -> str:
    return (place / f"{name}.log").read_text(errors="replace")[-6000:]


def weights(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / name / "model.safetensors")


def run(place: Path, name: str, engine: str, *rest: Any) -> dict[str, torch.Tensor]:
    with started(place, name, engine, *rest) as process:
        assert process.wait(300) == 0, said(place, name)
    return weights(place, name)


@pytest.fixture(scope="module")
def ddp(place: Path) -> dict[str, torch.Tensor]:
    return run(place, "ddp", "ddp")


@pytest.fixture(scope="module")
def zero3(place: Path) -> dict[str, torch.Tensor]:
    return run(place, "zero3", "deepspeed")


def assert_trained(place: Path, name: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-6
    calls = json.loads((place / f"{name}.vllm.log").read_text().splitlines()[-1])
    assert calls.count("/finish_weight_update") == UPDATES <= calls.count("/v1/completions")


def test_ddp_moves_every_weight(place: Path, ddp: dict[str, torch.Tensor]) -> None:
    assert_trained(place, "ddp", ddp, ddp)
    start = tiny_model().state_dict()
    assert not [name for name, weight in ddp.items() if torch.equal(weight, start[name])]


def test_zero3_with_a_server_trains_as_ddp(place: Path, ddp: Any, zero3: Any) -> None:
    assert_trained(place, "zero3", zero3, ddp)


def test_zero2_with_a_server_trains_as_ddp(place: Path, ddp: Any) -> None:
    assert_trained(place, "zero2", run(place, "zero2", "deepspeed", "--zero_stage 2"), ddp)


def test_fsdp2_with_a_server_trains_as_ddp(place: Path, ddp: Any) -> None:
    assert_trained(place, "fsdp2", run(place, "fsdp2", "fsdp2"), ddp)


def test_two_machines_train_as_two_processes_of_one(place: Path, zero3: Any) -> None:
    """Of one process each, both on this machine; only the first one serves."""
    ports = {"MAIN_PORT": free_port(), "MACHINES": 2, "PROCESSES": 1}
    with (
        started(place, "machine0", "deepspeed", MACHINE_RANK=0, **ports) as first,
        started(place, "machine1", "deepspeed", MACHINE_RANK=1, **ports) as second,
    ):
        assert first.wait(300) == 0, said(place, "machine0")
        assert second.wait(60) == 0, said(place, "machine1")
    assert_bitwise_equal(weights(place, "machine0"), zero3)
    assert not (place / "machine1.vllm.log").exists() and not (place / "machine1" / "model.safetensors").exists()


def test_a_server_that_does_not_start_is_reported_with_its_log(place: Path) -> None:
    with started(place, "refused", "deepspeed", SERVER_OPTIONS="--no-such-flag") as process:
        assert process.wait(120) == 1
    told = said(place, "refused")
    assert "unrecognized arguments: --no-such-flag" in told and "vllm serve ended before it was ready" in told
