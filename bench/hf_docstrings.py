"""
Docstrings of the Hugging Face style as Markdown, for mkdocstrings: an extension of griffe.

The style looks like Google's, but its types are Markdown ("`int`, *optional*, defaults to 3"), one entry may name
several arguments, and a reference to a class is a code span in brackets. Griffe's parser of Google's style warns of
the first two.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

from bench import faces
from bench.site_hooks import hf_links

_LISTS = ("Args", "Attributes", "Class attributes", "Parameters", "Raises")
_SECTION = re.compile(rf"^({'|'.join((*_LISTS, 'Returns', 'Yields', 'Example', 'Examples'))}):[ \t]*$", re.MULTILINE)
_NAMES = re.compile(r"^([\w*]+(?:, (?:[\w*]+|\.{3}))*)(?= \(|:)")


def as_markdown(text: str) -> str:
    """
    Return a docstring with its sections as headings and lists.

    Example:
    ```python
    >>> arguments = "Args:\\n    a, b (`int`): What to\\n        add."
    >>> print(as_markdown("Add.\\n\\n" + arguments + "\\n\\nReturns:\\n    `int`: The sum."))
    Add.
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - **`a`**, **`b`** (`int`): What to
        add.
    <BLANKLINE>
    **Returns**
    <BLANKLINE>
    `int`: The sum.
    ```
    """
    first, *rest = _SECTION.split(text)
    parts = [first.strip()]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        # A section ends at the first line that is not indented; an example's fence is not, and ends where it closes.
        lines = body.strip("\n").split("\n")
        end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
        inside = "\n".join(line[4:] for line in lines[:end]).strip("\n")
        parts += [f"**{title}**", _as_list(inside) if title in _LISTS else inside, "\n".join(lines[end:]).strip()]
    return re.sub(r"```python\n(?=\s*>>>)", "```pycon\n", "\n\n".join(part for part in parts if part))


def _as_list(body: str) -> str:
    def entry(line: str) -> str:
        if not line or line.startswith(" "):
            return line
        if line.startswith("> "):  # a heading among the arguments of a config
            return f"\n*{line[2:]}*\n"
        names = _NAMES.match(line)
        if names is None:
            return f"- {line}"
        return "- " + ", ".join(f"**`{name}`**" for name in names[1].split(", ")) + line[names.end() :]

    return "\n".join(entry(line) for line in body.split("\n")).strip("\n")


class HFDocstrings(griffe.Extension):
    """
    Rewrites every docstring of the package before it is rendered; a constant gets the `#:` comment above it.

    Where a face offers a name that a module beside it has too (`gallery` from `.gallery`), the path leads to the
    object, as it does for Python, and not to the module.
    """

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for names in faces.public_names().values():
            for name in names:
                holder = pkg if name.face == faces.TOP else pkg[name.face.split(".")[1:]]
                module = holder.members.get(name.name)
                if isinstance(module, griffe.Module):
                    _rewrite(module.members[name.name])  # no longer reached below, once the module is not
                    holder.set_member(name.name, griffe.Alias(name.name, module.members[name.name], parent=holder))

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        _rewrite(obj)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is None and obj.is_attribute and obj.lineno is not None and isinstance(obj.filepath, Path):
        comment = faces.comment_above(obj.filepath.read_text(encoding="utf-8"), obj.lineno)
        obj.docstring = griffe.Docstring(comment, parent=obj) if comment else None
    if obj.docstring is not None:
        obj.docstring.value = hf_links(as_markdown(obj.docstring.value), obj.module.path)
