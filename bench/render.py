"""Write the tables of README and docs from `bench/results/*.json` and the sources: `python -m bench.render [--check]`.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`, where NAME is a result file without `.json`
(its headline figures), `NAME.arms` for the comparison of the demo's arms, `NAME.parity` for a table of errors,
`NAME.ladder` for the longest sequences, `NAME.reuse` for passes over the prompts, `NAME.cases` for rollouts case by
case, `NAME.rungs` for the savings of GRPO one by one, `NAME.selection_time`, `NAME.selection_split`,
`NAME.selection_controls` and `NAME.selection_start` for the arms of `bench.grpo_selection`,
`NAME.selection_card_METHOD` for those of one method, `NAME.optimizers_card_NAME` for optimizers, `NAME.real_model`, or
`probe_cost.asks_FEATURE` for what one feature asks of a model at the start. `<!-- table:NAME -->` and
`<!-- /table -->` hold a table of `bench.tables`. With `--check` nothing is written, and the exit code is 1 if a table
and its source differ.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import _optimizers_tables, _selection_tables, _zoo_tables, tables
from bench._schema import RESULTS, ROOT, load_results
from hf_effi.report.result_card import markdown_table

_BLOCK = re.compile(r"(<!-- bench:([\w.-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table:([\w.-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def _number(value: Any) -> str:
    if value is None:
        return "not reached"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def headline_table(result: Mapping[str, Any]) -> str:
    """Return the headline figures with their goals, and one line on where they were measured."""
    marks = {True: "met", False: "**not met**", None: ""}
    rows = [
        [f"`{item['name']}`", _number(item["value"]), "" if item["goal"] is None else str(item["goal"])]
        + [marks[item["met"]]]
        for item in result["headline"]
    ]
    return markdown_table(["figure", "value", "goal", ""], rows) + "\n\n" + provenance(result)


def arms_table(result: Mapping[str, Any]) -> str:
    """Return one row per arm of the demo: medians over the seeds, lowest to highest in brackets."""
    from hf_effi.report.comparison import summarize
    from hf_effi.report.page import as_percent, as_points, as_times, speedup

    header = ["arm", "sampled accuracy after equal steps", "gain at equal wall-clock"]
    header += ["speed-up to the baseline's final accuracy, wall-clock", "the same, CPU time"]
    header += ["CPU seconds", "completions generated", "trained on", "tokens forwarded per real token"]
    rows = []
    for row in summarize(result["rows"]).values():
        low, high = (speedup(ratio) for ratio in reversed(row["cpu_seconds_to_target_ratio_range"]))
        rows.append(
            [
                row["title"],
                f"{as_percent(row['sampled'])} ± {100 * row['sampled_ci']:.1f}",
                as_points(row["accuracy_gain_equal_wall_seconds"]),
                as_times(speedup(row["wall_seconds_to_target_ratio"])),
                f"{as_times(speedup(row['cpu_seconds_to_target_ratio']))} ({as_times(low)} to {as_times(high)})",
                f"{sum(row['cpu_seconds'].values()):.0f}",
                f"{row['rows']['generated']:,.0f}",
                f"{row['rows']['trained']:,.0f}",
                f"{row['tokens_forwarded_per_real_token']:.2f}",
            ]
        )
    return markdown_table(header, rows) + "\n\n" + provenance(result)


def parity_table(result: Mapping[str, Any]) -> str:
    """Return one row a mode, batch and P with the largest errors over checkpointing and wrappers."""
    errors: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in result["rows"]:
        if "mode" in row:
            cell = errors.setdefault((row["mode"], row["batch"], row["size"]), {})
            for name in ("loss", "gradient"):
                key = f"{row['precision']} {name}"
                cell[key] = max(cell.get(key, 0.0), row[f"{name}_error"])
    names = list(next(iter(errors.values())))
    rows = [
        [f"`{mode}`", batch, str(size), *(f"{cell[n]:.1e}" for n in names)]
        for (mode, batch, size), cell in errors.items()
    ]
    return markdown_table(["mode", "batch", "P", *names], rows)


def ladder_table(result: Mapping[str, Any]) -> str:
    """
    Return one row per arm of `bench.long_sequence`: medians over the seeds, lengths also over those of the first arm.
    """
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        if "arm" in row:
            arms.setdefault(row["arm"], []).append(row)
    lengths = {arm: statistics.median(row["longest"] for row in rows) for arm, rows in arms.items()}
    shortest = next(iter(lengths.values()))
    rows = []
    for arm, mine in arms.items():
        times = [row["time_over_checkpoint"] for row in mine if row["time_over_checkpoint"] is not None]
        time = f"{statistics.median(times):.2f}" if times else "not measured"
        rows.append([arm, f"{lengths[arm]:,.0f}", f"{lengths[arm] / shortest:.1f}x", time])
    header = ["switches", "longest sequence, tokens", "over plain", "CPU time per token over plain checkpointing"]
    return markdown_table(header, rows) + "\n\n" + provenance(result)


def cases_table(result: Mapping[str, Any]) -> str:
    """Return one row per case of `bench.rollouts`: CPU seconds of stock, and the ratio of each arm to them."""
    cases: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault((row["prompts"], row["group"]), {})[row["arm"]] = row
    arms = [arm for arm in next(iter(cases.values())) if arm != "stock"]
    rows = [
        [f"{prompts}, groups of {group}", f"{case['stock']['generation_cpu_seconds']:.2f}"]
        + [f"{case[arm]['ratio_to_stock']:.2f}" for arm in arms]
        for (prompts, group), case in cases.items()
    ]
    header = ["prompts", "CPU seconds of stock `generate`"]
    return markdown_table([*header, *(f"{arm}, of stock's" for arm in arms)], rows) + "\n\n" + provenance(result)


def rungs_table(result: Mapping[str, Any]) -> str:
    """Return one row per rung of `bench.grpo_exact`: prompts, share of dead groups, and what the savings cost."""
    rows = []
    for row in result["rows"]:
        if "arm" not in row:
            continue
        peak = row["peak_live_mib"]
        rows.append(
            [
                f"{row['prompts']}, {row['dead_groups']:.0%} dead",
                row["arm"],
                f"{row['train_phase_cpu_seconds']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['speedup_over_token_ratio']:.2f}",
                f"{row['tokens_forwarded_per_token_prompts_once']:.2f}",
                "" if peak is None else f"{peak:.0f}",
            ]
        )
    header = ["prompts, groups", "savings", "CPU seconds of the train phase", "over stock", "of what the tokens allow"]
    header += ["tokens forwarded per token, a prompt once", "peak live MiB"]
    return markdown_table(header, rows) + "\n\n" + provenance(result)


def provenance(result: Mapping[str, Any]) -> str:
    """Return hardware, versions, seeds, date, commit and command as one small line."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "trl") if name in result["versions"]
    )
    seeds = len(result["seeds"])
    return (
        f"<sub>{result['date']}, commit {result['commit'] or 'unknown'}, {seeds} seed{'s' * (seeds != 1)}; {machine}; "
        f"{versions}; `{result['command']}`</sub>"
    )


def probe_table(feature: str, result: Mapping[str, Any]) -> str:
    """
    Return one row a model of `bench.probe_cost`: what a feature asks when it is switched on, medians over the seeds.
    """
    mine = [row for row in result["rows"] if row["feature"] == feature]
    rows = []
    for model in dict.fromkeys(row["model"] for row in mine):
        of_model = [row for row in mine if row["model"] == model]
        seconds = statistics.median(row["cpu_seconds"] for row in of_model)
        share = statistics.median(row["share_of_100_updates"] for row in of_model)
        peak = next(row["peak_bytes"] for row in of_model if "peak_bytes" in row)
        rows.append([f"{model} parameters", f"{seconds:.2f}", f"{peak / 2**20:,.0f}", f"{100 * share:.1f} %"])
    header = ["asked once, at the start", "CPU seconds, one thread", "MiB beside the model, at most"]
    header += ["of 100 updates of one row of 256 tokens"]
    return markdown_table(header, rows) + "\n\n" + provenance(result)


def reuse_table(result: Mapping[str, Any]) -> str:
    """Return one row per generation size, arm and pass of `bench.spec_rl`: means over the seeds."""
    arms: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        if "seed" in row:
            arms.setdefault((row["generation"], row["arm"]), []).append(row)
    first = next(arm for _, arm in arms)
    rows = []
    for (generation, arm), mine in arms.items():
        for number in range(len(mine[0]["reward"])):

            def mean(name: str, of: list[Mapping[str, Any]] = mine, number: int = number) -> float:
                return statistics.fmean(row[name][number] for row in of)

            seconds = mean("generation_cpu_seconds")
            ratio = seconds / mean("generation_cpu_seconds", arms[generation, first])
            last = number == len(mine[0]["reward"]) - 1
            rows.append(
                [
                    f"{generation}, {arm}, pass {number + 1}",
                    f"{100 * mean('tokens_reused'):.1f} %",
                    f"{100 * mean('whole_completions'):.1f} %",
                    f"{seconds:.1f} ({ratio:.2f}x)",
                    f"{mean('reward'):.3f}",
                    f"{mean('entropy'):.3f}",
                    f"{statistics.fmean(row['held_out_sampled'] for row in mine):.3f}" if last else "",
                ]
            )
    header = ["completions, arm, pass", "tokens reused", "completions reused whole"]
    header += ["CPU seconds of generation (over no reuse)", "reward in training", "entropy"]
    return markdown_table([*header, "held-out accuracy at the end"], rows) + "\n\n" + provenance(result)


#: what `bench.probe_cost` measures; each is a view of its own, for the card of that name
PROBED = "exact_savings", "chunk_flow", "varlen_attention", "shared_prefix", "stream_layer", "tiled_mlp", "tiled_loss"

_VIEWS = {
    "": headline_table,
    "arms": arms_table,
    "parity": parity_table,
    "ladder": ladder_table,
    "reuse": reuse_table,
    "cases": cases_table,
    "rungs": rungs_table,
    **{f"asks_{feature}": functools.partial(probe_table, feature) for feature in PROBED},
    "real_model": _selection_tables.real_model_table,
    **{f"selection_{name}": view for name, view in _selection_tables.VIEWS.items()},
    **{f"optimizers_{name}": view for name, view in _optimizers_tables.VIEWS.items()},
    **{f"zoo_{name}": view for name, view in _zoo_tables.VIEWS.items()},
}


def render_text(text: str, results: Mapping[str, Mapping[str, Any]], source: str = "text") -> str:
    """
    Return `text` with every marked table rendered from `results`; a table whose result is missing says so.

    Raises:
        ValueError: a marker names a view that does not exist.
    """

    def table(match: re.Match[str]) -> str:
        name, _, view = match.group(2).partition(".")
        if view not in _VIEWS:
            known = ", ".join(f"`{view}`" for view in _VIEWS if view)
            raise ValueError(f"{source}: unknown view {view!r} of bench {name!r}. Known: none, or {known}.")
        if name not in results:
            body = f"*Not measured yet: `python -m bench.{name}` writes `bench/results/{name}.json`.*"
        else:
            body = _VIEWS[view](results[name])
        return f"{match.group(1)}\n{body}\n\n{match.group(4)}"

    return _BLOCK.sub(table, text)


def render_tables(text: str, root: Path = ROOT, source: str = "text") -> str:
    """
    Return `text` with every table of `bench.tables` made from the sources below `root`.

    Raises:
        ValueError: a marker names a table that does not exist.
    """

    def table(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in tables.VIEWS:
            raise ValueError(f"{source}: unknown table {name!r}. Known: {', '.join(tables.VIEWS)}.")
        return f"{match.group(1)}\n{tables.VIEWS[name](root)}\n\n{match.group(4)}"

    return _TABLE.sub(table, text)


def documents(root: Path = ROOT) -> list[Path]:
    """Return the files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def main(arguments: list[str] | None = None, root: Path = ROOT, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is not up to date")
    args = parser.parse_args(arguments)
    results, stale = load_results(folder), []
    for path in documents(root):
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        rendered = render_tables(render_text(text, results, path.name), source=path.name)
        if rendered != text:
            stale.append(path.relative_to(root))
            if not args.check:
                path.write_text(rendered, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'tables are stale, run `python -m bench.render`' * args.check or 'rendered'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
