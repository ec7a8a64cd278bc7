"""A metric that hf_effi logs has its name in `functional/metrics.py`, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from hf_effi.functional import metrics
from tests.contract._sources import PACKAGE, python_files, shown, tree_of

HOME = PACKAGE / "functional" / "metrics.py"
NAMES = {name: value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)}


def texts_of(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield the strings of a file, without docstrings and other strings that stand alone."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node


def test_no_name_is_typed_twice() -> None:
    typed = [
        f"{shown(path)}:{node.lineno}: {node.value!r}"
        for path in python_files("hf_effi")
        for node in texts_of(tree_of(path))
        if path != HOME and node.value.startswith(metrics.PREFIX)
    ]
    assert not typed, "names of metrics outside hf_effi/functional/metrics.py:\n" + "\n".join(typed)


def test_every_name_is_ours_and_in_use() -> None:
    assert len(set(NAMES.values())) == len(NAMES) > 20
    assert all(value.startswith(metrics.PREFIX) for value in NAMES.values())
    read = {
        node.attr
        for path in python_files("hf_effi", "tests")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
    }
    assert set(NAMES) <= read, f"nobody logs {sorted(set(NAMES) - read)}"


def test_a_name_that_is_typed_is_seen() -> None:
    tree = ast.parse('"""effi/docstring"""\nlog["effi/typed"] = 1\nlog[f"effi/{reason}"] = 2')
    assert [node.value for node in texts_of(tree)] == ["effi/typed", "effi/"]
