"""Where the time goes and what was forwarded: counters of a GRPO step, logged under `effi/`."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PHASES = ("gen", "reward", "logp", "train")
COUNTERS = ("tokens_forward", "tokens_real", "tokens_saved", "rows_generated", "rows_trained")


class AccountingMixin:
    """Times the phases of a step by wrapping the methods that do them, and sums counters over the ranks."""

    # Made when they are first asked for: other code builds trainers without `__init__` and calls single methods.
    @functools.cached_property
    def _effi_seconds(self) -> dict[str, float]:
        return defaultdict(float)

    @functools.cached_property
    def _effi_counters(self) -> dict[str, int]:
        return defaultdict(int)

    @functools.cached_property
    def _in_phase(self) -> list[str]:
        return []

    @property
    def _in_training(self) -> bool:
        model = getattr(self, "model", None)
        return model is not None and model.training

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to `phase`, and take them from the phase around it."""
        # A step after an evaluation begins with a model in eval mode.
        if not self._in_training and phase != "train":
            yield
            return
        outer = self._in_phase[-1] if self._in_phase else None
        self._in_phase.append(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._in_phase.pop()
            self._effi_seconds[phase] += seconds
            if outer is not None:
                self._effi_seconds[outer] -= seconds

    def _count_rows(self, name: str, rows: int) -> None:
        self._effi_counters[name] += rows

    def _generate(self, prompts: list[Any]) -> Any:
        with self._timed("gen"):
            return super()._generate(prompts)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self._timed("logp"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._timed("train"):
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._step_after_update = self._step
            self._flush_accounting()
        return loss

    def _flush_accounting(self) -> None:
        """Once an optimizer step, on every rank."""
        metrics = self._metrics["train"]
        for phase in PHASES:
            metrics[f"effi/time_{phase}"].append(self._effi_seconds[phase])
        counts = torch.tensor(
            [self._effi_counters[name] for name in COUNTERS], dtype=torch.float64, device=self.accelerator.device
        )
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        values = dict(zip(COUNTERS, counts.tolist(), strict=True))
        for name in ("tokens_forward", "tokens_real", "tokens_saved"):
            metrics[f"effi/{name}"].append(values[name])
        if values["tokens_real"]:
            metrics["effi/pad_ratio"].append(1 - values["tokens_real"] / max(values["tokens_forward"], 1))
        if values["rows_generated"]:
            metrics["effi/rows_generated"].append(values["rows_generated"])
            metrics["effi/rows_trained"].append(values["rows_trained"])
            metrics["effi/effective_ratio"].append(values["rows_trained"] / values["rows_generated"])
        self._effi_seconds.clear()
        self._effi_counters.clear()
