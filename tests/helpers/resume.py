"""Kill a training run for real, start it again, and see what it ends with."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .distributed import Children, reference_to


def weights_in(directory: str | Path) -> dict[str, Any]:
    """Return the tensors of `model.safetensors` in a folder that `save_model` or a checkpoint wrote."""
    from safetensors.torch import load_file

    return load_file(Path(directory) / "model.safetensors")


def _job(
    target: Callable[..., Any] | str | Path, output_dir: str, resume: bool, args: Sequence[Any]
) -> dict[str, Any]:
    if callable(target):
        module, name, file = reference_to(target)
        return {"module": module, "name": name, "file": file, "args": (output_dir, resume, *args), "kwargs": {}}
    script_args = ["--output_dir", output_dir, *map(str, args)]
    if resume:
        script_args += ["--resume_from_checkpoint", "True"]
    return {"script": str(target), "args": script_args}


def run_in_child(
    target: Callable[..., Any] | str | Path,
    output_dir: str | Path,
    *args: Any,
    resume: bool = False,
    world_size: int = 1,
    timeout: float = 240.0,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> Any:
    """
    Run the same target once in a process of its own, uninterrupted; arguments as in [`kill_and_resume`].

    It is forked from an interpreter that has imported torch and the rest, and is one of its own with `fresh=True`.
    """
    with tempfile.TemporaryDirectory(prefix="hf_effi_run_") as directory:
        job = _job(target, str(output_dir), resume, args)
        children = Children(job, world_size, Path(directory), env, fresh)
        try:
            children.wait(timeout)
            return children.results()[0] if callable(target) else weights_in(output_dir)
        finally:
            children.kill()


def kill_and_resume(
    target: Callable[..., Any] | str | Path,
    output_dir: str | Path,
    *args: Any,
    kill_after_checkpoint: int,
    extra_steps: int = 0,
    world_size: int = 1,
    timeout: float = 240.0,
    env: Mapping[str, str] | None = None,
) -> Any:
    """
    Start a training run, SIGKILL it once `checkpoint-<k>` is complete, start it again from there, return its result.

    The child stops at the chosen point by itself and the SIGKILL comes from outside, so the run is cut at exactly this
    step, however fast or slow the machine is. Both runs are processes of their own, as after a crash: they
    share nothing but what they import.

    Args:
        target (`Callable`, `str` or `Path`):
            A top-level function `function(output_dir, resume, *args)` that builds its trainer, calls
            `trainer.train(resume_from_checkpoint=resume or None)` and returns something picklable, such as
            `record_run(trainer)`. Or the path of a script that takes `--output_dir` and `--resume_from_checkpoint` and
            leaves `model.safetensors` in the output folder.
        output_dir (`str` or `Path`):
            Where the run saves its checkpoints.
        kill_after_checkpoint (`int`):
            The step `k` whose checkpoint has to be complete.
        extra_steps (`int`, *optional*, defaults to 0):
            Steps to train on after that checkpoint before the kill: work that the resumed run must do again.
        world_size (`int`, *optional*, defaults to 1):
            Ranks; all are killed. The value of rank 0 is returned.

    Raises:
        AssertionError: the run ended before it reached the point, or left no checkpoint.
    """
    job = _job(target, str(output_dir), False, args)
    job["stop_after"] = (kill_after_checkpoint, extra_steps)
    with tempfile.TemporaryDirectory(prefix="hf_effi_kill_") as directory:
        stopped = [Path(directory) / f"stopped{rank}" for rank in range(world_size)]
        children = Children(job, world_size, Path(directory), env)
        try:
            children.wait(timeout, until=lambda: all(path.exists() for path in stopped))
            if not all(path.exists() for path in stopped):
                raise children.failure(f"the run ended before step {kill_after_checkpoint + extra_steps}")
        finally:
            children.kill()
        codes = [process.returncode for process in children.processes]
        if codes != [-signal.SIGKILL] * world_size:
            raise AssertionError(f"the ranks were not killed by SIGKILL: exit codes {codes}.")
    state = Path(output_dir) / f"checkpoint-{kill_after_checkpoint}" / "trainer_state.json"
    if not state.exists():
        raise AssertionError(f"the killed run left no {state.parent.name} in its output folder.")
    how = {"world_size": world_size, "timeout": timeout, "env": env}
    return run_in_child(target, output_dir, *args, resume=True, **how)
