"""A real vLLM for CPUs in a process of its own, for the tests of `make test-vllm`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

from .distributed import child_environment
from .vllm_server import free_port

#: of every process of vLLM: one thread, one GiB of KV cache, nothing sent anywhere
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class RealServer:
    """
    `vllm serve` as TRL's guide says, with the backend `gloo` in place of `nccl`. Use it as a context manager.

    Args:
        model (`str`): Folder of model and tokenizer.
        log (`Path`): Where its output goes.
        timeout (`float`, *optional*, defaults to 900): Seconds until it must answer.
    """

    def __init__(self, model: str, log: Path, timeout: float = 900.0) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
        command += ["--gpu-memory-utilization", "0.1", "--max-logprobs", "-1", "--enable-scale-out"]
        command += ["--logprobs-mode", "processed_logprobs"]
        command += ["--weight-transfer-config", json.dumps({"backend": "gloo"})]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                env=child_environment(ENVIRONMENT),
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self._wait(timeout)
        except BaseException:
            self.kill()
            raise

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(requests.exceptions.ConnectionError):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                state = f"ended with code {self.process.poll()}" if self.process.poll() is not None else "is not up"
                text = self.log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"vllm serve {state} after {timeout:g} s at most. Its output ends with:\n{text}")
            time.sleep(0.5)

    @property
    def group_port(self) -> int:
        """For `vllm_group_port`: each trainer opens a group of its own."""
        return free_port()

    def kill(self) -> None:
        """SIGKILL vLLM with all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> RealServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
