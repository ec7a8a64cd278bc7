"""Every Python block of README and of the method cards runs as it stands, from an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_effi import METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> list[tuple[str, int, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 2
            found.append((page.relative_to(ROOT).as_posix(), line, match.group(1)))
    return found


@pytest.mark.parametrize(("page", "line", "code"), [pytest.param(*b, id=f"{b[0]}:{b[1]}") for b in blocks()])
def test_block_runs(page: str, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Blank lines in front, so that a traceback names the line of the page.
    exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), {"__name__": "__docs__"})


def test_readme_snippets_are_short_and_there_are_three() -> None:
    snippets = [code for page, _, code in blocks() if page == "README.md"]
    assert len(snippets) == 3
    for code in snippets:
        lines = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(lines) < 10, code


def test_every_card_shows_code() -> None:
    shown = {page for page, _, _ in blocks()}
    assert {method.card for method in METHODS if method.status != "rejected"} <= shown
