"""`docs/adding_a_method.md` is true: its files exist, its counts are right, and they hold what a row promises."""

from __future__ import annotations

import re

import pytest

from hf_effi.methods import METHODS
from tests.contract._sources import PACKAGE, ROOT
from tests.contract.test_import_arrows import FLOORS

GUIDE = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
#: "A new <what> touches <n> files" and the list below it
LISTS = {
    found[1]: (int(found[2]), re.findall(r"^- `(.+)`$", found[3], re.MULTILINE))
    for found in re.finditer(r"^A new ([\w ]+) touches (\d+) files.*:\n\n((?:- .+\n)+)", GUIDE, re.MULTILINE)
}
MOST = 8
#: rooms that the first one who needs them opens
NOT_YET: tuple[str, ...] = ()


def test_a_selector_and_an_optimizer_are_listed():
    assert set(LISTS) == {"prompt selector", "optimizer"}


@pytest.mark.parametrize("what", LISTS)
def test_the_count_is_that_of_the_list_and_small(what: str):
    count, files = LISTS[what]
    assert count == len(files) == len(set(files)) <= MOST


@pytest.mark.parametrize("what", LISTS)
def test_a_file_that_is_changed_exists_and_one_that_is_new_has_a_place(what: str):
    for name in LISTS[what][1]:
        path = ROOT / name
        if path.relative_to(ROOT).parts[:2] in {("hf_effi", room) for room in NOT_YET}:
            assert path.relative_to(PACKAGE).parts[0] in FLOORS
        elif "<key>" in name:
            assert path.parent.is_dir(), name
        else:
            assert path.is_file(), name


def test_a_room_that_is_not_yet_there_is_not_yet_there():
    assert not [room for room in NOT_YET if (PACKAGE / room).exists()], "drop it from NOT_YET, and mend the guide"


@pytest.mark.parametrize("what", LISTS)
def test_the_list_has_what_the_companions_of_a_row_are(what: str):
    """What `test_method_companions.py` asks of every row: two tests, a card, a bench, a line."""
    files = LISTS[what][1]
    row = next(method for method in METHODS if method.status == "experimental")
    asked = {row.card.replace(row.key, "<key>"), "bench/<key>.py", "CHANGELOG.md"}
    asked |= {f"tests/{kind}/test_<key>.py" for kind in ("unit", "training")}
    assert asked <= set(files)
    assert [name for name in files if name.startswith("hf_effi/_methods/")]


def test_what_is_named_in_the_guide_exists():
    named = {name for name in re.findall(r"`((?:hf_effi|tests|docs|bench)/[\w/.]+)`", GUIDE) if "<" not in name}
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing and len(named) > 20, missing


def test_rendered_pages_are_rendered():
    (sentence,) = re.findall(r"Made by `python -m bench.render`: (.+?)\.\s", GUIDE, re.DOTALL)
    pages = re.findall(r"`(docs/[\w/.-]+\.md)`", sentence)
    assert len(pages) == 4
    assert all("<!-- table:" in (ROOT / page).read_text(encoding="utf-8") for page in pages)
