"""
Hooks of mkdocs: what of the documentation site comes from the sources.

- the menu of the methods, by what a user wants, from `hf_effi.METHODS`;
- the reference, one page per face of `bench.faces`, whose entries mkdocstrings makes from the docstrings;
- a link from every `Name` in the text to its entry in the reference.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `mkdocs build`, unlike `python -m mkdocs`, does not

from bench import faces
from hf_effi.methods import methods_by_goal

METHODS_PAGE, REFERENCE_PAGE = "methods/index.md", "reference.md"
#: tags between which a name stays as it is, and a name in code
_TOKEN = re.compile(r"<(?P<close>/?)(?P<tag>a|pre|h[1-6]|autoref)\b[^>]*>|<code>(?P<name>\w+)(?P<call>\(\))?</code>")


def page_of(face: str) -> str:
    """Return the path of a face's page below `docs/`."""
    return f"reference/{face}.md"


def methods_menu() -> list[Any]:
    """Return the menu below "Methods": the page of all cards, then one section per goal."""
    sections = [
        {title: [{m.title: f"methods/{m.key}.md"} for m in rows]}
        for title, rows in methods_by_goal(first=True).items()
    ]
    return [METHODS_PAGE, *sections]


def reference_menu() -> list[Any]:
    """Return the menu below "Reference": the list of all faces, then the page of each."""
    return [{"Overview": REFERENCE_PAGE}, *({face: page_of(face)} for face in faces.faces())]


def _filled(nav: Any, menus: Mapping[str, list[Any]]) -> Any:
    if isinstance(nav, list):
        return [_filled(item, menus) for item in nav]
    if isinstance(nav, dict):
        return {
            title: menus[to] if isinstance(to, str) and to in menus else _filled(to, menus)
            for title, to in nav.items()
        }
    return nav


def on_config(config: Any) -> Any:
    """Fill the menu."""
    config.nav = _filled(config.nav, {METHODS_PAGE: methods_menu(), REFERENCE_PAGE: reference_menu()})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference, which exist in no folder."""
    for face in faces.faces():
        files.append(File.generated(config, page_of(face), content=face_page(face)))
    return files


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, [":---"] * len(header), *rows))


def _linked(name: faces.Name) -> str:
    return f"[`{name.name}`][{faces.described_at()[name.home].path}]"


def face_page(face: str) -> str:
    """Return the Markdown of a face's page: what it is, its names, and an entry for each that is described here."""
    names = faces.public_names()[face]
    here = [name for name in names if faces.described_at()[name.home] == name]
    rows = [
        [_linked(name), faces.summary_of(*name.home.split(":")) and hf_links(name.summary, face)] for name in names
    ]
    parts = [f"# `{face}`", hf_links(faces.docstring_of(face), face), _table(["name", "what it is"], rows)]
    parts += [f"::: {name.path}" for name in here]
    return "\n\n".join(part for part in parts if part) + "\n"


def faces_table() -> str:
    """Return one row per face: its page, and what it is."""
    rows = []
    for face in faces.faces():
        first = faces.docstring_of(face).split("\n\n")[0]
        rows.append([f"[`{face}`]({page_of(face)})", hf_links(" ".join(first.split()), face)])
    return _table(["import from", "what it holds"], rows)


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Put the list of faces into the first page of the reference."""
    if page.file.src_uri == REFERENCE_PAGE:
        return markdown.replace("<!-- faces -->", faces_table())
    return markdown


def on_page_content(html: str, page: Page, config: Any, files: Files) -> str:
    """Link each public name that the text has in code to its entry."""
    return link_names(html, page.url)


def link_names(html: str, url: str) -> str:
    """
    Return `html` with `<code>Name</code>` linked to the reference, seen from the page at `url`.

    Only names that look like one, with a capital or an underscore: a `linear` in the text is as often a word, but for
    the line of a card that names its entry points. Code blocks, headings and what is a link already stay.
    """
    kept, done, out = [], 0, []
    cards_line = re.search(r"<p>Entry points:.*?(?=\. )", html, re.DOTALL)
    first, last = cards_line.span() if cards_line else (0, 0)
    for token in _TOKEN.finditer(html):
        if token["tag"]:
            if token["close"]:
                kept and kept.pop()
            else:
                kept.append(token["tag"])
        elif kept or (name := _by_name().get(token["name"])) is None:
            continue
        elif re.search(r"[A-Z_]", token["name"]) or first <= token.start() < last:
            target = get_relative_url(page_of(name.face).removesuffix(".md") + ".html", url)
            out += [html[done : token.start()], f'<a class="name" href="{target}#{name.path}">{token[0]}</a>']
            done = token.end()
    return "".join([*out, html[done:]])


def _by_name() -> dict[str, faces.Name]:
    """Return name -> its entry: what `hf_effi` offers under it, or else the only object of this name."""
    found: dict[str, set[str]] = {}
    for names in faces.public_names().values():
        for name in names:
            found.setdefault(name.name, set()).add(name.home)
    top = {name.name: name.home for name in faces.public_names()[faces.TOP]}
    homes = {name: top.get(name) or next(iter(at)) for name, at in found.items() if name in top or len(at) == 1}
    return {name: faces.described_at()[home] for name, home in homes.items()}


def hf_links(text: str, face: str) -> str:
    """
    Turn the references of Hugging Face docstrings, such as ``[`~trl.GRPOConfig`]``, into links where the reference has
    the name, and into plain code elsewhere.
    """

    def link(match: re.Match[str]) -> str:
        path = match.group(2)
        shown = path.rpartition(".")[2] if match.group(1) else path
        parts = path.removeprefix(f"{faces.TOP}.").split(".")
        near = {name.name: faces.described_at()[name.home] for name in faces.public_names().get(face, ())}
        known = {**_by_name(), **near}
        name = next((known[part] for part in parts if part in known), None)
        foreign = "." in path and not path.startswith(faces.TOP) and parts[0] not in known
        return f"`{shown}`" if name is None or foreign else f"[`{shown}`][{name.path}]"

    return re.sub(r"\[`(~?)([\w.]+)(?:\(\))?`\](?![\[(])", link, text)
