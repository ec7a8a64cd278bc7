"""Uploads beside training, each in a process of its own: retried, bounded in time, and never an error of the run."""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, get_token

from .._run_record import redact
from ..errors import HubRefusedError

logger = logging.getLogger(__name__)
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]
_LONGEST_PAUSE = 120.0


@dataclass(frozen=True)
class _Job:
    folder: Path | None
    message: str = ""
    ignore: tuple[str, ...] = ()
    temporary: bool = False
    done: Future[Any] = field(default_factory=Future)


class HubUploader:
    """
    Upload folders to one repository, one after the other, while training goes on.

    An upload runs in a process of its own, so that a server that never answers can be left behind, also when Python
    ends. What may work later (no connection, 408, 409, 425, 429 and 5xx) is tried again with growing pauses, or after
    the pause that the server asks for; what will not (401, 403, 404, a full disk) is not. A failure is logged as an
    error and kept in `failure`; it never raises. The token goes to the process through a pipe and is in no message.

    Args:
        repo_id (`str`): `user/name`, or `name` for a repository of the token's owner.
        token (`str`, *optional*): Write token; that of `hf auth login` or `HF_TOKEN` without it.
        private (`bool`, *optional*): Of a repository that is created.
        revision (`str`, *optional*): Branch to commit to; `main` without it.
        seconds (`float`, *optional*, defaults to 1800): How long one upload may take with all its tries, and how long
            [`~HubUploader.wait`] waits.
        tries (`int`, *optional*, defaults to 5): Tries of one upload.
        pause (`float`, *optional*, defaults to 2): Seconds before the second try; doubled for each further one.
        keep_all (`bool`, *optional*, defaults to `False`): Upload every folder. By default one that waits gives way to
            a newer one.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        seconds: float = 1800.0,
        tries: int = 5,
        pause: float = 2.0,
        keep_all: bool = False,
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds={seconds!r} must be a number above 0: how long an upload may take.")
        if not isinstance(tries, int) or tries < 1:
            raise ValueError(f"tries={tries!r} must be an integer of at least 1.")
        self.repo_id = repo_id
        self.token, self.private, self.revision = token, private, revision
        self.seconds, self.tries, self.pause, self.keep_all = seconds, tries, pause, keep_all
        self.failure: str | None = None
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Condition()
        self._busy = False
        self._stopped = threading.Event()
        self._process: subprocess.Popen[str] | None = None

    def create_repo(self, seconds: float = 60.0) -> None:
        """
        Create the repository if it is missing, before training.

        Raises:
            HubRefusedError: the Hub refuses (token, name, rights). Where it cannot be reached, a warning says that
                the uploads will try again.
        """
        answer = self._try(_Job(None), min(seconds, self.seconds))
        if "error" not in answer:
            self.repo_id = answer["repo_id"]
        elif answer["retry"]:
            logger.warning("The Hub does not answer now; uploads will try again. %s", answer["error"])
        else:
            raise HubRefusedError(f"Cannot push to {self.repo_id!r}: {answer['error']}{_advice(answer)}")

    def submit(
        self, folder: str | Path, message: str, *, ignore: Sequence[str] = (), temporary: bool = False
    ) -> Future[Any]:
        """
        Upload a folder in one commit, in the background.

        Args:
            ignore (`Sequence[str]`, *optional*): Patterns of files to leave out.
            temporary (`bool`, *optional*): Remove the folder afterwards.

        Returns:
            `Future`: Its result is the `CommitInfo`, or `None` where the upload failed, was given up or gave way.
        """
        job = _Job(Path(folder), message, tuple(ignore), temporary)
        job.done.set_running_or_notify_cancel()  # from here on nobody can cancel it, so that its result can be set
        with self._lock:
            while self._jobs and not self.keep_all:
                waiting = self._jobs.popleft()
                logger.info("Not uploaded, as a newer one is ready: %s.", waiting.message)
                _discard(waiting)
            self._jobs.append(job)
            if not self._busy:
                self._busy = True
                self._stopped.clear()
                atexit.register(self.stop)
                threading.Thread(target=self._work, name="hf_effi upload", daemon=True).start()
        return job.done

    @property
    def idle(self) -> bool:
        """Whether nothing is being uploaded and nothing waits."""
        return not self._busy

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for all uploads, at most `seconds`; then stop them, say so, and return `False`."""
        limit = self.seconds if seconds is None else seconds
        with self._lock:
            if self._lock.wait_for(lambda: not self._busy, timeout=limit):
                return self.failure is None
        self._fail(f"the upload did not finish within {limit:g} s and was stopped")
        self.stop()
        return False

    def stop(self) -> None:
        """Give up what is being uploaded and what waits."""
        self._stopped.set()
        with self._lock:
            while self._jobs:
                _discard(self._jobs.popleft())
        if self._process is not None:
            self._process.kill()
        with self._lock:
            self._lock.wait_for(lambda: not self._busy, timeout=5.0)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._busy = False
                    self._lock.notify_all()
                    break
                job = self._jobs.popleft()
            try:
                commit = self._upload(job)
            except Exception as error:  # else this thread would end, and whoever waits for it would wait for nothing
                commit = None
                self._fail(f"{type(error).__name__}: {error}")
            _discard(job, commit)
        atexit.unregister(self.stop)

    def _upload(self, job: _Job) -> CommitInfo | None:
        answer = self._try(job, self.seconds)
        if "error" not in answer:
            commit = CommitInfo(**answer["commit"])
            self.repo_id, self.failure = answer["repo_id"], None
            return commit
        if not self._stopped.is_set():
            self._fail(f"{answer['error']}{_advice(answer)}")
        return None

    def _try(self, job: _Job, seconds: float) -> dict[str, Any]:
        """Run a job until it works, cannot work, or the time or the tries are used up."""
        end, pause = time.monotonic() + seconds, self.pause
        for number in range(1, self.tries + 1):
            answer = self._run(job, end - time.monotonic())
            if "error" not in answer or not answer["retry"] or number == self.tries:
                break
            delay = pause if answer["retry_after"] is None else answer["retry_after"]
            if time.monotonic() + delay >= end:
                break
            logger.warning(
                "Upload to the Hub, try %d of %d in %g s: %s", number + 1, self.tries, delay, answer["error"]
            )
            if self._stopped.wait(delay):
                break
            pause = min(2 * pause, _LONGEST_PAUSE)
        return answer

    def _run(self, job: _Job, seconds: float) -> dict[str, Any]:
        if is_offline():  # trying again would not change it
            return _own_failure("HF_HUB_OFFLINE is set, which forbids to ask the Hub. Unset it to upload", retry=False)
        text = json.dumps(
            {
                "repo_id": self.repo_id,
                "token": self._token_to_pass(),
                "private": self.private,
                "revision": self.revision,
                "folder": None if job.folder is None else str(job.folder),
                "message": job.message,
                "ignore": list(job.ignore),
            }
        )
        # Nothing is imported from the folder that the run happens to be in: neither by `-m` (`-P`) nor by a relative
        # path.
        paths = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(part)]
        path, errors = os.pathsep.join([str(_PACKAGE_FOLDER), *paths]), ""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hf_effi.hub._worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )
            output, errors = self._process.communicate(text, timeout=max(0.1, seconds))
            return _checked(json.loads(output))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return _own_failure(f"the Hub did not answer within {seconds:.0f} s", retry=True)
        except (OSError, ValueError) as error:
            last = (errors if isinstance(error, ValueError) and errors else str(error)).strip().splitlines()[-1:]
            return _own_failure(f"the upload process failed: {''.join(last)}", retry=False)
        finally:
            self._process = None

    def _token_to_pass(self) -> str | None:
        """The token, unless the process finds the same one by itself."""
        token = self.token.strip() if self.token else None  # a file with a token ends in a line break
        return None if token == get_token() else token

    def _fail(self, reason: str) -> None:
        self.failure = redact(reason)
        logger.error("Not on the Hub (%s): %s. The files are kept on this machine.", self.repo_id, self.failure)


def _checked(answer: Any) -> dict[str, Any]:
    """Return what a worker answered; whatever else stands there is no answer."""
    failed = {"error": str, "retry": bool, "retry_after": (int, float, type(None)), "status": (int, type(None))}
    wanted = failed if isinstance(answer, dict) and "error" in answer else {"repo_id": str}
    if not isinstance(answer, dict) or not all(isinstance(answer.get(name), kind) for name, kind in wanted.items()):
        raise ValueError("its answer is not that of a worker")
    return answer


def is_offline() -> bool:
    """Return whether the environment, which the upload process inherits, forbids to ask the Hub."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _own_failure(text: str, *, retry: bool) -> dict[str, Any]:
    return {"error": redact(text), "status": None, "retry": retry, "retry_after": None}


def _advice(answer: dict[str, Any]) -> str:
    return {
        401: " Log in with `hf auth login`, or pass a token.",
        403: " The token needs write access to this repository.",
        404: " Check the name of the repository and of the branch.",
    }.get(answer["status"], "")


def _discard(job: _Job, commit: CommitInfo | None = None) -> None:
    if job.temporary and job.folder is not None:
        shutil.rmtree(job.folder, ignore_errors=True)
    job.done.set_result(commit)
