"""Where this runs: hardware and commits, without names or addresses."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Return the processor's model, its cores, the threads torch uses, and the memory. No names, no addresses."""
    import torch

    model, memory_kib = platform.machine(), 0
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = found.group(1).strip()
    if meminfo.exists() and (found := re.search(r"MemTotal:\s*(\d+) kB", meminfo.read_text())):
        memory_kib = int(found.group(1))
    machine: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if memory_kib:
        machine["memory_gib"] = round(memory_kib / 2**20, 1)
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return machine


def commit_of(folder: Path) -> str:
    """
    Return the commit of the checkout that `folder` lies in, with `-dirty` if files differ; `""` without one or git.
    """
    inside = any((parent / ".git").exists() for parent in (folder, *folder.parents))
    if not inside or shutil.which("git") is None:
        return ""
    result = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip()


def current_commit() -> str:
    """Return the commit of the checkout this package runs from; `""` when it was installed from a wheel."""
    root = Path(__file__).resolve().parents[1]
    return commit_of(root) if (root / ".git").exists() else ""
