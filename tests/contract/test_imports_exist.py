"""What tests, benchmarks and examples import from the package exists, also inside of functions that no test calls."""

from __future__ import annotations

import ast
import importlib

from tests.contract._sources import python_files, shown, tree_of


def test_every_import_of_ours_names_something_that_is_there():
    missing = []
    for path in python_files("tests", "bench", "examples"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_effi" and not node.level:
                module = importlib.import_module(node.module)
                missing += [
                    f"{shown(path)}:{node.lineno}: {node.module} has no {alias.name}"
                    for alias in node.names
                    if not hasattr(module, alias.name) and not _is_module(f"{node.module}.{alias.name}")
                ]
    assert not missing, "\n".join(missing)


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True
