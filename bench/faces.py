"""
The public names of hf_effi as a user reaches them, read from the sources without importing them.

A face is `hf_effi`, a public package below it, or a public module beside `hf_effi/__init__.py`, whose source has an
`__all__`. The reference of the docs is one page per face. A name that several faces offer is described on the page of
its room, and the page of `hf_effi` points there.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = "hf_effi"


@dataclass(frozen=True)
class Name:
    """
    A public name.

    Args:
        face (`str`): Dotted path of the face.
        name (`str`): The name in its `__all__`.
        home (`str`): `module:name` where it is defined: equal for one object under several faces.
        summary (`str`): The first sentence of its docstring, or of the `#:` comment above a constant.
    """

    face: str
    name: str
    home: str
    summary: str

    @property
    def path(self) -> str:
        """Dotted path as a user imports it."""
        return f"{self.face}.{self.name}"


def path_of(module: str, root: Path = ROOT) -> Path:
    """Return the file of a module of this repository."""
    base = root.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@functools.cache
def tree_of(module: str, root: Path = ROOT) -> ast.Module:
    """Return the parsed source of a module."""
    return ast.parse(path_of(module, root).read_text(encoding="utf-8"))


def _assigns(node: ast.stmt, variable: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [each for target in targets for each in getattr(target, "elts", [target])]
    return any(isinstance(name, ast.Name) and name.id == variable for name in names)


def _value_of(module: str, variable: str, root: Path) -> ast.expr | None:
    return next((node.value for node in tree_of(module, root).body if _assigns(node, variable)), None)


def names_of(face: str, root: Path = ROOT) -> list[str]:
    """Return `__all__` of a face, sorted; the module is imported where its source computes the list."""
    value = _value_of(face, "__all__", root)
    try:
        names = ast.literal_eval(value)
    except ValueError:
        names = importlib.import_module(face).__all__
    return sorted((name for name in names if not name.startswith("_")), key=lambda name: (name.lower(), name))


@functools.cache
def faces(root: Path = ROOT) -> tuple[str, ...]:
    """Return the dotted paths of all faces, `hf_effi` first."""
    top = root / TOP
    files = [*top.rglob("__init__.py"), *top.glob("*.py")]
    modules = {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for f in files}
    public = [m for m in sorted(modules) if not any(part.startswith("_") for part in m.split("."))]
    return tuple(m for m in public if _value_of(m, "__all__", root) is not None)


def _imports(tree: ast.Module) -> dict[str, tuple[int, str, str]]:
    """Return name -> (level, module, original name) of the imports at the top and below `if TYPE_CHECKING:`."""
    nodes = [n for node in tree.body for n in (node.body if isinstance(node, ast.If) else [node])]
    found = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = (node.level, node.module or "", alias.name)
    return found


def home_of(module: str, name: str, root: Path = ROOT) -> tuple[str, str]:
    """
    Return the module that defines what `module` offers as `name`, and its name there.

    Raises:
        LookupError: the source of `module` neither imports nor defines it.
    """
    imported = _imports(tree_of(module, root)).get(name)
    if imported is None:
        if _definition(module, name, root) is None:
            raise LookupError(f"{module} offers {name!r}, which its source neither imports nor defines.")
        return module, name
    level, target, original = imported
    if level:
        package = module.split(".") if path_of(module, root).name == "__init__.py" else module.split(".")[:-1]
        package = package[: len(package) - level + 1]
        target = ".".join([*package, *([target] if target else [])])
    return home_of(target, original, root) if target.startswith(TOP) else (target, original)


def home_key(module: str, name: str, root: Path = ROOT) -> str:
    """Return `home_of` as `Name.home` writes it."""
    return ":".join(home_of(module, name, root))


def _definition(module: str, name: str, root: Path) -> ast.stmt | None:
    for node in tree_of(module, root).body:
        if _assigns(node, name) or (isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name):
            return node
    return None


def comment_above(source: str, line: int) -> str:
    """
    Return the `#:` comment that ends above a line (counted from 1), as one sentence.

    Example:
    ```python
    >>> comment_above("#: how many\\n#: rows\\nROWS = 3\\n", 3)
    'How many rows.'
    ```
    """
    lines, found = source.splitlines(), []
    while line >= 2 and lines[line - 2].lstrip().startswith("#:"):
        line -= 1
        found.insert(0, lines[line - 1].lstrip()[2:].strip())
    text = " ".join(found)
    return text and text[0].upper() + text[1:].removesuffix(".") + "."


def summary_of(module: str, name: str, root: Path = ROOT) -> str:
    """Return the first sentence that the source says about a name, on one line; `""` for none."""
    node = _definition(module, name, root)
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        text = (ast.get_docstring(node) or "").split("\n\n")[0]
    elif node is None:
        return ""
    else:
        text = comment_above(path_of(module, root).read_text(encoding="utf-8"), node.lineno)
    text = re.sub(r"\s+", " ", text)
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text)[0].rstrip(":")


def docstring_of(face: str, root: Path = ROOT) -> str:
    """Return the docstring of a face; its first sentence stands in the list of faces."""
    return ast.get_docstring(tree_of(face, root)) or ""


@functools.cache
def public_names(root: Path = ROOT) -> dict[str, tuple[Name, ...]]:
    """Return face -> its names, in the order of their pages."""
    found = {}
    for face in faces(root):
        found[face] = tuple(
            Name(face, name, home_key(face, name, root), summary_of(*home_of(face, name, root), root))
            for name in names_of(face, root)
        )
    return found


@functools.cache
def described_at(root: Path = ROOT) -> dict[str, Name]:
    """
    Return the home of each public object -> the name under which the reference describes it.

    That is its room, so that what belongs together is on one page, and `hf_effi` only for what no room offers. Of
    several rooms it is the one with the shortest path: `hf_effi.schedules` before `hf_effi.functional.schedules`.
    """
    every = [name for names in public_names(root).values() for name in names]
    every.sort(key=lambda name: (name.face == TOP, name.face.count("."), name.face))
    return {name.home: name for name in reversed(every)}
