"""
`examples/scale_out`: two roles, and two machines, started by the launch file that people run on GPUs.

The files of the example stay as they are. A CPU needs three things: a `vllm` on the path that is our own server, the
shims of `on_cpu.py` around the training script, and fp32.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engines._vllm_runs import tiny_model
from tests.helpers import assert_bitwise_equal, prompt_dataset, run_distributed, save_tiny, tiny_tokenizer
from tests.helpers.distributed import ROOT, child_environment
from tests.helpers.vllm_server import free_port

EXAMPLE = ROOT / "examples" / "scale_out"
#: the engine's name in `launch.sh` -> what `on_cpu.py` calls it
ENGINES = {"ddp": "ddp", "deepspeed": "zero3", "fsdp2": "fsdp2"}
UPDATES = 3


#: command -> what stands in for it: our own server, and a SLURM whose two machines are both this one
STAND_INS = {
    "vllm": f'exec {shlex.quote(sys.executable)} -m tests.engines.tiny_vllm "$@"',
    "srun": 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!',
    "scontrol": 'echo "$3" | tr , "\\n"',
}


def furnish(folder: Path, programs: Mapping[str, str] = STAND_INS) -> Path:
    """A model, prompts, and commands that come first on the path."""
    save_tiny(tiny_model(), tiny_tokenizer(), folder / "model")
    (folder / "data").mkdir()
    prompt_dataset(16).to_json(folder / "data" / "train.jsonl")
    (folder / "bin").mkdir()
    for name, line in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    return furnish(tmp_path_factory.mktemp("scale_out"))


@contextlib.contextmanager
def started(
    place: Path, name: str, engine: str, options: str = "", file: str = "launch.sh", **environment: Any
) -> Iterator[Any]:
    """A launch file in a session of its own, which ends with the context; its output is in `NAME.log`."""
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
    settings: dict[str, Any] = {
        "dataset": place / "data",
        "reward": "tests.helpers.binary_hash_reward",
        "output_dir": place / name,
        "max_steps": UPDATES,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        # At 1e-8 Adam makes a whole step of the rounding of a gradient that is nearly zero.
        "adam_epsilon": 1e-4,
        "activation_checkpointing": "false",
        "bf16": "false",
        "use_cpu": str(engine == "ddp").lower(),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": "true",
        "prune_rate": 0.5,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = ["bash", str(EXAMPLE / file), "-m", "tests.engines.on_cpu", ENGINES[engine]]
    with (place / f"{name}.log").open("w") as sink:
        process = subprocess.Popen(
            [*command, str(EXAMPLE / "train.py"), *words, "--difficulty_range", "0", "1"],
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
                os.killpg(
                    process.pid, signal.SIGTERM
                )  # the launchers end their workers, which have groups of their own
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def said(place: Path, name: str) -> str:
    return (place / f"{name}.log").read_text(errors="replace")


@dataclass(frozen=True)
class Run:
    """What a launch left: the saved weights, what the log says, and what the server was asked."""

    weights: dict[str, torch.Tensor]
    log: str
    calls: list[str]

    @property
    def place(self) -> dict[str, Any]:
        """The line that `on_cpu.py` ends with."""
        (line,) = (line for line in self.log.splitlines() if line.startswith('{"kind"'))
        return json.loads(line)


def run(place: Path, name: str, engine: str, *rest: Any, **more: Any) -> Run:
    with started(place, name, engine, *rest, **more) as process:
        assert process.wait(600) == 0, said(place, name)[-6000:]
    calls = json.loads((place / f"{name}.vllm.log").read_text().splitlines()[-1])
    return Run(load_file(place / name / "model.safetensors"), said(place, name), calls)


@pytest.fixture(scope="module")
def ddp(place: Path) -> Run:
    return run(place, "ddp", "ddp")


@pytest.fixture(scope="module")
def zero3(place: Path) -> Run:
    return run(place, "zero3", "deepspeed")


def assert_trained_as(found: Run, expected: Run) -> None:
    assert found.weights.keys() == expected.weights.keys()
    assert max(float((found.weights[name] - weight).abs().max()) for name, weight in expected.weights.items()) <= 1e-6
    assert found.calls.count("/finish_weight_update") == UPDATES < found.calls.count("/v1/completions"), "no refill"
    assert found.calls == expected.calls


def test_the_methods_act_and_every_weight_moves(ddp: Run) -> None:
    assert ddp.place == {"kind": "MULTI_CPU", "zero_stage": None, "processes_here": 2}
    start = tiny_model().state_dict()
    assert not [name for name, weight in ddp.weights.items() if torch.equal(weight, start[name])]
    assert "'effi/dropped/pruned': '8'" in ddp.log and "'effi/gen_rounds': '2'" in ddp.log


def test_zero3_with_a_server_trains_as_ddp(ddp: Run, zero3: Run) -> None:
    assert zero3.place == {"kind": "DEEPSPEED", "zero_stage": 3, "processes_here": 2}
    assert_trained_as(zero3, ddp)


def test_zero2_with_a_server_trains_as_ddp(place: Path, ddp: Run) -> None:
    found = run(place, "zero2", "deepspeed", "--zero_stage 2")
    assert found.place == {"kind": "DEEPSPEED", "zero_stage": 2, "processes_here": 2}
    assert_trained_as(found, ddp)


def test_fsdp2_with_a_server_trains_as_ddp(place: Path, ddp: Run) -> None:
    found = run(place, "fsdp2", "fsdp2")
    assert found.place == {"kind": "FSDP", "zero_stage": None, "processes_here": 2}
    assert_trained_as(found, ddp)


def test_two_machines_train_as_two_processes_of_one(place: Path, zero3: Run) -> None:
    """Of one process each, both on this machine, started by `slurm.sh` with stand-ins for `srun` and `scontrol`."""
    job = {"SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "localhost,other", "PROCESSES": 1, "TRAINER_GPUS": 0}
    found = run(place, "slurm", "deepspeed", file="slurm.sh", **job)
    assert found.place == {"kind": "DEEPSPEED", "zero_stage": 3, "processes_here": 1}
    assert_bitwise_equal(found.weights, zero3.weights)
    assert found.calls == zero3.calls, "the second machine has started a server, or asked the first one's"


def test_a_server_that_does_not_start_is_reported_with_its_log(place: Path) -> None:
    with started(place, "refused", "deepspeed", SERVER_OPTIONS="--no-such-flag") as process:
        assert process.wait(120) == 1
    told = said(place, "refused")
    assert "unrecognized arguments: --no-such-flag" in told and "vllm serve ended before it was ready" in told


# --- Ray -------------------------------------------------------------------------------------------------------------


def without_ray(folder: str) -> None:
    train = runpy.run_path(str(EXAMPLE / "ray_train.py"))["train"]
    train({"model": None, "max_steps": 3, "output_dir": folder})


def test_two_workers_of_ray_train_as_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[train]'")
    command = [sys.executable, str(EXAMPLE / "ray_train.py"), "--output-dir", str(tmp_path / "ray")]
    environment = child_environment({"RAY_USAGE_STATS_ENABLED": "0"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "3 steps on 2 workers" in done.stdout
    run_distributed(without_ray, 2, str(tmp_path / "plain"))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ray", "plain"))
    assert_bitwise_equal(found, expected)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_tests_that_exist() -> None:
    """And the files of the example stay short."""
    page = (ROOT / "docs" / "scale_out.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests/\w+/)?test_\w+\.py)`", page))
    assert len(named) > 10
    for file in named:
        assert (ROOT / file if "/" in file else ROOT / "tests" / "engines" / file).exists(), file
    for path in EXAMPLE.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80 and path.name in page, path.name
