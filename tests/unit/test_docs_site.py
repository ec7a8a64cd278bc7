"""The site builds offline: no warning, every page in the menu, links and anchors lead somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.contract._sources import ROOT
from tests.helpers.distributed import child_environment

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'hf_effi[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # Strict: missing links, anchors and pages that the menu leaves out are errors, see `validation` in mkdocs.yml.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"'](?:https?:)?//", re.IGNORECASE)
    assert not [page.name for page in site.rglob("*.html") if loaded.search(page.read_text(encoding="utf-8"))]


def test_pictures_are_small_enough_to_clone():
    large = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert max(large.values()) < 400_000, large
