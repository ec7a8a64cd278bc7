"""`HF_EFFI_CPU_TIMES=folder make test`: what each test costs in CPU seconds, those of its child processes too.

The durations that pytest prints are those of the clock on the wall, which on two busy cores tell more about the other
tests than about the one that is named. Each process of pytest-xdist writes one file; the last lines of the run are the
dearest files and tests.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def descendants_seconds(process: int | None = None) -> float:
    """
    Return the CPU seconds of all child processes of a process, finished ones that were waited for among them.

    Args:
        process (`int`, *optional*): Its number; this one by default.
    """
    total, open_ones = 0.0, [os.getpid() if process is None else process]
    first = True
    while open_ones:
        number = open_ones.pop()
        try:
            stat = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            tasks = list(Path(f"/proc/{number}/task").iterdir())
        except OSError:
            continue  # it has just ended; whoever waited for it has its seconds
        children = [child for task in tasks for child in _children(task)]
        # utime, stime, and those of the children that were waited for: fields 14 to 17, of which 1 and 2 are cut off
        own = sum(map(int, stat[13:15])) if first else sum(map(int, stat[11:15]))
        total += own / _TICKS
        first = False
        open_ones += children
    return total


def _children(task: Path) -> list[int]:
    """Return the child processes of a thread; of one that has just ended, none."""
    try:
        return [int(child) for child in (task / "children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


class CpuTimes:
    """The plugin."""

    def __init__(self, folder: Path, worker: str) -> None:
        self.folder, self.worker = folder, worker
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = time.process_time() + descendants_seconds()
        yield
        self.seconds[item.nodeid] = round(time.process_time() + descendants_seconds() - before, 3)

    def pytest_sessionfinish(self) -> None:
        if self.seconds:
            file = self.folder / f"cpu-{self.worker}.json"
            file.write_text(json.dumps(self.seconds), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.worker != "main":
            return
        found: Counter[str] = Counter()
        for file in sorted(self.folder.glob("cpu-*.json")):
            found.update(json.loads(file.read_text(encoding="utf-8")))
        files: Counter[str] = Counter()
        for name, seconds in found.items():
            files[name.split("::")[0]] += seconds  # type: ignore[assignment]
        terminalreporter.section(f"CPU seconds: {sum(found.values()):.0f} in {len(found)} tests")
        for table in (files, found):
            for name, seconds in table.most_common(40):
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")


def register(config: pytest.Config) -> None:
    """Add the plugin where the environment names a folder: processes of pytest-xdist parse no options of ours."""
    if folder := os.environ.get("HF_EFFI_CPU_TIMES"):
        worker = getattr(config, "workerinput", {}).get("workerid", "main")
        config.pluginmanager.register(CpuTimes(Path(folder).absolute(), worker))
