"""Reading upstream source: what a name is, what a function takes, reads, calls and branches on."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from typing import Any

import pytest


def resolve(path: str) -> Any:
    """Return the object at `module:attribute.attribute`."""
    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            pytest.fail(f"{path} is gone: {attribute!r} not found in {found!r}")
        found = getattr(found, attribute)
    return found


def parameters_of(path: str) -> str:
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return " ".join(marks.get(p.kind, "") + p.name for p in inspect.signature(resolve(path)).parameters.values())


def tree_of(path: str) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(resolve(path)))))


def dotted(node: ast.AST) -> str | None:
    """Return `a.b` for an attribute chain on `self` or `super()`, without the head."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    on_self = isinstance(node, ast.Name) and node.id == "self"
    on_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return ".".join(reversed(names)) if names and (on_self or on_super) else None


def attributes_read(path: str) -> set[str]:
    chains = {chain for node in ast.walk(tree_of(path)) if (chain := dotted(node))}
    return {".".join(chain.split(".")[:depth]) for chain in chains for depth in range(1, chain.count(".") + 2)}


def calls_in_order(path: str) -> list[str]:
    """Return what is called on `self` or `super()`, in source order."""
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    return [name for node in calls if (name := dotted(node.func))]


def compared_with(test: ast.AST, attribute: str) -> set[str]:
    """Return the strings that `self.<attribute>` is compared with in one `if`."""
    found: set[str] = set()
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and dotted(node.left) == attribute:
            found |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return found


def branches(path: str, attribute: str) -> list[list[tuple[set[str], str]]]:
    """Return each `if/elif` chain on `self.<attribute>` as [(compared strings, source of the branch), ...]."""
    tree = tree_of(path)
    continued = {id(node.orelse[0]) for node in ast.walk(tree) if isinstance(node, ast.If) and len(node.orelse) == 1}
    chains = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.If) or id(node) in continued or not compared_with(node.test, attribute):
            continue
        chain, link = [], node
        while True:
            chain.append((compared_with(link.test, attribute), "\n".join(map(ast.unparse, link.body))))
            if len(link.orelse) != 1 or not isinstance(link.orelse[0], ast.If):
                break
            link = link.orelse[0]
        chains.append(chain)
    return chains
