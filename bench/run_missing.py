"""Run the benchmarks whose result file is missing, one after the other: `python -m bench.run_missing [NAME ...]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench._schema import RESULTS, ROOT

#: Modules of this folder that are no benchmarks.
_NOT_BENCHES = {"render", "report_pictures", "run_missing", "tables"}


def benches(folder: Path = ROOT / "bench") -> list[str]:
    """Return the names of all bench scripts."""
    names = (path.stem for path in sorted(folder.glob("*.py")))
    return [name for name in names if not name.startswith("_") and name not in _NOT_BENCHES]


def missing(names: list[str], results: Path = RESULTS) -> list[str]:
    """Return those of `names` that have no result file."""
    return [name for name in names if not (results / f"{name}.json").exists()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; default: all")
    parser.add_argument("--list", action="store_true", help="only say which are missing")
    args = parser.parse_args(arguments)
    known = benches()
    if unknown := sorted(set(args.names) - set(known)):
        parser.error(f"unknown bench {', '.join(unknown)}. Known: {', '.join(known)}.")
    failed = []
    for name in missing(args.names or known):
        print(f"bench.{name}", flush=True)
        if not args.list and subprocess.run([sys.executable, "-m", f"bench.{name}"], cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
