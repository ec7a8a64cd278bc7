"""Time, peak memory and error of functions on one device, and the sizes for a GPU and for a dry run."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MIB = 2**20
Figures = dict[str, float]


@dataclass
class Bench:
    """
    One run: where, in which dtype, how often, and what has been found.

    Args:
        device (`torch.device`): A GPU, or the CPU for a dry run.
        warm_up, repeats (`int`): Untimed and timed rounds.
        limit_seconds (`float`): No further case is started after this time.
        rows (`list[dict]`): What was measured.
    """

    device: torch.device
    warm_up: int = 3
    repeats: int = 10
    limit_seconds: float = 420.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def is_dry(self) -> bool:
        return self.device.type != "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def size(self, on_gpu: int, dry: int) -> int:
        """Return the size of a dimension."""
        return dry if self.is_dry else on_gpu

    def draw(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Return random normal values on the device."""
        return (torch.randn(shape, device=self.device) * scale).to(dtype or self.dtype)

    def is_late(self) -> bool:
        return time.monotonic() - self.started > self.limit_seconds

    def skip(self, case: str, contender: str, reason: str) -> None:
        """Keep and print why something was not measured."""
        self.rows.append({"case": case, "contender": contender, "skipped": reason})
        print(f"{case}: {contender} skipped: {reason}", flush=True)

    def time(self, case: str, contenders: Mapping[str, Callable[[], Any]], **notes: Any) -> dict[str, float]:
        """
        Return the median milliseconds of each contender, from alternated rounds, and keep them with the peak memory.

        A contender that runs out of memory is skipped with its error.
        """
        usable = {name: run for name, run in contenders.items() if self._runs(case, name, run)}
        samples: dict[str, list[float]] = {name: [] for name in usable}
        for round_number in range(self.warm_up + self.repeats):
            for name, run in usable.items():
                elapsed = self._once(run)
                if round_number >= self.warm_up:
                    samples[name].append(elapsed)
        medians = {name: statistics.median(values) for name, values in samples.items()}
        for name, milliseconds in medians.items():
            row = {"case": case, "contender": name, "milliseconds": milliseconds, **notes}
            self.rows.append({**row, "peak_mib": self._peak(usable[name])})
        return medians

    def _runs(self, case: str, name: str, run: Callable[[], Any]) -> bool:
        try:
            run()
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            self.skip(case, name, str(error).partition(".")[0])
            return False
        return True

    def _once(self, run: Callable[[], Any]) -> float:
        if self.is_dry:
            before = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - before)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _peak(self, run: Callable[[], Any]) -> float | None:
        """Return what a call needs beyond what was there before."""
        if self.is_dry:
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def peak(self, case: str, contender: str) -> float:
        """Return the peak memory in MiB that `time` kept."""
        return next(r["peak_mib"] for r in self.rows if (r["case"], r["contender"]) == (case, contender))

    def check(
        self, case: str, found: Mapping[str, Tensor], own: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> bool:
        """Keep the largest errors beside those of torch in the same dtype; return whether all are close enough."""
        good = True
        for name, exact in truth.items():
            scale = exact.abs().max().clamp(min=1e-30)
            error, own_error = (
                ((values[name].double() - exact).abs().max() / scale).item() for values in (found, own)
            )
            ok = error <= 2 * own_error + 2 * torch.finfo(found[name].dtype).eps
            good = good and ok
            row = {"case": case, "contender": "hf_effi", "result": name}
            self.rows.append({**row, "max_relative_error": error, "torch_error": own_error, "ok": ok})
        return good


def optional(bench: Bench, case: str, contender: str, module: str) -> Any:
    """Import what a contender needs, or keep the reason why it is left out and return `None`."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        bench.skip(case, contender, f"{top} is not installed")
        return None
    return importlib.import_module(module)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as lines of text."""
    lines = []
    for row in rows:
        head = f"{row['case']:<44} {row['contender']:<34}"
        if "milliseconds" in row:
            peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:10.0f} MiB"
            lines.append(f"{head} {row['milliseconds']:10.3f} ms {peak}")
        elif "ok" in row:
            verdict = "ok" if row["ok"] else "WRONG"
            lines.append(
                f"{head} {row['result']}: {row['max_relative_error']:.1e}, torch {row['torch_error']:.1e} {verdict}"
            )
        else:
            lines.append(f"{head} skipped: {row['skipped']}")
    return "\n".join(lines)
