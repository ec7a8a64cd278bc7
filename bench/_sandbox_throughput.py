"""What the sandbox costs: programs per second, a part of `bench/rewards.py`.

Short programs that read a number and print it, in Python and, where there is gcc, compiled from C: as a plain
subprocess without any guard, and in the sandbox with 1, 2 and 4 workers. `cold` starts the workers for every batch.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench._schema import headline
from hf_effi.rewards import ProgramResult, Sandbox

WORKERS = (1, 2, 4)
#: programs of a batch, and how many of them a cold batch has
PROGRAMS, COLD_PROGRAMS = 40, 8
PYTHON = ["python3", "-I", "-S", "main.py"]
SCRIPT = b"print(int(input()))"
C_SOURCE = b'#include <stdio.h>\nint main(void) { int a; return scanf("%d", &a) != 1 || printf("%d\\n", a) < 0; }\n'


def compiled(sandbox: Sandbox) -> dict[str, bytes] | None:
    """Return the files of the C program, `None` where there is no gcc."""
    if shutil.which("gcc") is None:
        return None
    result = sandbox.run(["gcc", "-O1", "-o", "main", "main.c"], files={"main.c": C_SOURCE}, keep=True)
    if not result.ok:
        raise RuntimeError(f"gcc in the sandbox: {result.describe()} {result.stderr!r}")
    return {"main": result.files["main"]}


def rate(count: int, call: Callable[[], Any]) -> float:
    """Return programs per second of a batch of `count`."""
    begun = time.perf_counter()
    call()
    return count / (time.perf_counter() - begun)


def in_sandbox(sandbox: Sandbox, argv: list[str], files: dict[str, bytes], count: int, seed: int) -> None:
    """Run a batch, and check each answer: a fast wrong one would not count."""

    async def together() -> list[ProgramResult]:
        return await asyncio.gather(*(sandbox.run_async(argv, f"{seed + i}\n", files) for i in range(count)))

    results = asyncio.run(together())
    wrong = [result for i, result in enumerate(results) if result.text != f"{seed + i}\n"]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {count} programs went wrong, the first: {wrong[0].describe()}")


def without_sandbox(argv: list[str], files: dict[str, bytes], workers: int, count: int, seed: int) -> None:
    """The same programs as plain subprocesses in one folder, in as many threads."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
            (Path(folder) / name).chmod(0o755)

        def run(number: int) -> bytes:
            given = f"{number}\n".encode()
            return subprocess.run(argv, input=given, capture_output=True, cwd=folder, check=True).stdout

        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            list(threads.map(run, range(seed, seed + count)))


def rates(argv: list[str], files: dict[str, bytes], workers: int, seed: int) -> dict[str, float]:
    """Return programs per second, state by state."""
    found = {"plain": rate(PROGRAMS, lambda: without_sandbox(argv, files, workers, PROGRAMS, seed))}
    with Sandbox(workers=workers) as sandbox:
        for state, count in (("cold", COLD_PROGRAMS), ("warm", PROGRAMS)):
            found[state] = rate(count, functools.partial(in_sandbox, sandbox, argv, files, count, seed))
    return found


def measure(seeds: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Return the headline and the rows of the sandbox.

    The headline `sandbox_programs_per_second` is that of Python programs with two warm workers, median over seeds.
    """
    with Sandbox(workers=1) as sandbox:
        c = compiled(sandbox)
    languages = {"Python": (PYTHON, {"main.py": SCRIPT}), **({} if c is None else {"C": (["./main"], c)})}
    rows: list[dict[str, Any]] = []
    for language, (argv, files) in languages.items():
        for workers in WORKERS:
            each = [rates(argv, files, workers, seed) for seed in seeds]
            for state in ("plain", "cold", "warm"):
                values = [found[state] for found in each]
                rows.append(
                    {
                        "part": "sandbox",
                        "language": language,
                        "workers": workers,
                        "state": state,
                        "programs": COLD_PROGRAMS if state == "cold" else PROGRAMS,
                        "programs_per_second": statistics.median(values),
                        "each": values,
                    }
                )
    (chosen,) = (r for r in rows if (r["language"], r["workers"], r["state"]) == ("Python", 2, "warm"))
    return [headline("sandbox_programs_per_second", chosen["programs_per_second"])], rows


if __name__ == "__main__":
    for row in measure((0, 1, 2))[1]:
        print(f"{row['language']:8}{row['workers']} {row['state']:6}{row['programs_per_second']:8.1f} programs/s")
