"""`hf-effi demo`: checkpoint, arms, table, report page, model folder."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .._files import save_json
from .._untrusted import stored_json
from ..report.comparison import summarize
from ..report.page import write_page
from ..report.result_card import markdown_table, write_card
from ..report.result_record import headline, make_record
from .arms import BASELINE, Arm, choose_arms
from .measure import Accuracy
from .policy import prepare_policy
from .run import DemoSettings, grpo_arguments, run_arms
from .table import render_table, table_cells
from .task import held_out_problems

#: The base is usable between these: below, groups are all wrong; above, there is nothing left to learn.
USABLE_SAMPLED_ACCURACY = (0.25, 0.55)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Only the progress bar and the table reach the terminal; loggers are put back afterwards."""
    import datasets
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    root_level = logging.getLogger("trl").level
    logging.getLogger("trl").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        logging.getLogger("trl").setLevel(root_level)
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers.utils.logging.enable_progress_bar()


def pick_result_arm(arms: Sequence[Arm]) -> str:
    """Return the arm whose policy is kept: the last that is not a control."""
    return [arm.key for arm in arms if not arm.control][-1]


def run_demo(
    output_dir: Path,
    settings: DemoSettings,
    seeds: Sequence[int] = (0,),
    *,
    arms: Sequence[Arm] | None = None,
    command: str = "hf-effi demo",
    show_progress: bool = True,
    goals: bool = True,
) -> dict[str, Any]:
    """
    Run the demo and leave `model/`, `report.html` and `results.json` in `output_dir`.

    Args:
        goals (`bool`, *optional*, defaults to `True`): Whether the headline figures have goals. A run that learns
            nothing has none.

    A seed whose records are already in `output_dir / "cache"` for the same settings and arms is not run again.

    Returns:
        `dict`: The result, in the schema of `hf_effi.report.result_record`.
    """
    arms = choose_arms() if arms is None else tuple(arms)
    # One thread: two threads on two busy cores were seen 40 times slower, and CPU seconds would mean nothing.
    torch.set_num_threads(1)
    output_dir.mkdir(parents=True, exist_ok=True)
    held_out = held_out_problems(settings.held_out_per_length, settings.min_terms, settings.max_terms)
    with quiet_libraries():
        if show_progress:
            print(f"1/2  Teaching a small policy the task (kept in {output_dir / 'base'}) ...", flush=True)
        checkpoint, start = prepare_policy(settings.policy, held_out, output_dir / "base", show_progress)
        if show_progress:
            print(
                f"     It starts at {100 * start.sampled:.1f} % sampled, {100 * start.greedy:.1f} % greedy accuracy."
            )
            print(f"2/2  {len(arms)} arms x {settings.steps} steps x {len(seeds)} seeds, in turns ...", flush=True)
        records = []
        for seed in seeds:
            records += _records_of_seed(
                arms,
                settings,
                checkpoint,
                start,
                held_out,
                seed=seed,
                output_dir=output_dir,
                show_progress=show_progress,
            )
    result = build_result(records, settings, arms, seeds=seeds, command=command, goals=goals)
    save_json(output_dir / "results.json", result, indent=1)
    write_page(result, output_dir / "report.html")
    write_model_card(result, settings, arms, output_dir)
    return result


def _records_of_seed(
    arms: Sequence[Arm],
    settings: DemoSettings,
    checkpoint: Path,
    start: Accuracy,
    held_out: Sequence[Any],
    *,
    seed: int,
    output_dir: Path,
    show_progress: bool,
) -> list[dict[str, Any]]:
    # Arms of a seed are one unit: a ratio of times needs both to have run side by side.
    cached, key = output_dir / "cache" / f"seed-{seed}.json", _fingerprint(settings, arms)
    if (stored := stored_json(cached)) is not None and stored.get("settings") == key:
        return stored["records"]
    total, done = sum(settings.steps_of(arm.goes_on) for arm in arms), {}
    with tqdm(total=total, unit="step", disable=not show_progress, desc=f"seed {seed}", smoothing=0.05) as bar:

        def on_step(arm: str, step: int) -> None:
            bar.update(step - done.get(arm, 0))
            done[arm] = step
            bar.set_postfix_str(arm, refresh=False)

        records = run_arms(
            arms,
            settings,
            checkpoint,
            start=start,
            held_out=held_out,
            seed=seed,
            keep_policy_of=pick_result_arm(arms),
            on_step=on_step,
            output_dir=output_dir,
        )
    save_json(cached, {"settings": key, "records": records})
    return records


def _fingerprint(settings: DemoSettings, arms: Sequence[Arm]) -> dict[str, Any]:
    """What a cached seed must agree with; through JSON, so that tuples and lists compare equal."""
    return json.loads(json.dumps({"settings": asdict(settings), "arms": {a.key: _options(a) for a in arms}}))


def _options(arm: Arm) -> dict[str, Any] | None:
    return None if arm.options is None else dict(arm.options)


def build_result(
    records: Sequence[dict[str, Any]],
    settings: DemoSettings,
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    command: str,
    goals: bool = True,
) -> dict[str, Any]:
    """Return the result file: headline figures, and one row a (seed, arm) that carries the shared settings too."""
    rows = [{**record, "settings": asdict(settings)} for record in records]
    figures = headlines(summarize(records), pick_result_arm(arms))
    if not goals:
        figures = [headline(figure["name"], figure["value"]) for figure in figures]
    return make_record("demo", command, seeds, figures, rows)


def headlines(summary: dict[str, dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Return the named figures; which exist depends on the arms that ran."""
    best, tokens = summary[ours], "tokens_forwarded_per_real_token"
    ratio = best["cpu_seconds_to_target_ratio"]
    figures = [
        headline("heldout_accuracy_gain_equal_wallclock", best["accuracy_gain_equal_wall_seconds"], "> 0"),
        headline("heldout_accuracy_gain_equal_cpu_seconds", best["accuracy_gain_equal_cpu_seconds"], "> 0"),
        headline("wallclock_ratio_to_baseline_accuracy", best["wall_seconds_to_target_ratio"], "<= 0.4"),
        headline("cpu_seconds_ratio_to_baseline_accuracy", ratio, "<= 0.4"),
        headline("everything_speedup_to_baseline_accuracy", None if not ratio else 1 / ratio, ">= 2.5"),
        headline(f"{tokens}_stock", summary[BASELINE][tokens]),
        headline(f"{tokens}_ours", best[tokens], "<= 1.15"),
    ]
    if "exact" in summary:
        figures.append(headline("exact_savings_step_speedup", summary["exact"]["step_speedup"], ">= 1.6"))
    if "random" in summary:
        control = summary["random"]["cpu_seconds_to_target_ratio"]
        figures.append(headline("random_rows_speedup_to_baseline_accuracy", None if not control else 1 / control))
    return figures


def write_model_card(result: dict[str, Any], settings: DemoSettings, arms: Sequence[Arm], output_dir: Path) -> Path:
    """Write the card of the kept policy: exact arguments, the measured table, the command."""
    ours = next(arm for arm in arms if arm.key == pick_result_arm(arms))
    summary, start = summarize(result["rows"]), result["rows"][0]["curve"][0]
    row = summary[ours.key]
    seed = result["seeds"][-1]
    kept = next(record for record in result["rows"] if (record["arm"], record["seed"]) == (ours.key, seed))["curve"][
        -1
    ]
    trainer = "GRPOTrainer" if ours.options is None else "EffiGRPOTrainer"
    recipe = {"trainer": trainer, "arguments": {**grpo_arguments(settings, seed, "out"), **(_options(ours) or {})}}
    recipe |= {"starting_policy": asdict(settings.policy), "task": "hf_effi.demo.task"}
    return write_card(
        output_dir / "model",
        name="hf_effi demo: chains of one-digit sums",
        summary=(
            "A small Qwen3 policy, built and trained on a CPU without any download: supervised fine-tuning on worked "
            f"solutions and lazy guesses, then GRPO with `{trainer}` ({row['title']}). Prompts look like `7-3+3+9=`."
        ),
        tags=["trl", "grpo", "hf_effi", "demo"],
        arguments=recipe,
        table=markdown_table(*table_cells(summary)),
        command=result["command"],
        versions=result["versions"],
        notes=[
            f"Seeds: {', '.join(map(str, result['seeds']))}; this policy is that of seed {seed} after {kept['step']} "
            f"steps: {100 * kept['sampled']:.1f} % sampled, {100 * kept['greedy']:.1f} % greedy. "
            f"Before GRPO: {100 * start['sampled']:.1f} % sampled, "
            f"{100 * start['greedy']:.1f} % greedy.",
            "The control keeps the same number of rows, chosen at random.",
        ],
        metrics={"held-out sampled accuracy": kept["sampled"], "held-out greedy accuracy": kept["greedy"]},
    )


def main(
    output_dir: str,
    *,
    seeds: Sequence[int],
    steps: int | None,
    arms: Sequence[str] | None,
    quick: bool,
    as_json: bool = False,
) -> int:
    """Run the demo from the command line and print its table, or its result as JSON; returns the exit code."""
    chosen = choose_arms(arms)
    settings = DemoSettings().quick() if quick else DemoSettings()
    if steps is not None:
        settings = replace(settings, steps=steps)
    command = ["hf-effi", "demo", "--output-dir", "demo-output", "--seed", *map(str, seeds)]
    command += ["--steps", str(steps)] if steps is not None else []
    command += ["--arms", ",".join(arm.key for arm in chosen)] if arms is not None else []
    command += ["--quick"] if quick else []
    began, folder = time.perf_counter(), Path(output_dir)
    if as_json:
        with contextlib.redirect_stdout(sys.stderr):  # what it is doing now
            result = run_demo(folder, settings, seeds, arms=chosen, command=shlex.join(command), goals=not quick)
        print(json.dumps(result))
        return 0
    result = run_demo(folder, settings, seeds, arms=chosen, command=shlex.join(command), goals=not quick)
    print("\n" + render_table(summarize(result["rows"])))
    start = result["rows"][0]["curve"][0]
    low, high = USABLE_SAMPLED_ACCURACY
    if not quick and not low <= start["sampled"] <= high:
        print(f"Note: the start, {100 * start['sampled']:.1f} %, lies outside {low:.0%} to {high:.0%}.")
    for item in result["headline"]:
        if item["goal"] is not None:
            value = "not reached" if item["value"] is None else f"{item['value']:.3g}"
            print(f"  {'met    ' if item['met'] else 'NOT MET'}  {item['name']} = {value} (goal {item['goal']})")
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{minutes:.1f} minutes. Report: {folder / 'report.html'}   Model and card: {folder / 'model'}")
    return 0
