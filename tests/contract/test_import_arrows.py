"""Arrows between the parts of the package run one way; read from the source, without importing it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract._sources import PACKAGE, ROOT, python_files, shown, tree_of

#: part of the package -> floor. A file imports from its own floor or from a lower one.
FLOORS = {
    # What every part may raise; it imports nothing of the package.
    "errors": -1,
    # Leaves: facts and types that every floor above the functional one may read.
    "_version": 0,
    "_compat": 0,
    "_methods": 0,
    "_environment": 0,
    "_faces": 0,
    "_files": 0,
    "_untrusted": 0,
    "_record_check": 0,
    "_run_record": 0,
    "_secrets": 0,
    "_plots": 0,
    "_text_plot": 0,
    "methods": 0,
    "functional": 0,
    "patching": 1,
    "protocols": 1,
    "attention": 2,
    "layers": 2,
    "memory": 2,
    "parallel": 2,
    "kernels": 3,
    "data": 4,
    "samplers": 5,
    "optim": 6,
    "checkpoint": 6,
    "rewards": 6,
    "callbacks": 6,
    "selection": 6,
    "schedules": 6,
    "hub": 7,
    "recipes": 7,
    "trainers": 8,
    "report": 8,
    "cli": 9,
    "cli_train": 9,
    "cli_yaml": 9,
    "cli_resolve": 9,
    "demo": 9,
    "__main__": 10,
}
#: the package's lazy front door, for those who may use it as a user does
ROOT_FLOOR = 9
OUTSIDE = {"tests", "bench", "examples"}
STANDARD = set(sys.stdlib_module_names)


def part_of(path: Path) -> str:
    """Return the part a file belongs to: the first name below `hf_effi/`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    """Resolve a relative import to its dotted module."""
    if not node.level:
        return node.module or ""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts = [*parts[:-1], ""]  # a package's own name counts as one level
    base = parts[: -node.level]
    return ".".join([part for part in base if part] + ([node.module] if node.module else []))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) for every import in a file, also inside functions and `TYPE_CHECKING` blocks."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, path)
            # `from .. import methods` and `from hf_effi import methods` name their target in the alias.
            if module == "hf_effi":
                yield from ((node.lineno, f"hf_effi.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def target_part(module: str) -> str | None:
    """Return the part of the package that a dotted module lies in, `"hf_effi"` for the front door, or `None`."""
    first, _, rest = module.partition(".")
    if first != "hf_effi":
        return None
    part = rest.split(".")[0]
    return part if part in FLOORS else "hf_effi"


FILES = [path for path in python_files("hf_effi") if path != PACKAGE / "__init__.py"]


def arrows() -> list[tuple[str, str, str]]:
    """Return (where, from part, to part) of every import inside the package."""
    found = []
    for path in FILES:
        for line, module in imports_of(path):
            target = target_part(module)
            if target is not None:
                found.append((f"{shown(path)}:{line}", part_of(path), target))
    return found


def test_every_part_has_a_floor():
    unknown = sorted({f"{shown(path)}: part {part_of(path)!r}" for path in FILES if part_of(path) not in FLOORS})
    assert not unknown, f"give these a floor in FLOORS (DESIGN section 1): {unknown}"


def test_no_arrow_runs_upwards():
    wrong = []
    for where, source, target in arrows():
        floor = ROOT_FLOOR if target == "hf_effi" else FLOORS[target]
        if source in FLOORS and floor > FLOORS[source]:
            wrong.append(f"{where}: {source} (floor {FLOORS[source]}) -> {target} (floor {floor})")
    assert not wrong, "imports that run upwards:\n" + "\n".join(wrong)


def test_parts_of_one_floor_have_no_cycle():
    edges: dict[str, dict[str, str]] = {}
    for where, source, target in arrows():
        if source != target and target in FLOORS:
            edges.setdefault(source, {}).setdefault(target, where)

    def walk(part: str, path: tuple[str, ...]) -> list[str] | None:
        if part in path:
            ring = (*path[path.index(part) :], part)
            return [f"{edges[a][b]}: {a} -> {b}" for a, b in zip(ring, ring[1:], strict=False)]
        for following in edges.get(part, {}):
            found = walk(following, (*path, part))
            if found:
                return found
        return None

    for part in sorted(edges):
        ring = walk(part, ())
        assert ring is None, "a cycle of imports:\n" + "\n".join(ring or [])


def test_functional_imports_torch_and_the_standard_library_only():
    wrong = []
    for path in python_files("hf_effi/functional"):
        for line, module in imports_of(path):
            allowed = module.split(".")[0] in {"torch", *STANDARD} or module.startswith(
                ("hf_effi.functional", "hf_effi.errors")
            )
            if not allowed:
                wrong.append(f"{shown(path)}:{line}: functional -> {module}")
    assert not wrong, "the ground floor may import torch, the standard library and hf_effi.errors only:\n" + "\n".join(
        wrong
    )


def test_the_package_does_not_import_its_surroundings():
    wrong = [
        f"{shown(path)}:{line}: {part_of(path)} -> {module}"
        for path in python_files("hf_effi")
        for line, module in imports_of(path)
        if module.split(".")[0] in OUTSIDE
    ]
    assert not wrong, "what is installed must not import what is not:\n" + "\n".join(wrong)


def test_examples_use_public_names_only():
    wrong = [
        f"{shown(path)}:{line}: examples -> {module}"
        for path in python_files("examples")
        for line, module in imports_of(path)
        if module.split(".")[0] in {"tests", "bench"} or any(part.startswith("_") for part in module.split("."))
    ]
    assert not wrong, "an example shows what users can write:\n" + "\n".join(wrong)


def _guarded_imports(path: Path) -> Iterator[int]:
    """Yield the line of each `except ImportError` (or its subclass, or a tuple with one)."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            named = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(isinstance(n, ast.Name) and n.id in {"ImportError", "ModuleNotFoundError"} for n in named):
                yield node.lineno


def test_guarded_imports_are_in_compat_only():
    wrong = [
        f"{shown(path)}:{line}"
        for path in python_files("hf_effi", "examples")
        if path != PACKAGE / "_compat.py"
        for line in _guarded_imports(path)
    ]
    assert not wrong, "`except ImportError` belongs into hf_effi/_compat.py: " + ", ".join(wrong)


def test_no_assert_outside_tests():
    wrong = [
        f"{shown(path)}:{node.lineno}"
        for path in python_files("hf_effi", "examples", "bench")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assert)
    ]
    assert not wrong, "`python -O` removes asserts; raise an error that names the fix: " + ", ".join(wrong)


def test_the_front_door_imports_nothing_heavy_at_run_time():
    """Imports under `if TYPE_CHECKING:` are for editors; the others run on every `import hf_effi`."""
    tree = tree_of(PACKAGE / "__init__.py")
    hidden = {
        id(inner)
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    run = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and id(n) not in hidden]
    names = {alias.name for n in run if isinstance(n, ast.Import) for alias in n.names}
    names |= {("." * n.level) + (n.module or "") for n in run if isinstance(n, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] not in STANDARD} == {"._version", "._faces"}


# --- the readers above, on text with known answers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("trainers/sft.py", "from ..functional.rollouts import x", "hf_effi.functional.rollouts"),
        ("trainers/__init__.py", "from .grpo import x", "hf_effi.trainers.grpo"),
        ("functional/rollouts/__init__.py", "from ..averaging import x", "hf_effi.functional.averaging"),
        ("callbacks/a.py", "from .. import methods", "hf_effi.methods"),
        ("callbacks/a.py", "def f():\n    import hf_effi.trainers.sft", "hf_effi.trainers.sft"),
        ("cli.py", "from . import methods", "hf_effi.methods"),
        ("cli.py", "from hf_effi import EffiGRPOTrainer", "hf_effi.EffiGRPOTrainer"),
    ],
)
def test_imports_are_resolved(monkeypatch, file, text, expected):
    monkeypatch.setattr(sys.modules[__name__], "tree_of", lambda path: ast.parse(text))
    assert [module for _, module in imports_of(PACKAGE / file)] == [expected]


def test_an_upward_arrow_is_named_with_its_line(monkeypatch):
    path = PACKAGE / "callbacks" / "bad.py"
    monkeypatch.setattr(sys.modules[__name__], "FILES", [path])
    monkeypatch.setattr(
        sys.modules[__name__],
        "tree_of",
        lambda path: ast.parse("import torch\nfrom ..trainers.grpo import EffiGRPOTrainer"),
    )
    with pytest.raises(
        AssertionError, match=r"hf_effi/callbacks/bad.py:2: callbacks \(floor 6\) -> trainers \(floor 8\)"
    ):
        test_no_arrow_runs_upwards()
    with pytest.raises(AssertionError, match="bad.py:2"):
        monkeypatch.setattr(
            sys.modules[__name__],
            "tree_of",
            lambda path: ast.parse("import torch\nfrom hf_effi import EffiGRPOTrainer"),
        )
        test_no_arrow_runs_upwards()
