"""Tables of the docs that come from the sources rather than from a measurement: papers and tested versions.

`bench.render` writes them between `<!-- table:NAME -->` and `<!-- /table -->` and checks that they are up to date.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Sequence
from pathlib import Path

from hf_effi.methods import METHODS, Method
from hf_effi.report.card import markdown_table

#: extras for people who work on hf_effi itself
_DEVELOPMENT = ("test", "docs", "all")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(\[[^\]]*\])?([^;]*)")


def papers_table(root: Path, methods: Sequence[Method] = METHODS) -> str:
    """Return one row a method with a paper, by arXiv id, the newest first."""
    rows = [
        [f"[{m.paper_id}](https://arxiv.org/abs/{m.paper_id})", m.paper, f"[{m.title}](methods/{m.key}.md)", m.status]
        for m in sorted(methods, key=lambda m: (m.paper_id, m.key), reverse=True)
        if m.paper_id
    ]
    return markdown_table(["arXiv", "paper", "card", "status"], rows, numbers=False)


def other_sources_table(root: Path, methods: Sequence[Method] = METHODS) -> str:
    """Return one row a method without an arXiv id: where it comes from."""
    rows = [[f"[{m.title}](methods/{m.key}.md)", m.paper, m.status] for m in methods if not m.paper_id]
    return markdown_table(["card", "source", "status"], rows, numbers=False)


def versions_table(root: Path) -> str:
    """Return one row a package: the range that `setup.cfg` accepts and the version of `constraints.txt`."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    tested = dict(
        line.split("==") for line in (root / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    wanted = {"": config["options"]["install_requires"]}
    wanted |= {name: text for name, text in config["options.extras_require"].items() if name not in _DEVELOPMENT}
    rows = [["Python", f"`{config['options']['python_requires']}`", "", "always"]]
    for extra, text in wanted.items():
        for line in text.splitlines():
            if not (found := _REQUIREMENT.match(line.strip())):
                continue
            name, version = found.group(1), found.group(3).strip()
            use = f"extra `{extra}`" if extra else "always"
            rows.append([name, f"`{version}`", tested.get(name, "not in CI"), use])
    return markdown_table(["package", "accepted", "tested", "needed"], rows, numbers=False)


VIEWS = {"papers": papers_table, "other_sources": other_sources_table, "versions": versions_table}
