"""Tables of README and docs come from the result files and from nothing else."""

from __future__ import annotations

import json

import pytest

from bench import render, run_missing
from bench._schema import headline, load_results, write_result

TEXT = "Before.\n\n<!-- bench:speed -->\nold\n<!-- /bench -->\n\nAfter. <!-- bench:none -->\n<!-- /bench -->\n"


@pytest.fixture
def folder(tmp_path):
    figures = [headline("ratio", 0.25, "<= 0.4"), headline("gain", -0.5, "> 0"), headline("count", 12345.0)]
    write_result("speed", command="python -m bench.speed", seeds=[0, 1, 2], headline=figures, rows=[], folder=tmp_path)
    return tmp_path


def test_table_has_values_goals_and_where_they_come_from(folder):
    text = render.render_text(TEXT, load_results(folder))
    assert "| `ratio` | 0.25 | <= 0.4 | met |" in text
    assert "| `gain` | -0.5 | > 0 | **not met** |" in text
    assert "| `count` | 12,345 |  |  |" in text
    assert "3 seeds" in text and "`python -m bench.speed`" in text
    assert text.startswith("Before.\n\n<!-- bench:speed -->\n\n| figure") and "old" not in text
    assert "Not measured yet: `python -m bench.none`" in text


def test_rendering_twice_changes_nothing(folder):
    results = load_results(folder)
    once = render.render_text(TEXT, results)
    assert render.render_text(once, results) == once


def test_unknown_view_is_refused(folder):
    with pytest.raises(ValueError, match="README.md: unknown view 'foo'"):
        render.render_text("<!-- bench:speed.foo -->\n<!-- /bench -->", load_results(folder), "README.md")


def test_check_fails_on_a_difference_and_writes_nothing(folder, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    readme, page = root / "README.md", root / "docs" / "page.md"
    readme.write_text(TEXT)
    page.write_text("No table.\n")
    assert render.main(["--check"], root, folder) == 1
    assert readme.read_text() == TEXT and "README.md" in capsys.readouterr().out
    assert render.main([], root, folder) == 0
    assert readme.read_text() != TEXT and page.read_text() == "No table.\n"
    assert render.main(["--check"], root, folder) == 0
    changed = json.loads((folder / "speed.json").read_text())
    changed["headline"][0]["value"] = 0.26
    (folder / "speed.json").write_text(json.dumps(changed))
    assert render.main(["--check"], root, folder) == 1


def test_broken_result_file_is_named(folder):
    (folder / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json"):
        load_results(folder)


def test_headline_refuses_a_verdict_that_disagrees():
    assert headline("x", 2.0, ">= 1", True)["met"] is True
    with pytest.raises(ValueError, match="disagrees"):
        headline("x", 2.0, ">= 1", False)


def test_missing_benches(tmp_path):
    for name in ("a", "b", "_schema", "render", "run_missing"):
        (tmp_path / f"{name}.py").touch()
    names = run_missing.benches(tmp_path)
    assert names == ["a", "b"]
    (tmp_path / "a.json").touch()
    assert run_missing.missing(names, tmp_path) == ["b"]
