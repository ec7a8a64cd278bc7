"""Every committed figure has hardware, versions, commit, seeds, date and command; every table is made from one."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.contract._sources import ROOT
from tests.helpers.distributed import child_environment

RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
RENDERER = ROOT / "bench" / "render.py"
NEEDED_VERSIONS = ("torch", "transformers", "trl")

#: The headlines that each file has to carry, whether the goal was met or not.
HEADLINES = {
    "demo": (
        "heldout_accuracy_gain_equal_wallclock",
        "wallclock_ratio_to_baseline_accuracy",
        "tokens_forwarded_per_real_token",
    ),
    "schedules": ("callback_overhead_fraction", "branch_total_steps_ratio", "loss_law_mean_abs_error"),
    "grpo_exact": ("train_phase_speedup", "max_relative_gradient_error", "tokens_forwarded_per_real_token"),
    "grpo_selection": ("cpu_seconds_ratio_to_baseline_accuracy", "rollouts_ratio_to_baseline_accuracy"),
    "grpo_second_task": ("cpu_seconds_ratio_to_baseline_accuracy", "rollouts_ratio_to_baseline_accuracy"),
    "curricula": ("resume_seconds_1m_rows",),
    "long_sequence": ("max_length_ratio", "time_per_token_ratio"),
    "kernels_gpu": ("lm_head_fwd_bwd_ms", "lora_layer_speedup", "tiled_mlp_vs_checkpoint"),
    "rollouts": ("generation_seconds_ratio_to_stock",),
    "crash": ("failed_resumes_ours", "failed_resumes_stock", "save_stall_fraction"),
}

TYPES: dict[str, type | tuple[type, ...]] = {
    "bench": str,
    "commit": str,
    "date": str,
    "machine": dict,
    "versions": dict,
    "command": str,
    "seeds": list,
    "headline": list,
    "rows": list,
}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return []
    if isinstance(value, (int, float)):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [number for item in items for number in _numbers(item)]


def problems(name: str, result: Any) -> list[str]:
    """Return what is wrong with the result file `bench/results/<name>.json`, in words."""
    if not isinstance(result, dict):
        return ["not a JSON object"]
    found = [f"{key} is missing" for key in TYPES if key not in result]
    found += [f"unknown key {key}" for key in result if key not in TYPES]
    found += [
        f"{k} is a {type(result[k]).__name__}"
        for k, t in TYPES.items()
        if k in result and not isinstance(result[k], t)
    ]
    if found:
        return found
    if result["bench"] != name:
        found.append(f"bench is {result['bench']!r}, the file is {name!r}")
    if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", result["commit"]):
        found.append(f"commit is {result['commit']!r}")
    try:
        date.fromisoformat(result["date"][:10])
    except ValueError:
        found.append(f"date is {result['date']!r}, not ISO 8601")
    found += [f"versions lacks {package}" for package in NEEDED_VERSIONS if package not in result["versions"]]
    if not result["machine"]:
        found.append("machine is empty")
    if not result["command"].strip():
        found.append("command is empty")
    if not result["seeds"] or not all(
        isinstance(seed, int) and not isinstance(seed, bool) for seed in result["seeds"]
    ):
        found.append(f"seeds is {result['seeds']!r}")
    if not result["rows"] or not all(isinstance(row, dict) for row in result["rows"]):
        found.append("rows must be a list of objects, at least one")
    for entry in result["headline"]:
        if not isinstance(entry, dict) or not {"name", "value", "goal", "met"} <= set(entry):
            found.append(f"headline {entry!r} needs name, value, goal, met")
        elif entry["goal"] is None and entry["met"] is not None:
            found.append(f"headline {entry['name']}: met must be null where there is no goal")
        elif entry["goal"] is not None and not isinstance(entry["met"], bool):
            found.append(f"headline {entry['name']}: met must be true or false")
    named = [entry.get("name", "") for entry in result["headline"] if isinstance(entry, dict)]
    # One headline may come in several variants, such as `tokens_forwarded_per_real_token_stock`.
    found += [f"headline {h} is missing" for h in HEADLINES.get(name, ()) if not any(n.startswith(h) for n in named)]
    if not all(math.isfinite(number) for number in _numbers(result)):
        found.append("a number is NaN or infinite: write null and say why")
    return found


# Loops, not parameters: with no file committed yet there is nothing to skip.


def test_result_files_follow_the_schema():
    wrong = {path.name: problems(path.stem, read(path)) for path in RESULTS}
    wrong = {name: found for name, found in wrong.items() if found}
    assert not wrong, "\n".join(f"bench/results/{name}: {'; '.join(found)}" for name, found in wrong.items())


def test_result_files_have_their_scripts():
    orphans = [path.name for path in RESULTS if not (ROOT / "bench" / f"{path.stem}.py").exists()]
    assert not orphans, f"a number without a script is not a number: {orphans}"


def test_missed_goals_are_explained():
    log = (ROOT / "bench" / "LOG.md").read_text(encoding="utf-8")
    silent = [
        f"{path.name}: {entry['name']}"
        for path in RESULTS
        for entry in read(path)["headline"]
        if entry["met"] is False and entry["name"] not in log
    ]
    assert not silent, f"bench/LOG.md must say why these were missed: {silent}"


def test_tables_equal_their_json():
    """README and docs carry what the renderer makes from the JSON, to the letter."""
    assert RENDERER.exists(), "bench/render.py is missing: it writes the tables, and `--check` compares them"
    done = subprocess.run(
        [sys.executable, "-m", "bench.render", "--check"],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"`python -m bench.render --check` says:\n{done.stdout}\n{done.stderr}"


# --- the checker itself --------------------------------------------------------------------------------------------


def valid() -> dict[str, Any]:
    return {
        "bench": "curricula",
        "commit": "a8c915a",
        "date": "2030-01-31",
        "machine": {"cpu": "two cores"},
        "versions": {"torch": "2", "transformers": "5", "trl": "1"},
        "command": "python -m bench.curricula",
        "seeds": [0, 1, 2],
        "headline": [{"name": "resume_seconds_1m_rows", "value": 0.5, "goal": "< 1", "met": True}],
        "rows": [{"seed": 0}],
    }


def test_checker_accepts_the_schema():
    assert problems("curricula", valid()) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"commit": "main"}, "commit"),
        ({"date": "yesterday"}, "date"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [True]}, "seeds"),
        ({"rows": []}, "rows"),
        ({"machine": {}}, "machine"),
        ({"versions": {"torch": "2"}}, "versions lacks transformers"),
        ({"bench": "demo"}, "bench is 'demo'"),
        ({"extra": 1}, "unknown key extra"),
        ({"command": 3}, "command is a int"),
        ({"headline": []}, "headline resume_seconds_1m_rows is missing"),
        ({"headline": [{"name": "resume_seconds_1m_rows", "value": 2, "goal": 1, "met": None}]}, "true or false"),
        ({"rows": [{"x": float("nan")}]}, "NaN"),
    ],
)
def test_checker_names_what_is_wrong(change, word):
    assert any(word in found for found in problems("curricula", {**valid(), **change}))
