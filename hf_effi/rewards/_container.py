"""Programs in containers: a command of the user's, with limits on time and output around it."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from . import _kernel as kernel
from ._worker import Blobs, read_bounded

_PLACES = ("{folder}", "{name}", "{memory_bytes}", "{processes}")


class Container:
    """
    A template of a command, see `container` in [`Sandbox`].

    Args:
        command, stop: As there.
    """

    def __init__(self, command: Sequence[str], stop: Sequence[str] | None) -> None:
        for name, value in (("container", command), ("container_stop", stop or [])):
            if isinstance(value, str) or not all(isinstance(part, str) for part in value):
                raise TypeError(f"{name}={value!r} must be a list of texts, such as ['podman', 'run', ...].")
        if not any("{folder}" in part for part in command):
            raise ValueError(
                f"container={list(command)!r} must have '{{folder}}', where the files of a program are, such as in "
                "'--volume={folder}:/box'."
            )
        if stop is not None and not any("{name}" in part for part in stop):
            raise ValueError(
                f"container_stop={list(stop)!r} must have '{{name}}', as container= must where it starts one."
            )
        if stop is not None and not any("{name}" in part for part in command):
            raise ValueError("container_stop= ends a container by its name: container= must have '{name}' too.")
        self.command, self.stop = tuple(command), None if stop is None else tuple(stop)

    def __str__(self) -> str:
        return " ".join(self.command)

    def run(self, request: dict[str, Any], blobs: Blobs) -> tuple[dict[str, Any], Blobs]:
        """Run one program; the arguments and the result are those of `Worker.run`."""
        limits = request["limits"]
        with tempfile.TemporaryDirectory(prefix="hf_effi-container-", ignore_cleanup_errors=True) as folder:
            os.chmod(folder, 0o777)  # a container may run as any user
            kernel.write_files(
                folder,
                {name.removeprefix("file:"): blob for name, blob in blobs.items() if name.startswith("file:")},
                os.getuid(),
            )
            values = (folder, f"hf_effi-{secrets.token_hex(8)}", str(limits["memory_bytes"]), str(limits["processes"]))
            answer, found = self._watch(
                [*_filled(self.command, values), *request["argv"]], blobs["stdin"], limits, values
            )
            if request["keep"] and answer["status"] == 0 and not answer["stopped"]:
                try:
                    kept = kernel.read_files(folder, limits["folder_bytes"] // 2)
                except (ValueError, OSError, RecursionError) as error:
                    return {**answer, "not_kept": f"the folder cannot be kept: {error}"}, found
                found.update({f"file:{name}": blob for name, blob in kept.items()})
            return answer, found

    def _watch(
        self, argv: list[str], stdin: bytes, limits: dict[str, Any], values: tuple[str, ...]
    ) -> tuple[dict[str, Any], Blobs]:
        report, held = os.pipe()  # closed when the command has ended
        started = time.monotonic()
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(held,),
                    start_new_session=True,
                )
            except OSError as error:
                os.close(report)
                raise OSError(f"the container's command could not be started: {error}") from error
            finally:
                os.close(held)
        with process:
            pipes = (process.stdout.fileno(), process.stderr.fileno(), report)  # type: ignore[union-attr]
            try:
                stopped, (out, err, _) = read_bounded(
                    limits, pipes, lambda: self._end(process, values), lambda: _kill(process)
                )
            finally:
                _kill(process)
                os.close(report)
        answer = {
            "status": process.returncode,
            "stopped": stopped,
            "seconds": time.monotonic() - started,
            "cpu_seconds": math.nan,  # that of the command, not of the container
        }
        return answer, {"stdout": out, "stderr": err}

    def _end(self, process: subprocess.Popen[bytes], values: tuple[str, ...]) -> None:
        if self.stop is not None:
            subprocess.run(_filled(self.stop, values), capture_output=True, timeout=60, check=False)
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _filled(command: Sequence[str], values: tuple[str, ...]) -> list[str]:
    filled = []
    for part in command:
        for place, value in zip(_PLACES, values, strict=True):
            part = part.replace(place, value)
        filled.append(part)
    return filled
