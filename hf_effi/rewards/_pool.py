"""The workers of a sandbox, seen from the trainer."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import queue
import shutil
import subprocess
import tempfile
import time
import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ._isolation import probe_isolation, shown_to_programs, worker_command
from ._program import ProgramResult, result_of
from ._worker import Blobs, pack, read_message, write_all

if TYPE_CHECKING:
    from .sandbox import Sandbox

#: seconds that a worker has beyond the limit of a program, until it counts as hung
_PATIENCE = 20.0


class Pool:
    """The workers of one process, and as many threads that wait for them."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.container, self.config = sandbox.container, {}
        self.folder = ""
        if sandbox.container is None:
            isolation = probe_isolation(sandbox.readable)
            if not isolation.private_root:
                self.folder = tempfile.mkdtemp(prefix="hf_effi-sandbox-")
                os.chmod(self.folder, 0o711)  # each program's folder in it is its own
            self.config = {
                **asdict(isolation),
                "readable": shown_to_programs(sandbox.readable),
                "folder": self.folder,
            }
        self.free: queue.LifoQueue[Client | None] = queue.LifoQueue()
        for _ in range(sandbox.workers):
            self.free.put(None)
        self.threads = concurrent.futures.ThreadPoolExecutor(sandbox.workers, "hf_effi-sandbox")
        self._clients: list[Client] = []
        self._end = weakref.finalize(self, _end_pool, self.threads, self._clients, self.folder, os.getpid())

    def submit(self, request: dict[str, Any], blobs: Blobs) -> concurrent.futures.Future[ProgramResult]:
        return self.threads.submit(self._run, request, blobs)

    def _run(self, request: dict[str, Any], blobs: Blobs) -> ProgramResult:
        if self.container is not None:
            return result_of(*self.container.run(request, blobs))
        client = self.free.get()
        try:
            for _ in range(2):
                if client is None:
                    client = Client(self.config)
                    self._clients.append(client)
                answer = client.ask(request, blobs)
                if answer is not None:
                    return result_of(*answer)
                client.close()
                self._clients.remove(client)
                client = None
            return ProgramResult("lost", message="its worker died twice, or did not answer")
        finally:
            self.free.put(client)

    def close(self) -> None:
        self._end()


def _end_pool(threads: concurrent.futures.ThreadPoolExecutor, clients: list[Client], folder: str, owner: int) -> None:
    if os.getpid() != owner:
        return
    threads.shutdown(wait=True, cancel_futures=True)
    for client in clients:
        client.close()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


class Client:
    """One worker, seen from the trainer."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            worker_command("_worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={},
            cwd="/",
        )
        answer = self._ask(config, {}, 60.0)
        if answer is None or "ready" not in answer[0]:
            self.close()
            told = "it did not start" if answer is None else answer[0]["failed"]
            raise OSError(f"a worker of the sandbox could not be set up: {told}.")

    def ask(self, request: dict[str, Any], blobs: Blobs) -> tuple[dict[str, Any], Blobs] | None:
        """Return what the worker says of a program, `None` where it does not say anything."""
        answer = self._ask(request, blobs, request["limits"]["wall_seconds"] + _PATIENCE)
        if answer is not None and "setup" in answer[0]:
            raise OSError(f"the sandbox of a program could not be set up: {answer[0]['setup']}.")
        return answer if answer is not None and ("status" in answer[0] or answer[0]["stopped"]) else None

    def _ask(self, message: dict[str, Any], blobs: Blobs, seconds: float) -> tuple[dict[str, Any], Blobs] | None:
        if self.process.stdin is None or self.process.stdout is None:
            return None
        answer = None
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, no answer in time, or a closed one
            write_all(self.process.stdin.fileno(), pack(message, blobs))
            answer = read_message(self.process.stdout.fileno(), time.monotonic() + seconds)
        return answer

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
