"""
The status of each method follows from its evidence, by the rule of `docs/adding_a_method.md`, and nobody's opinion.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from typing import Any

import pytest

from hf_effi.methods import METHODS, Method, find_method
from tests.contract._sources import ROOT
from tests.contract.test_method_companions import result_of
from tests.zoo.features import FEATURES
from tests.zoo.ranks import SEQUENCE_PARALLEL

TESTED_IN_THE_ZOO = {feature.key for feature in (*FEATURES, SEQUENCE_PARALLEL)}
KEYS = [method.key for method in METHODS]


def bench_of(method: Method) -> dict[str, Any] | None:
    path = result_of(method)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def lacks(method: Method) -> list[str]:
    """Return what a method lacks to be stable, both ways; nothing where it is."""
    bench = bench_of(method)
    if bench is None or len(set(bench["seeds"])) < 3:
        return ["a bench with three seeds"]
    missed = [figure["name"] for figure in bench["headline"] if figure["met"] is False]
    if missed:
        return [f"goals that were missed: {', '.join(missed)}"]
    exact = _lacks_exactness(method)
    return exact and _lacks_tasks(method, bench) and [*exact, *_lacks_tasks(method, bench)]


def _lacks_exactness(method: Method) -> list[str]:
    found = []
    if not has_test(method.exact):
        found.append("a test of its gradients against the untouched model's")
    if not method.zoo or not set(method.zoo) <= TESTED_IN_THE_ZOO:
        found.append("features that the zoo tests")
    return found


def _lacks_tasks(method: Method, bench: dict[str, Any]) -> list[str]:
    met = {figure["name"] for figure in bench["headline"] if figure["met"]}
    confirmed = set(method.tasks) & met
    return [] if len(confirmed) >= 2 else [f"two tasks on which its bench met a goal; it has {len(confirmed)}"]


def has_test(place: str) -> bool:
    """Return whether `file::function` is a test."""
    file, _, name = place.partition("::")
    path = ROOT / file
    if not name.startswith("test_") or not path.is_file():
        return False
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree))


def test_a_test_is_found_by_its_name():
    here = "tests/contract/test_maturity.py"
    assert has_test(f"{here}::test_a_test_is_found_by_its_name")
    assert not any(map(has_test, (f"{here}::has_test", f"{here}::test_of_nobody", "no/file.py::test_x", here, "")))


@pytest.mark.parametrize("key", KEYS)
def test_the_status_is_what_the_evidence_says(key: str) -> None:
    method = find_method(key)
    if method.status == "rejected":
        assert not (method.exact or method.zoo or method.tasks), f"{key} is rejected and claims evidence"
        return
    missing = lacks(method)
    if method.status == "stable":
        assert not missing, f"{key} is called stable and lacks {'; '.join(missing)}"
    else:
        assert missing, f"{key} has all that a stable method has: change its status, and that of its card"


@pytest.mark.parametrize("key", KEYS)
def test_the_card_says_the_same_status(key: str) -> None:
    method = find_method(key)
    said = re.findall(r"Status: (\w+)", (ROOT / method.card).read_text(encoding="utf-8"))
    assert said in ([], [method.status]), f"{method.card} says {said}, the table {method.status}"


@pytest.mark.parametrize(
    "change",
    [
        {"exact": ""}, {"exact": "tests/unit/test_tiled_loss.py::test_that_nobody_wrote"}, {"zoo": ()},
        {"zoo": ("no such feature",)},
        {"zoo": ("nothing like it",)}, {"bench": "bench/none.py"}, {"bench": "bench/sparse_24.py"},
    ],
    ids=str,
)  # fmt: skip
def test_a_stable_method_that_loses_a_piece_of_evidence_is_found(change: dict[str, Any]) -> None:
    method = find_method("tiled_loss")
    assert not lacks(method) and lacks(dataclasses.replace(method, **change))


def test_two_tasks_are_the_other_way() -> None:
    figures = tuple(figure["name"] for figure in bench_of(find_method("shared_prefix"))["headline"] if figure["met"])
    claims = dataclasses.replace(find_method("shared_prefix"), exact="", zoo=())
    assert lacks(claims)
    assert lacks(dataclasses.replace(claims, tasks=figures[:1])) and not lacks(
        dataclasses.replace(claims, tasks=figures[:2])
    )


def test_the_whole_zoo_has_no_fault_in_what_is_called_stable() -> None:
    """Where `make zoo` has been run: no cell of a stable method is neither equal nor refused."""
    path = ROOT / "bench" / "results" / "zoo.json"
    if not path.exists():
        pytest.skip("the whole zoo has not been run: `python -m bench.zoo` writes its result")
    stable = {feature for method in METHODS if method.status == "stable" for feature in method.zoo}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    faults = [
        f"{row['class']}, {feature}: {cell}"
        for row in rows
        for feature, cell in row.get("cells", {}).items()
        if feature in stable and cell["mark"] == "neither"
    ]
    assert not faults, faults[:5]


def test_the_readme_names_what_to_trust_first() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What to trust first")[1].split("\n## ")[0]
    named = set(re.findall(r"docs/methods/(\w+)\.md", text))
    assert named == {method.key for method in METHODS if method.status == "stable"}
