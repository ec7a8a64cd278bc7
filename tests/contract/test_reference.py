"""
The reference of the docs is made from the sources: every public name is found there, has something said, and has one
entry.
"""

from __future__ import annotations

import importlib

import pytest

import hf_effi
from bench import faces


def test_the_top_is_a_face():
    assert faces.faces()[0] == "hf_effi"
    assert {name.name for name in faces.public_names()["hf_effi"]} == set(hf_effi.__all__) - {"__version__"}


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
        "__init__": 'if TYPE_CHECKING:\n    from .rooms.inner import thing as other\n__all__ = ["alone", '
        '"other"]\nalone = 1\n',
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
