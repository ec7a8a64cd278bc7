"""What hf_effi raises: the classes that a user can catch are few, in one module, raised, and in the docs."""

from __future__ import annotations

import ast
import builtins
import collections
import importlib
import re
from collections.abc import Iterator

import pytest

from hf_effi import errors
from tests.contract._sources import ROOT, python_files, shown, tree_of

FILES = python_files("hf_effi")
PUBLIC = {name: getattr(errors, name) for name in errors.__all__}
ERRORS = sorted(name for name, cls in PUBLIC.items() if not issubclass(cls, Warning))
WARNINGS = sorted(set(PUBLIC) - set(ERRORS))

#: (file, function) -> why it raises a plain RuntimeError, which no caller should catch: code was used out of order
OUT_OF_ORDER = {
    ("hf_effi/callbacks/layer_modes.py", "stats"): "asked before training has begun",
    ("hf_effi/callbacks/random_ltd.py", "progress"): "asked before training has begun",
    ("hf_effi/demo/measure.py", "elapsed"): "read before it was started",
    ("hf_effi/patching/probe.py", "gradients"): "called outside of compare()",
    ("hf_effi/patching/_wide.py", "_gradients"): "what torch.autograd.grad raises, whose place it takes",
    ("hf_effi/trainers/grpo/deferred.py", "entries_of"): "an override of TRL's seams lost what was put off",
}


def _classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                yield shown(path), node


def _is_exception(file: str, node: ast.ClassDef) -> bool:
    """Whether a class is an exception; read from its bases, so that one in a function is seen as well."""
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    known = {name for name, value in vars(builtins).items() if isinstance(value, type)}
    return any(
        (base in known and issubclass(getattr(builtins, base), BaseException))
        or base in PUBLIC
        or base.endswith(("Error", "Exception", "Warning"))
        for base in bases
    )


EXCEPTIONS = [(file, node) for file, node in _classes() if _is_exception(file, node)]


def _with_function(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield each node in the order of `ast.walk`, with the name of the innermost function that it is in."""
    waiting = collections.deque([(tree, "")])
    while waiting:
        node, function = waiting.popleft()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        waiting.extend((child, function) for child in ast.iter_child_nodes(node))
        yield node, function


def _raised() -> Iterator[tuple[str, int, str, str]]:
    """Yield (file, line, function, class) of every `raise Name(...)`, and of every `return Name(...)` of one."""
    for path in FILES:
        for node, function in _with_function(tree_of(path)):
            value = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
            call = value.func if isinstance(value, ast.Call) else value
            if isinstance(call, ast.Name) and (isinstance(node, ast.Raise) or isinstance(value, ast.Call)):
                yield shown(path), node.lineno, function, call.id


RAISED = list(_raised())


def test_there_are_few_and_each_is_what_python_would_raise():
    assert len(ERRORS) <= 9
    for name in ERRORS:
        assert issubclass(PUBLIC[name], (ValueError, RuntimeError, ImportError)), name
    for name in WARNINGS:
        assert issubclass(PUBLIC[name], UserWarning), name


def test_a_refusal_is_no_broken_file():
    """Whoever catches one must not get another."""
    for one in ERRORS:
        assert [other for other in ERRORS if issubclass(PUBLIC[one], PUBLIC[other])] == [one]


def test_every_public_exception_is_in_one_module():
    found = {node.name for file, node in EXCEPTIONS if file == "hf_effi/errors.py"}
    assert found == set(PUBLIC)
    wrong = [f"{file}: {n.name}" for file, n in EXCEPTIONS if file != "hf_effi/errors.py" and n.name[0] != "_"]
    assert not wrong, f"move them to hf_effi/errors.py, or begin the name with an underscore: {wrong}"


def test_private_ones_that_reach_a_user_are_public_ones():
    """A private class that is no control flow inside one room derives from a public class."""
    control_flow = {
        "_CannotLook",
        "_Cancelled",
        "_KeysKnown",
        "_LogitsAsked",
        "_NotReadError",
        "_NoThreshold",
        "_NotCopyable",
        "_TooLarge",
        "_TooManyOperations",
        "_UsageError",
    }
    private = {node.name: node for file, node in EXCEPTIONS if node.name.startswith("_")}
    assert control_flow <= set(private)
    for name in set(private) - control_flow:
        assert {base.id for base in private[name].bases if isinstance(base, ast.Name)} & set(ERRORS), name


@pytest.mark.parametrize("name", ERRORS)
def test_each_is_raised(name):
    assert [where for where in RAISED if where[3] == name], f"nothing raises {name}"


@pytest.mark.parametrize("name", WARNINGS)
def test_each_warning_is_given(name):
    calls = [
        node
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warn"
    ]
    given = {arg.id for call in calls for arg in call.args if isinstance(arg, ast.Name)}
    assert name in given, f"nothing warns with {name}"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_says_when_and_what_to_do_and_is_in_the_docs(name):
    said = PUBLIC[name].__doc__ or ""
    assert len(said.strip()) > 40
    if name in ERRORS:
        assert "Raised " in said and "What to do: " in " ".join(said.split())
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page.partition("## What you can catch")[2].partition("\n## ")[0]


def test_the_docs_say_the_base_of_each():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+Error)` \|.*\| `(\w+)` \|$", page, re.MULTILINE))
    assert rows == {name: PUBLIC[name].__bases__[0].__name__ for name in ERRORS}


def test_no_face_offers_an_exception_beside():
    from tests.helpers.public import ROOMS

    wrong = [
        f"{room}.{name}"
        for room in ("hf_effi", *ROOMS)
        if room != "hf_effi.errors"
        for name in importlib.import_module(room).__all__
        if isinstance(value := getattr(importlib.import_module(room), name), type) and issubclass(value, BaseException)
    ]
    assert not wrong, f"an exception has one place to be imported from, hf_effi.errors: {wrong}"


def test_nothing_raises_what_cannot_be_told_apart():
    wrong = [f"{f}:{line}: {c}" for f, line, _, c in RAISED if c in ("Exception", "BaseException", "Warning")]
    assert not wrong, f"raise ValueError, or a class of hf_effi.errors: {wrong}"


def test_plain_runtime_errors_have_a_reason():
    found = {(file, function) for file, _, function, cls in RAISED if cls == "RuntimeError"}
    assert found == set(OUT_OF_ORDER), "a refusal is RefusedError; name here what is code out of order"


# --- the reader above, on text with known answers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("class A(ValueError): pass", True),
        ("class A(BaseException): pass", True),
        ("class A(RefusedError): pass", True),
        ("class A(_OtherError): pass", True),
        ("class A(Mapping): pass", False),
        ("class A(dict): pass", False),
    ],
)
def test_exceptions_are_told_from_other_classes(text, expected):
    assert _is_exception("a.py", ast.parse(text).body[0]) is expected
