"""`hf_effi.__all__`, the table of lazy names, the editor's imports and the reference of the docs say the same."""

from __future__ import annotations

import ast
import importlib

import pytest

import hf_effi
from bench import faces
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


def test_every_public_name_is_in_the_reference():
    """Its entry is made from the docstring: found in the sources, with a first sentence, on the page of one face."""
    names = {name.name: name for name in faces.public_names()["hf_effi"]}
    assert set(names) == set(hf_effi._PUBLIC)
    for name in names.values():
        module, _, attribute = name.home.partition(":")
        assert getattr(importlib.import_module(module), attribute) is getattr(hf_effi, name.name), name


@pytest.mark.parametrize("face", faces.faces())
def test_what_a_face_promises_is_found_in_its_source(face):
    module = importlib.import_module(face)
    assert {name.name for name in faces.public_names()[face]} == {n for n in module.__all__ if not n.startswith("_")}
    for name in faces.public_names()[face]:
        home, _, attribute = name.home.partition(":")
        assert getattr(importlib.import_module(home), attribute) is getattr(module, name.name), name.path
        assert name.summary, f"{name.path} has no docstring, and no `#:` comment above it"


def test_an_object_has_one_entry_in_the_shortest_room(tmp_path):
    package = tmp_path / "hf_effi"
    for name, text in {
        "__init__": 'if TYPE_CHECKING:\n    from .rooms.inner import thing as other\n__all__ = ["alone", "other"]\nalone = 1\n',
        "rooms/__init__": 'from .inner import thing\n__all__ = ["thing"]\n',
        "rooms/inner/__init__": 'from ._deep import thing\n__all__ = ["thing"]\n',
        "rooms/inner/_deep": 'def thing():\n    """Do it well. And\n    more."""\n',
        "_private": '__all__ = ["hidden"]\nhidden = 1\n',
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    assert faces.faces(tmp_path) == ("hf_effi", "hf_effi.rooms", "hf_effi.rooms.inner")
    entries = {home: name.path for home, name in faces.described_at(tmp_path).items()}
    assert entries == {"hf_effi:alone": "hf_effi.alone", "hf_effi.rooms.inner._deep:thing": "hf_effi.rooms.thing"}
    assert faces.described_at(tmp_path)["hf_effi.rooms.inner._deep:thing"].summary == "Do it well."
    with pytest.raises(LookupError, match="hf_effi offers 'lost'"):
        faces.home_of("hf_effi", "lost", tmp_path)
