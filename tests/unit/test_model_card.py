"""The card's section: BibTeX, schedule and plot, as data in and text out."""

from __future__ import annotations

import logging
import re

import pytest

from hf_effi import _compat
from hf_effi._plots import draw_picture
from hf_effi.hub import model_card
from hf_effi.hub.model_card import PICTURE, add_section, bibtex, training_section
from hf_effi.methods import METHODS, find_method

RATES = [0.0, 5e-5, 1e-4, 1e-4, 5e-5, 0.0]
SPEC = {"kind": "wsd", "params": {"total_steps": 6, "warmup_steps": 2, "floor": None, "values": [1, 2]}}
RECIPE = {
    "methods": ["wsd"],
    "schedule": SPEC,
    "not_carried": {},
    "model": {"name": None, "class": "Qwen3ForCausalLM"},
    "trainer": "transformers.trainer:Trainer",
}


def run_of(rates):
    return {"log_history": [{"step": step, "learning_rate": rate} for step, rate in enumerate(rates, 1)]}


@pytest.fixture
def card(tmp_path):
    model_card._warn_once.cache_clear()

    def write(rates=RATES):
        add_section(tmp_path / "README.md", RECIPE, run_of(rates), "me/run")
        return (tmp_path / "README.md").read_text()

    return write


def parse(text: str) -> dict[str, dict[str, str]]:
    """Return key -> fields of BibTeX, and fail on braces that do not match or on what is left over."""
    entries = {}
    for entry in text.split("\n\n"):
        assert entry.count("{") == entry.count("}")
        head, *fields, end = entry.splitlines()
        key = re.fullmatch(r"@misc\{([a-z0-9]+),", head)[1]
        assert end == "}" and key not in entries
        pairs = [re.fullmatch(r"  (\w+) = \{(.+)\}(,?)", field) for field in fields]
        assert [pair[3] for pair in pairs] == [","] * (len(pairs) - 1) + [""]
        entries[key] = {pair[1]: pair[2] for pair in pairs}
    return entries


def test_bibtex_of_all_methods_parses_without_a_key_twice():
    entries = parse(bibtex(METHODS))
    papers = {method.paper_id: method for method in METHODS if method.paper_id}
    assert {fields["eprint"] for fields in entries.values()} == set(papers)
    for fields in entries.values():
        method = papers[fields["eprint"]]
        assert fields["title"] == f"{{{method.paper}}}" and fields["archivePrefix"] == "arXiv"
        assert fields["year"] == f"20{method.paper_id[:2]}" and fields["url"].endswith(f"/abs/{method.paper_id}")
        assert fields.get("author", "") == method.authors


def test_authors_are_written_as_bibtex_wants_them():
    name = r"[^\W\d_][^,{}]*, [^,{}]+?"
    for method in METHODS:
        assert not method.authors or re.fullmatch(f"{name}( and {name})*( and others)?", method.authors), method.key


def test_methods_of_one_paper_agree_and_share_an_entry():
    for paper_id in {method.paper_id for method in METHODS}:
        assert len({method.authors for method in METHODS if method.paper_id == paper_id}) == 1, paper_id
    assert list(parse(bibtex([find_method("infinite_lr"), find_method("replay")]))) == ["ibrahim2024simple"]


def test_an_entry_without_authors_leaves_them_out():
    import dataclasses

    (fields,) = parse(bibtex([dataclasses.replace(find_method("wsd"), authors="")])).values()
    assert "author" not in fields and fields["eprint"] == "2404.06395"
    assert bibtex([find_method("run_record")]) == ""


def test_the_picture_lies_beside_the_card_and_is_small_and_repeatable(card, tmp_path):
    text = card()
    assert f"![Learning rate, step 1 to 6]({PICTURE})" in text and "```text" not in text
    assert "Schedule: `wsd(total_steps=6, warmup_steps=2)`." in text
    first = (tmp_path / PICTURE).read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) < 30_000
    card()
    assert (tmp_path / PICTURE).read_bytes() == first


def test_the_picture_is_opaque_and_dark_on_white():
    import io

    from matplotlib.image import imread

    pixels = imread(io.BytesIO(draw_picture(range(1, 7), RATES, "optimizer steps", "learning rate")))
    assert (pixels[..., 3] == 1.0).all() and pixels[0, 0, :3].tolist() == [1.0, 1.0, 1.0]
    assert pixels[..., :3].mean(axis=-1).min() < 0.5


def test_without_matplotlib_the_card_keeps_the_text_curve_and_names_the_extra(card, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_compat, "is_available", lambda package: package != "matplotlib")
    with caplog.at_level(logging.WARNING):
        text = card()
        card()
    assert "```text" in text and "step 1 to 6" in text and PICTURE not in text and not (tmp_path / PICTURE).exists()
    assert caplog.text.count("hf_effi[report]") == 1, "told once, not at each checkpoint"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no font")])
def test_a_plot_that_fails_leaves_the_card_with_text(card, monkeypatch, caplog, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(model_card, "draw_picture", fail)
    assert "```text" in card() and str(error) in caplog.text


@pytest.mark.parametrize("rates", [[], [1e-4]])
def test_too_few_points_make_no_plot(card, tmp_path, rates):
    assert "### Learning rate" not in card(rates) and not (tmp_path / PICTURE).exists()


def test_rates_that_are_all_zero_are_drawn(card):
    assert f"]({PICTURE})" in card([0.0, 0.0])


def test_a_stock_schedule_is_named_too():
    recipe = {**RECIPE, "schedule": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {}, "warmup_steps": 5}}
    assert "Schedule: `cosine(warmup_steps=5)`." in training_section(recipe, run_of(RATES), "me/run")
