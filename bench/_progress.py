"""One line that says how far a training is, in place of every dictionary that a Trainer without a bar prints."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO, TypeVar

from transformers import PrinterCallback, TrainerCallback

T = TypeVar("T")
_SECONDS_BETWEEN = 0.2


class ProgressLine(TrainerCallback):
    """
    Write `label: update 12 of 240` over itself on a terminal, and one line at the end anywhere.

    Args:
        label (`str`): What is being trained.
        stream (`TextIO`, *optional*): Standard error without it, so that results on standard output stay alone.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label, self.stream = label, stream or sys.stderr
        self._began = self._shown = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._shown = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if now - self._shown >= _SECONDS_BETWEEN and self.stream.isatty():
            self.stream.write(f"\r{self.label}: update {state.global_step} of {state.max_steps}")
            self.stream.flush()
            self._shown = now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start = "\r" if self.stream.isatty() else ""
        seconds = time.perf_counter() - self._began
        self.stream.write(f"{start}{self.label}: {state.global_step} updates in {seconds:.1f} s\n")


class EndLine(ProgressLine):
    """The line at the end alone, where the time that callbacks take is what is measured."""

    on_step_end = TrainerCallback.on_step_end


def with_line(trainer: T, label: str, *, live: bool = True) -> T:
    """
    Return the trainer with a progress line in place of the printer of its logs.

    Args:
        live (`bool`, *optional*, defaults to `True`): Whether anything happens at each update.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback((ProgressLine if live else EndLine)(label))
    return trainer
