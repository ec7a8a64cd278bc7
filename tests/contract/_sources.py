"""Reads the repository's own source files for the contract tests."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_effi"


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def python_files(*folders: str) -> list[Path]:
    """
    Return the `.py` files below these folders of the repository, sorted; a folder that is absent has none.

    Without what `make compat` and the benchmarks keep below `bench/cache`, which holds whole environments.
    """
    found = []
    for folder in folders:
        for parent, below, names in os.walk(ROOT / folder):
            below[:] = [
                name for name in below if name != "__pycache__" and Path(parent, name) != ROOT / "bench" / "cache"
            ]
            found += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted(found)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def committed_files() -> tuple[Path, ...]:
    """
    Return the files that git tracks or would track. An unpacked source archive has no git: then every file that a
    build does not make.
    """
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        made = {".venv", "__pycache__", "build", "dist", "site", "demo-output", ".pytest_cache", ".ruff_cache"}
        paths = [path for path in ROOT.rglob("*") if not made.intersection(path.relative_to(ROOT).parts)]
    return tuple(sorted(path for path in paths if path.is_file()))
