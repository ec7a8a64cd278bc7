"""What CI really tests: the installed versions, and how the contract tests fare with them. `python -m bench.compatibility`.

Writes `bench/results/compatibility.json`, from which `bench.render` makes the table of `docs/compatibility.md`. Run it after
a pin of `constraints.txt` has moved; `tests/unit/test_bench_tables.py` fails until then.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench._schema import ROOT, command_line, headline, write_result
from bench.tables import packages

#: Judges result files and their tables, of which this one is only being made.
_LEFT_OUT = "tests/contract/test_bench_schema.py"


def installed(name: str) -> str | None:
    """Return the version of a package; `None` where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def run_contract_tests() -> dict[str, int]:
    """Run `tests/contract` in a process of its own and count the outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "contract.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/contract", f"--junitxml={report}"]
        command += ["--ignore", _LEFT_OUT]
        subprocess.run(command, cwd=ROOT, check=False)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {"passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[dict[str, Any]] = [{"package": "Python", "installed": platform.python_version()}]
    rows += [{"package": package.name, "installed": installed(package.name)} for package in packages(ROOT)]
    count = run_contract_tests()
    figures = [
        headline("contract_tests_passed", count["passed"]),
        headline("contract_tests_failed", count["failed"], "= 0"),
        headline("contract_tests_skipped", count["skipped"]),
    ]
    print(
        write_result(
            "compatibility", command=command_line("bench.compatibility"), seeds=[0], headline=figures, rows=rows
        )
    )
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
