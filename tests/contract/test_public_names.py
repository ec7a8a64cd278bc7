"""`hf_effi.__all__`, the table of lazy names, the editor's imports and docs/reference.md say the same."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys

import pytest

import hf_effi
from tests.contract._sources import PACKAGE, ROOT, tree_of
from tests.contract.test_import_arrows import _absolute
from tests.helpers.distributed import child_environment
from tests.helpers.public import ROOMS

FACES = ("hf_effi", *ROOMS)
LAZY = tuple(name for name in FACES if hasattr(importlib.import_module(name), "_PUBLIC"))
NAMES = [(module, name) for module in FACES for name in importlib.import_module(module).__all__]


def test_the_top_has_about_25_names():
    assert 20 <= len(hf_effi.__all__) <= 30


@pytest.mark.parametrize("module", LAZY)
def test_all_is_the_lazy_table(module):
    face = importlib.import_module(module)
    assert set(face.__all__) - {"__version__"} == set(face._PUBLIC)
    assert len(face.__all__) == len(set(face.__all__))
    assert set(face.__all__) <= set(dir(face))


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_public_name_resolves_and_has_a_docstring(module, name):
    face = importlib.import_module(module)
    value = getattr(face, name)
    if module in LAZY and name != "__version__":
        assert value is getattr(importlib.import_module(face._PUBLIC[name]), name)
    if isinstance(value, type) or callable(value):
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize("module", LAZY)
def test_no_lazy_name_is_a_submodule(module):
    """Whoever imports the submodule first would get the module in place of the object."""
    face = importlib.import_module(module)
    assert not set(face.__all__) & {found.name for found in pkgutil.iter_modules(face.__path__)}


@pytest.mark.parametrize("module", LAZY)
def test_editors_see_the_same_names(module):
    path = PACKAGE.parent.joinpath(*module.split(".")) / "__init__.py"
    block = next(node for node in tree_of(path).body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: _absolute(node, path)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == importlib.import_module(module)._PUBLIC


@pytest.mark.parametrize(
    "name", sorted({name for module, name in NAMES if module != "hf_effi"} - set(hf_effi.__all__))
)
def test_a_name_of_a_room_is_not_at_the_top_and_the_message_says_where_it_is(name):
    with pytest.raises(AttributeError, match=rf"from hf_effi\.[a-z.]+ import {name}`"):
        getattr(hf_effi, name)


def test_rooms_are_reached_from_the_top_without_an_import_of_their_own():
    code = "import hf_effi; hf_effi.trainers.mixins.SamplerMixin, hf_effi.trainers.grpo.EffiGRPOConfig"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=child_environment(), cwd=ROOT)
