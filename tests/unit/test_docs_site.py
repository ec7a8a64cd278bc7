"""The site builds offline: no warning, every page in the menu, links and anchors lead somewhere, nothing is loaded
from elsewhere.

Every public name has an entry made from its docstring, and on a phone no page is wider than the screen.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from bench import faces
from tests.contract._sources import ROOT
from tests.helpers import browser
from tests.helpers.distributed import child_environment

for _package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install 'hf_effi[docs]'")

from bench import hf_docstrings, site_hooks  # noqa: E402  (they import mkdocs and griffe)


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
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//", re.IGNORECASE)
    styles = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", re.IGNORECASE)
    assert not [page.name for page in site.rglob("*.html") if loaded.search(page.read_text(encoding="utf-8"))]
    assert not [sheet.name for sheet in site.rglob("*.css") if styles.search(sheet.read_text(encoding="utf-8"))]


def test_the_search_works_from_a_folder(site):
    """A page opened as a file may not fetch the index: it is a script, and so is what stands in for the worker."""
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")
    assert 'src="javascripts/iframe-worker.js"' in (site / "index.html").read_text(encoding="utf-8")


def test_every_public_name_has_an_entry(site):
    for face, names in faces.public_names().items():
        page = (site / "reference" / f"{face}.html").read_text(encoding="utf-8")
        entries = {name.path for name in names if faces.described_at()[name.home] == name}
        assert not [path for path in entries if f'id="{path}"' not in page], face
        listed = {faces.described_at()[name.home].path for name in names}
        assert not [path for path in listed if f'#{path}"' not in page], f"{face}: not in its table"


def test_links_within_the_site_lead_somewhere(site):
    """Strict building checks the links of the sources; this one those that the hooks make."""
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html") if page.name != "404.html"}
    anchors = {page: set(re.findall(r"\bid=\"([^\"]+)\"", text)) for page, text in pages.items()}
    lost = set()
    for page, text in pages.items():
        for path, anchor in re.findall(r"<a [^>]*?href=\"(?!\w+:)([^\"#]*)#?([^\"]*)\"", text):
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if target not in pages or (anchor and anchor not in anchors[target] and anchor != "__skip"):
                lost.add(f"{page.relative_to(site)}: {path}#{anchor}")
    assert not lost, sorted(lost)[:10]


@pytest.mark.skipif(browser.BROWSER is None, reason="no chromium to lay the pages out")
def test_no_page_is_wider_than_a_phone(site, tmp_path):
    """Code and wide tables scroll inside themselves, never the page."""
    assert browser.too_wide(site, 390, tmp_path) == {}


def test_names_in_the_text_become_links():
    url = "methods/x.html"
    page = f"../reference/{faces.described_at()[faces.home_key('hf_effi', 'EffiTrainer')].face}.html"
    linked = site_hooks.link_names("<p><code>EffiTrainer</code> and <code>linear</code></p>", url)
    assert linked.startswith(f'<p><a class="name" href="{page}#') and linked.endswith(" and <code>linear</code></p>")
    for same in (
        "<pre><code>EffiTrainer</code></pre>",
        '<a href="x"><code>EffiTrainer</code></a>',
        "<h2>Of <code>EffiTrainer</code></h2>",
        "<code>NoSuchName</code>",
    ):
        assert site_hooks.link_names(same, url) == same
    entry = site_hooks.link_names("<p>Entry points: <code>patch</code>. Then <code>patch</code></p>", url)
    assert entry.count("<a ") == 1 and entry.endswith(". Then <code>patch</code></p>")


def test_references_of_docstrings_become_links():
    path = faces.described_at()[faces.home_key("hf_effi", "LRScheduleCallback")].path
    assert site_hooks.hf_links("see [`LRScheduleCallback`]", "hf_effi") == f"see [`LRScheduleCallback`][{path}]"
    assert site_hooks.hf_links("[`~hf_effi.LRScheduleCallback`]", "") == f"[`LRScheduleCallback`][{path}]"
    assert site_hooks.hf_links("[`~trl.GRPOConfig`] [`Nothing`]", "") == "`GRPOConfig` `Nothing`"
    assert site_hooks.hf_links("[`x`](y) [`x`][y]", "") == "[`x`](y) [`x`][y]"


def test_docstrings_become_markdown():
    text = (
        "Do.\n\nArgs:\n    a, *b (`int`): What\n        to do.\n    c: Third.\n\nRaises:\n    ValueError: never.\n\n"
    )
    text += "Example:\n```python\n>>> 1\n1\n```\nMore."
    assert hf_docstrings.as_markdown(text) == (
        "Do.\n\n**Args**\n\n- **`a`**, **`*b`** (`int`): What\n    to do.\n- **`c`**: Third.\n\n"
        "**Raises**\n\n- **`ValueError`**: never.\n\n**Example**\n\n```pycon\n>>> 1\n1\n```\nMore."
    )
    assert hf_docstrings.as_markdown("Nothing to change.") == "Nothing to change."
    text = "Parameters:\n    > About rows\n\n    model, warmup_*, ...: As there."
    assert hf_docstrings.as_markdown(text) == (
        "**Parameters**\n\n*About rows*\n\n\n- **`model`**, **`warmup_*`**, **`...`**: As there."
    )


def test_pictures_are_small_enough_to_clone():
    large = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert max(large.values()) < 400_000, large
