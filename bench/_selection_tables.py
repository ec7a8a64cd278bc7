"""Tables of the docs from `grpo_selection.json` and `grpo_second_task.json`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from bench._selection_arms import BASELINE
from hf_effi.report.result_card import markdown_table

_AXES = ("cpu_seconds", "rollouts", "prompts", "steps")
_PHASES = ("generation", "reward", "logprobs", "training", "other")


def _arms(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if row["part"] == "arm"]


def _part(result: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if row["part"] == name]


def _times(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.2f}"


def _range(values: list[float | None]) -> str:
    reached = [f"{value:.2f}" for value in sorted(value for value in values if value is not None)]
    if len(reached) < len(values):
        return f"{reached[0]} to not reached" if reached else "never reached"
    return f"{reached[0]} to {reached[-1]}"


def time_table(result: Mapping[str, Any]) -> str:
    """
    Return one row per arm that ran: accuracy at the end of the budget, and when it has the baseline's, over the
    baseline.
    """
    rows = []
    for row in _arms(result):
        if "missing" in row:
            continue
        low, high = row["final_accuracy_range"]
        ratios = row["ratio_to_baseline"]
        against = row["against_control"]
        rows.append(
            [
                row["title"],
                f"{100 * row['final_accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
                f"{_times(ratios['cpu_seconds'])} ({_range(row['cpu_seconds_ratio_seeds'])})",
                *(_times(ratios[axis]) for axis in _AXES[1:]),
                "" if against is None else against["verdict"],
            ]
        )
    header = ["arm", "accuracy at the end", "CPU seconds to the baseline's accuracy, over the baseline's"]
    header += ["rollouts", "prompts", "updates", "than its random control"]
    return markdown_table(header, rows) + "\n\n" + _left_out(result) + _told(result)


def split_table(result: Mapping[str, Any]) -> str:
    """Return one row per arm that ran: where its CPU seconds went, and what it did with them."""
    rows = []
    for row in _arms(result):
        if "missing" not in row:
            counts = row["counts"]
            names = ("prompts", "rollouts", "rows_trained", "steps")
            rows.append(
                [row["title"], *(f"{row['cpu_seconds'][phase]:.1f}" for phase in _PHASES)]
                + [f"{counts[name]:,.0f}" for name in names]
                + [f"{counts['tokens_forwarded'] / 1000:,.0f}"]
            )
    header = ["arm", "generation, CPU seconds", "reward", "log-probs", "training", "other", "prompts", "rollouts"]
    header += ["rows trained on", "updates", "thousand tokens forwarded"]
    return markdown_table(header, rows) + "\n\n" + _told(result)


def control_table(result: Mapping[str, Any]) -> str:
    """Return one row per arm with a control: the paired differences, seed by seed."""
    rows = []
    for row in _arms(result):
        against = row.get("against_control")
        if against is not None:
            rows.append(
                [row["title"], f"`{row['control']}`"]
                + [
                    ", ".join(f"{100 * value:+.1f}" for value in against[f"{name}_accuracy_difference"])
                    for name in ("mean", "final")
                ]
                + [against["verdict"]]
            )
    header = [
        "arm",
        "its control",
        "points of accuracy over the control, mean over the run, by seed",
        "at the end",
        "",
    ]
    return markdown_table(header, rows) + "\n\n" + _told(result)


def start_table(result: Mapping[str, Any]) -> str:
    """Return one row per source of the prompts: how the starting policy does on them."""
    rows = [
        [row["kind"], str(row["prompts"])]
        + [f"{100 * row[name]:.0f} %" for name in ("pass_rate", "all_wrong", "all_right")]
        for row in _part(result, "mix")
    ]
    header = ["prompts", "how many", "pass rate at the start", "groups all wrong", "groups all right"]
    return markdown_table(header, rows) + "\n\n" + _told(result)


def real_model_table(result: Mapping[str, Any]) -> str:
    """Return the curves of both arms of `bench.real_model`: greedy accuracy after so many CPU minutes."""
    from bench.render import provenance

    arms, settings = _arms(result), _part(result, "settings")[0]
    rows = []
    for point in range(settings["evaluations"] + 1):
        minutes = settings["minutes"] * point / settings["evaluations"]
        cells = []
        for row in arms:
            near = min(row["curve"], key=lambda one: abs(one["cpu_seconds"] - 60 * minutes))
            cells += [f"{100 * near['accuracy']:.0f} %", f"{near['steps']:,.0f}", f"{near['rollouts']:,.0f}"]
        rows.append([f"{minutes:.0f}", *cells])
    header = ["CPU minutes"]
    for row in arms:
        header += [f"{row['title']}: greedy accuracy", "updates", "rollouts"]
    return markdown_table(header, rows) + "\n\n" + provenance(result)


def _left_out(result: Mapping[str, Any]) -> str:
    missing = [row["title"] for row in _arms(result) if "missing" in row]
    return f"Not run: {', '.join(missing)}.\n\n" if missing else ""


def _told(result: Mapping[str, Any]) -> str:
    from bench.render import provenance

    settings = _part(result, "settings")[0]
    seconds, rate = settings["budget_seconds"], settings["learning_rate"]
    return (
        f"Each run: {seconds:g} CPU seconds of training, learning rate {rate:g} in all arms.\n\n{provenance(result)}"
    )


#: method -> its arms; each card has a table of them, beside the baseline and their controls
CARDS: dict[str, tuple[str, ...]] = {
    "adarft": ("adarft",),
    "cppo": ("cppo_5", "cppo_75", "cppo_875"),
    "d3s": ("d3s",),
    "difficulty_filter": ("zero_variance", "band"),
    "dump": ("dump",),
    "entropic_advantages": ("entropic",),
    "gain_rl": ("gain_rl",),
    "greso": ("greso",),
    "group_filters": ("zero_variance", "band", "lspo"),
    "hive": ("hive",),
    "hpt": ("hpt",),
    "knapsack": ("knapsack",),
    "mopps": ("mopps", "mopps_filter", "mopps_filter_cppo", "recommended"),
    "oblr_po": ("oblr",),
    "opo": ("opo",),
    "otb": ("otb",),
    "pcl": ("pcl",),
    "pods": ("pods",),
    "process_rewards": ("process_rewards",),
    "reinforce_rej": ("reinforce_rej",),
    "sari_curriculum": ("offline",),
    "speed": ("speed", "speed_exact", "speed_cppo"),
    "vip": ("vip",),
}


def card_table(method: str, result: Mapping[str, Any]) -> str:
    """Return the arms of one method beside the baseline and their controls, for its card."""
    there = {row["arm"]: row for row in _arms(result) if "missing" not in row}
    arms = [key for key in CARDS[method] if key in there]
    if not arms:
        return "Not among the arms of this run, so that it is no evidence for this method.\n\n" + _told(result)
    controls = dict.fromkeys(there[key]["control"] for key in arms if there[key].get("control") in there)
    rows = []
    for key in [BASELINE, *arms, *controls]:
        row = there[key]
        low, high = row["final_accuracy_range"]
        against = row["against_control"]
        rows.append(
            [
                row["title"],
                f"{100 * row['final_accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
                _times(row["ratio_to_baseline"]["cpu_seconds"]),
                _times(row["ratio_to_baseline"]["rollouts"]),
                "" if against is None else against["verdict"],
            ]
        )
    header = ["arm", "accuracy at the end", "CPU seconds to the baseline's accuracy, over the baseline's", "rollouts"]
    left = [key for key in CARDS[method] if key not in there]
    lacking = f"Not among the arms of this run: {', '.join(f'`{key}`' for key in left)}.\n\n" if left else ""
    return markdown_table([*header, "than its random control"], rows) + "\n\n" + lacking + _told(result)


VIEWS = {
    "time": time_table,
    "split": split_table,
    "controls": control_table,
    "start": start_table,
    **{f"card_{method}": functools.partial(card_table, method) for method in CARDS},
}
