"""What is committed is meant for strangers: no path of somebody's machine, no note to oneself."""

from __future__ import annotations

import re

from tests.contract._sources import ROOT, committed_files

# Written so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(
    r"(?<![\w.])/(?:" + "|".join(["wo" + "rk", "ho" + "me", "ro" + "ot", "Us" + "ers"]) + r")/[\w.]"
)
NOTES = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
#: "one number a" + " row" is "one number per row"; words after which `a row` is a row are let through
RATES = re.compile(
    r"\b(?:one|each|once|twice|bytes) "
    r"(?!(?:and|after|as|at|before|while|but|by|for|from|in|into|is|of|on|or|than|to|with|has|share)\b)"
    r"(?:\w+ )?an? "
    r"(?:row|step|token|rank|layer|save|prompt|process|group|parameter|generation|epoch|method|element|update)"
    r"\b(?! (?:is|has|of|keeps|that))"
)
TEXT = {
    ".py",
    ".md",
    ".cfg",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
    ".json",
    ".ipynb",
    ".jinja",
    ".css",
    ".js",
    ".html",
    ".cff",
    ".sh",
    ".in",
    "",
}


def findings(pattern: re.Pattern[str], text: str, name: str) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def search(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in committed_files():
        if path.suffix in TEXT and path.name != "LICENSE":
            found += findings(pattern, path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    return found


def test_no_path_of_a_machine():
    found = search(MACHINE_PATHS)
    assert not found, "paths that exist on one machine only:\n" + "\n".join(found)


def test_no_note_to_oneself():
    found = search(NOTES)
    assert not found, "finish it, or open an issue:\n" + "\n".join(found)


def test_per_is_said_where_per_is_meant():
    found = search(RATES)
    assert not found, "say `one number per row`:\n" + "\n".join(found)


def test_the_patterns_find_what_they_should():
    slash = "/"
    for path in (f"{slash}work{slash}x", f"cd {slash}home{slash}me", f'"{slash}root{slash}.cache"'):
        assert findings(MACHINE_PATHS, path, "f") == [f"f:1: {path}"]
    for fine in ("the work/life of", "frame.work/x", "https://host/work/", f"a{slash}work{slash}x"):
        assert not findings(MACHINE_PATHS, fine, "f")
    for rate in ("one number a " + "row", "bytes a " + "token", "once an " + "epoch"):
        assert findings(RATES, rate, "f")
    assert not findings(RATES, "one after a layer ran; forward a prompt once for all; once a run has begun", "f")
    assert findings(NOTES, f"x = 1  # {chr(84)}ODO later", "f")
    assert not findings(NOTES, "todos; method", "f")


def test_only_text_and_pictures_are_committed():
    allowed = TEXT | {".png", ".svg", ".typed"}
    odd = [str(path.relative_to(ROOT)) for path in committed_files() if path.suffix not in allowed]
    large = [str(path.relative_to(ROOT)) for path in committed_files() if path.stat().st_size > 1_000_000]
    assert not odd, f"not text: {odd}"
    assert not large, f"over 1 MB: {large}"
