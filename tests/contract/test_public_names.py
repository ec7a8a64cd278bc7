"""`hf_effi.__all__`, the table of lazy names and the editor's imports say the same."""

from __future__ import annotations

import ast
import importlib

import pytest

import hf_effi
from tests.contract._sources import PACKAGE, tree_of


def test_all_is_the_lazy_table():
    assert set(hf_effi.__all__) == {"__version__", *hf_effi._PUBLIC}
    assert len(hf_effi.__all__) == len(set(hf_effi.__all__))
    assert set(hf_effi.__all__) <= set(dir(hf_effi))


@pytest.mark.parametrize("name", sorted(hf_effi._PUBLIC))
def test_every_public_name_resolves(name):
    module = importlib.import_module(hf_effi._PUBLIC[name])
    assert getattr(hf_effi, name) is getattr(module, name)


@pytest.mark.parametrize("name", sorted(hf_effi._PUBLIC))
def test_every_public_object_has_a_docstring(name):
    value = getattr(hf_effi, name)
    if isinstance(value, type) or callable(value):
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_editors_see_the_same_names():
    block = next(node for node in tree_of(PACKAGE / "__init__.py").body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"hf_effi.{node.module}"
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == hf_effi._PUBLIC
