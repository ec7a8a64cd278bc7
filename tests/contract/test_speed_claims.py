"""Who claims that a target was reached for less has one rule for it: `hf_effi/functional/referee.py`."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from bench._schema import ROOT, load_results

REFEREE = "hf_effi.functional.referee"
#: headline names that speak of a cost until a value is reached
CLAIM = re.compile(r"(ratio|speedup|share|seconds|updates)\w*_to_(\w+_)?(accuracy|target|loss)")
RESULTS = load_results()
CLAIMING = sorted(
    bench for bench, result in RESULTS.items() if any(CLAIM.search(figure["name"]) for figure in result["headline"])
)


def _file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of this repository that a module imports, also inside of functions."""
    file, found = _file_of(module), set()
    if file is None:
        return frozenset()
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in found if name.startswith(("bench", "hf_effi")) and _file_of(name))


def reaches_the_referee(module: str, seen: set[str]) -> bool:
    seen.add(module)
    own = imports(module)
    return REFEREE in own or any(reaches_the_referee(name, seen) for name in sorted(own - seen))


def test_the_benches_that_claim_speed_are_known():
    assert {
        "demo",
        "grpo_selection",
        "grpo_second_task",
        "real_model",
        "optimizers",
        "local_updates",
        "averaging",
    } <= {*CLAIMING}


@pytest.mark.parametrize("bench", CLAIMING)
def test_a_bench_that_claims_speed_asks_the_referee(bench):
    assert reaches_the_referee(f"bench.{bench}", set()), (
        f"bench/{bench}.py tells a cost until a target is reached by a rule of its own. Use time_to_target, "
        "compute_equivalent_gain or median_cost of hf_effi/functional/referee.py."
    )


def test_a_module_of_its_own_rule_would_be_found():
    assert not reaches_the_referee("bench._schema", set())


def test_no_other_function_looks_for_the_first_point_at_a_target():
    own = re.compile(r"next\(\s*\(?\s*\w+ for .* if \w+ (<=|>=) (target|goal|loss)\b")
    for folder in ("bench", "hf_effi"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.name != "referee.py" and "cache" not in file.parts:
                assert not own.search(file.read_text(encoding="utf-8")), file
