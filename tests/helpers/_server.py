"""
What a server of children runs: `python -m tests.helpers._server <file descriptor> <0 or 1: preload>`; see
`servers.py`.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import _child
from .collectives import watch_collectives


def preload() -> None:
    """Import what most children need, and nothing that reads a variable which a child may set before it imports it."""
    import torch

    torch.set_num_threads(1)
    watch_collectives()  # before others take the functions by name
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from accelerate.utils import is_deepspeed_available
    from transformers import Trainer, TrainingArguments  # noqa: F401
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: F401

    import hf_effi
    import tests.helpers

    if is_deepspeed_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # as the children that use it have it
        import deepspeed  # noqa: F401  every trainer imports it where it is installed, a quarter of a second each time

    for module in (hf_effi, tests.helpers):
        for name in module.__all__:
            getattr(module, name)
    _check_that_forks_are_safe()
    # What lives now lives in every child: its collector need not walk it, nor touch, and so copy, its pages.
    gc.collect()
    gc.freeze()


def _check_that_forks_are_safe() -> None:
    """Raise where a fork would lose a thread or share a CUDA context or a process group."""
    import torch

    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else ["python"]
    if len(names) > 1:
        raise RuntimeError(f"an import has started threads, which a fork would lose: {sorted(names)}.")
    if torch.cuda.is_initialized():
        raise RuntimeError("an import has initialised CUDA, which a forked process cannot use.")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RuntimeError("an import has made a process group, which a fork would share.")


def serve(connection: Connection) -> tuple[Path, int]:
    """
    Fork a child for each request and report its id and its exit code; only children return, with their job.

    They return to where a fresh interpreter starts, and end as it does: with a traceback, exit code and `atexit`.
    """
    running: dict[int, int] = {}
    while True:
        if connection.poll(0.02 if running else None):
            try:
                number, *request = connection.recv()
            except EOFError:
                _end(running)
            pid = _fork()
            if not pid:
                connection.close()
                return _become(*request)
            running[pid] = number
            _report(connection, running, "started", number, pid)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _report(connection, running, "ended", running.pop(pid), os.waitstatus_to_exitcode(status))


def _report(connection: Connection, running: dict[int, int], *event: Any) -> None:
    try:
        connection.send(event)
    except OSError:  # the tests have ended
        _end(running)


def _end(running: dict[int, int]) -> None:
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    sys.exit()


def _fork() -> int:
    """Fork, and return in the parent once the child leads a session of its own, so that its group can be killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        os.read(read, 1)
        os.close(read)
        return pid
    os.setsid()
    os.close(read)
    os.close(write)
    return 0


def _become(directory: str, rank: int, env: dict[str, str], cwd: str, output: str) -> tuple[Path, int]:
    """Take the output, the variables and the folder of one job, and random states that no other child has."""
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    import numpy

    numpy.random.seed()  # Python's own is seeded anew by the fork
    return Path(directory), rank


if __name__ == "__main__":
    if sys.argv[2] == "1":
        preload()
    _child.main(*serve(Connection(int(sys.argv[1]))))
