"""Several blocking jobs in strict alternation, each as if it were alone in the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .measure import rng_state, set_rng_state


class _Cancelled(BaseException):
    """Raised inside a job whose siblings failed. Derives from `BaseException` so that no handler swallows it."""


class Job:
    """
    One function in a thread of its own that runs only between [`resume`] and its next [`pause`].

    `Trainer.train()` blocks until it is done, so alternation needs either threads that take turns or a process a
    slice with save and resume. Turns are exact (no state is written and read back), and cost nothing. At any moment
    one thread runs, with its own state of the global random generators: a run is the same, bit for bit, whether it
    has siblings or not.
    """

    def __init__(self, function: Callable[[Job], Any]) -> None:
        self.finished, self.result, self.error = False, None, None
        self._function, self._cancelled = function, False
        self._my_turn, self._handed_back = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._wait()
            # The number of threads is a property of each OpenMP thread, not of the process.
            torch.set_num_threads(1)
            self.result = self._function(self)
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.finished = True
            self._handed_back.set()

    def _wait(self) -> None:
        self._my_turn.wait()
        self._my_turn.clear()
        if self._cancelled:
            raise _Cancelled

    def pause(self) -> None:
        """Called by the job: hand over, and return when it is this job's turn again."""
        state = rng_state()
        self._handed_back.set()
        self._wait()
        set_rng_state(state)

    def resume(self) -> None:
        """Called by the owner: let the job run to its next pause, or to its end. Its exception is raised here."""
        self._handed_back.clear()
        self._my_turn.set()
        self._handed_back.wait()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Called by the owner: end a job that is paused."""
        self._cancelled = True
        self._my_turn.set()
        self._thread.join()


def alternate(functions: Mapping[str, Callable[[Job], Any]]) -> Iterator[tuple[str, Job]]:
    """
    Run the functions in turns, from one `job.pause()` to the next, and yield (name, job) after each turn.

    The order is rotated each round, so that no job always runs after the same sibling. If one job fails, or the
    caller stops iterating, the others are ended.
    """
    jobs = {name: Job(function) for name, function in functions.items()}
    order = list(jobs)
    try:
        while order:
            for name in list(order):
                jobs[name].resume()
                yield name, jobs[name]
                if jobs[name].finished:
                    order.remove(name)
            order = order[1:] + order[:1]
    finally:
        for job in jobs.values():
            if not job.finished:
                job.cancel()
