"""What a child process of the test kit runs: `python -m tests.helpers._child <directory> <rank>`."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def _load(module: str, name: str, file: str) -> Any:
    """Import the function by module name, or by file where the module is not importable (`__main__`, a script)."""
    if module != "__main__":
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
                raise
    alias = "hf_effi_child_target"
    spec = importlib.util.spec_from_file_location(alias, file)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[alias] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def _stop_here(directory: Path, rank: int) -> None:
    """Say that the point was reached, then wait for the SIGKILL from outside."""
    (directory / f"stopped{rank}").touch()
    time.sleep(3600)
    raise RuntimeError("nobody killed this process.")


def _stop_after_checkpoint(directory: Path, rank: int, checkpoint: int, extra_steps: int) -> None:
    """
    Make every trainer of this process stop, for good, once checkpoint `checkpoint` is complete.

    `CallbackHandler.on_save` runs at the end of `Trainer._maybe_log_save_evaluate`, after `_save_checkpoint` of the
    most derived class has returned, and its own callbacks have run. It is the first moment at which a checkpoint is
    whole.
    """
    from transformers.trainer_callback import CallbackHandler

    event = "on_step_begin" if extra_steps else "on_save"
    original = getattr(CallbackHandler, event)

    def stopping(self: Any, args: Any, state: Any, control: Any) -> Any:
        control = original(self, args, state, control)
        if state.global_step >= checkpoint + extra_steps:
            _stop_here(directory, rank)
        return control

    setattr(CallbackHandler, event, stopping)


def main(directory: Path, rank: int) -> None:
    import torch

    from .collectives import record_collectives

    torch.set_num_threads(1)
    record_collectives(directory / f"collectives{rank}.txt")  # before others take the functions by name
    job = pickle.loads((directory / "job.pickle").read_bytes())
    if job.get("stop_after") is not None:
        _stop_after_checkpoint(directory, rank, *job["stop_after"])
    if job.get("script"):
        sys.argv = [job["script"], *job["args"]]
        runpy.run_path(job["script"], run_name="__main__")
        value = None
    else:
        value = _load(job["module"], job["name"], job["file"])(*job["args"], **job["kwargs"])
    (directory / f"result{rank}.pickle").write_bytes(pickle.dumps(value))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Leave together: a rank whose peer closes the connection first can abort in its own tear-down.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
