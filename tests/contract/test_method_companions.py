"""A row in `hf_effi.methods` is a promise: code, card, tests, bench and changelog exist."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import types
from collections import Counter

import pytest

import hf_effi
from hf_effi.methods import GOALS, METHODS, find_method
from tests.contract._sources import ROOT

#: What a card must answer (DESIGN section 3): how a `## ` heading may begin, in lower case.
HEADINGS = {
    "what it changes": ("what it changes",),
    "how to use it": ("use",),
    "settings": ("settings",),
    "equations -> code": ("equation",),
    "when it helps and when it hurts": ("when it helps",),
    "cost": ("cost",),
    "works with / conflicts with": ("works with",),
    "our evidence": ("our evidence", "evidence"),
    "deviations": ("deviations",),
    "licence and paper": ("licence", "license", "paper"),
}
#: A rejected method has figures and a reason, and nothing to use.
REJECTED_HEADINGS = {
    name: HEADINGS[name] for name in ("what it changes", "equations -> code", "our evidence", "licence and paper")
} | {"why it is not a feature": ("why not",)}
KEYS = [method.key for method in METHODS]


@pytest.fixture(params=KEYS)
def method(request):
    return find_method(request.param)


def result_of(method):
    """Return the path of the committed JSON that the method's bench writes."""
    return ROOT / "bench" / "results" / (method.bench.rsplit("/", 1)[-1].removesuffix(".py") + ".json")


def test_keys_are_unique_and_rows_are_complete():
    assert len(KEYS) == len(set(KEYS))
    for row in METHODS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", row.key), row.key
        assert row.status in {"experimental", "stable", "rejected"}, f"{row.key}: status {row.status!r}"
        assert row.goals and set(row.goals) <= set(GOALS), f"{row.key}: goals {row.goals}, known are {sorted(GOALS)}"
        assert row.summary.endswith("."), f"{row.key}: the summary is one sentence"
        assert row.paper_id == "" or re.fullmatch(r"\d{4}\.\d{4,5}", row.paper_id), f"{row.key}: {row.paper_id!r}"
        assert bool(row.authors) == bool(row.paper_id), f"{row.key}: the BibTeX entry of a paper needs its authors"
        if row.status == "rejected":
            assert not row.entry_points, f"{row.key} is rejected: its code stays in bench/"
        else:
            assert row.entry_points and row.tests, row.key


def test_entry_points_resolve(method):
    for entry in method.code:
        module, _, attribute = entry.partition(":")
        assert attribute, f"{method.key}: {entry!r} is not `module:attribute`"
        found = getattr(importlib.import_module(module), attribute, None)
        assert found is not None, f"{method.key}: {module} has no {attribute}"
        assert (found.__doc__ or "").strip(), f"{method.key}: {entry} has no docstring"


def test_card_answers_every_question(method):
    card = ROOT / method.card
    assert card.exists(), f"{method.key}: no card {method.card}"
    text = card.read_text(encoding="utf-8")
    headings = [found.group(1).strip().lower() for found in re.finditer(r"^#{2,3} (.+)$", text, re.MULTILINE)]
    missing = [
        question
        for question, starts in (REJECTED_HEADINGS if method.status == "rejected" else HEADINGS).items()
        if not any(heading.startswith(start) for heading in headings for start in starts)
    ]
    assert not missing, f"{method.card} has no heading for: {', '.join(missing)}"
    assert text.startswith(f"# {method.title}"), f"{method.card} must begin with '# {method.title}'"
    assert method.paper_id in text, f"{method.card} does not name {method.paper_id}"
    assert method.status == "rejected" or "```python" in text, f"{method.card} shows no code"


def test_card_names_its_entry_points(method):
    card = ROOT / method.card
    assert card.exists(), f"{method.key}: no card {method.card}"
    text = card.read_text(encoding="utf-8")
    missing = [entry for entry in method.code if entry.partition(":")[2] not in text]
    assert not missing, f"{method.card} does not mention {missing}"


def test_test_files_exist(method):
    missing = [path for path in method.tests if not (ROOT / path).exists()]
    assert not missing, f"{method.key}: no {missing}"
    if method.status == "rejected":
        return
    assert any("/training/" in path for path in method.tests), f"{method.key}: no test through trainer.train()"
    assert any("/unit/" in path for path in method.tests), f"{method.key}: no test of the pure function"


def test_bench_script_exists(method):
    assert (ROOT / method.bench).exists(), f"{method.key}: no {method.bench}"


def test_a_verdict_is_measured(method):
    if method.status == "experimental":
        return
    result = result_of(method)
    assert result.exists(), f"{method.key} is called {method.status} without {result.relative_to(ROOT)}"
    seeds = json.loads(result.read_text())["seeds"]
    assert len(seeds) >= 3, (
        f"{method.key} is called {method.status} on {len(seeds)} seed(s); a bench entry has at least 3"
    )


def test_changelog_mentions_it(method):
    text = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())  # a line may end inside a title
    assert method.title in text, f"CHANGELOG.md does not mention {method.title!r}"


def test_which_method_places_it(method):
    """Whoever looks for a method by the bottleneck finds it."""
    page = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    placed = f"(methods/{method.key}.md)" in page
    assert placed or method.status == "rejected", f"docs/which-method.md does not place {method.key}"


def test_every_card_has_a_row():
    cards = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    assert cards <= set(KEYS), f"cards without a row in methods.py: {sorted(cards - set(KEYS))}"


#: own fields of the configs that belong to no one method: every schedule, or none
OF_NO_METHOD = {"lr_schedule", "lr_schedule_kwargs", "lr_schedule_on_mismatch", "run_record", "hub_wait_seconds"}


def own_fields() -> set[str]:
    found: set[str] = set()
    for config in (hf_effi.EffiTrainingArguments, hf_effi.EffiSFTConfig, hf_effi.EffiGRPOConfig):
        stock = next(base for base in config.__mro__ if base.__module__.startswith(("trl.", "transformers.")))
        mine = {field.name for field in dataclasses.fields(config)}
        found |= mine - {field.name for field in dataclasses.fields(stock)}
    return found


def test_every_own_field_of_a_config_belongs_to_one_row():
    owners = Counter(argument for row in METHODS for argument in row.arguments)
    assert set(owners) | OF_NO_METHOD == own_fields() and not set(owners) & OF_NO_METHOD
    assert set(owners.values()) == {1}, "two rows have one field"


@pytest.mark.parametrize("row", [row for row in METHODS if row.arguments], ids=lambda row: row.key)
def test_a_method_is_off_by_the_values_that_its_row_names(row):
    field = row.arguments[0]
    for value in row.off:
        assert not row.is_on(types.SimpleNamespace(**{field: value}))
    assert row.is_on(types.SimpleNamespace(**{field: "anything else"})) and not row.is_on(types.SimpleNamespace())


def test_no_entry_point_is_a_door_to_other_methods():
    owners = Counter(entry for row in METHODS for entry in row.entry_points)
    shared = {entry for entry, count in owners.items() if count > 1}
    assert not shared, f"two methods cannot be told apart by {shared}: make it a door of each"
