"""What rewards by kind of completion say about a reward function, in sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .reward_probes import Probe

#: share of rows on which a bad completion may get what a right one gets, before it is called a problem
TOLERATED = 0.1


@dataclass(frozen=True)
class RewardFinding:
    """
    One thing about a reward function.

    Args:
        rule (`str`): Its name.
        problem, advice (`str`): What will happen, and what to do.
        severity (`str`): `"problem"`, or `"note"` for what may be meant.
    """

    rule: str
    problem: str
    advice: str
    severity: Literal["problem", "note"] = "problem"

    def __str__(self) -> str:
        return f"{self.problem}: {self.advice}."


@dataclass
class RewardReport:
    """
    What [`check_reward`] found.

    Args:
        name (`str`): The reward function.
        form (`str`): How right completions gave the answer: a name in `FORMS`, the template, or the column.
        rows (`int`): Rows that it was called for.
        table (`list[dict]`): For each kind of completion: `kind`, `rows`, `mean`, `low`, `high` (`None` where no
            completion got a number), `none` (share without a number) and `as_good` (share of rows on which it gets at
            least what the right completion gets).
        seconds_per_completion (`float`): Wall-clock time in a batch, the median of three calls.
        findings (`list[RewardFinding]`): Problems first.
    """

    name: str
    form: str = ""
    rows: int = 0
    table: list[dict[str, Any]] = field(default_factory=list)
    seconds_per_completion: float | None = None
    findings: list[RewardFinding] = field(default_factory=list)

    @property
    def problems(self) -> list[RewardFinding]:
        """The findings that will spoil a run."""
        return [one for one in self.findings if one.severity == "problem"]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.rows} rows, right answers given as {self.form!r}"]
        if self.table:
            lines.append(f"  {'completion':<18} {'rows':>4} {'mean':>8} {'low':>8} {'high':>8}  as good as right")
        for row in self.table:
            numbers = " ".join(f"{_shown(row[name]):>8}" for name in ("mean", "low", "high"))
            good = "" if row["as_good"] is None else f"{row['as_good']:.0%}"
            none = f"  ({row['none']:.0%} None)" if row["none"] else ""
            lines.append(f"  {row['kind']:<18} {row['rows']:>4} {numbers}  {good:>6}{none}")
        if self.seconds_per_completion is not None:
            lines.append(f"  {1000 * self.seconds_per_completion:.3g} ms per completion in a batch")
        for one in sorted(self.findings, key=lambda one: one.severity == "note"):
            lines.append(f"{one.severity}: {one}")
        if not self.problems:
            lines.append("no problem was found by these probes; read a few completions of the run all the same.")
        return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def summarize(probe: Probe, values: list[float | None], right: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    pairs = [
        (value, right[row])
        for row, value in zip(probe.rows, values, strict=True)
        if value is not None and right[row] is not None
    ]
    good = [value >= best - 1e-9 for value, best in pairs if best is not None]
    return {
        "kind": probe.kind,
        "rows": len(probe.rows),
        "mean": statistics.fmean(known) if known else None,
        "low": min(known, default=None),
        "high": max(known, default=None),
        "none": 1 - len(known) / len(values),
        "as_good": statistics.fmean(good) if good else None,
    }


#: kind of completion -> rule, what happens in a run where it is worth as much as a right one, what to do
_BAD = {
    "wrong": ("rewards_wrong", "A wrong answer", "there is nothing to learn from it", "compare with the right answer"),
    "swapped": (
        "ignores_the_row",
        "The answer of another row",
        "it does not look at the row's own answer, or compares the wrong rows",
        "read the column of the right answer, row by row",
    ),
    "empty": ("rewards_empty", "An empty completion", "a policy learns to say nothing", "return 0.0 for no answer"),
    "blank": ("rewards_empty", "A completion of blanks", "a policy learns to say nothing", "return 0.0 for no answer"),
    "truncated": (
        "rewards_truncated",
        "A completion that was cut before its answer ends",
        "a policy learns to run into the length limit",
        "ask for the whole answer, or for the end of the text after it",
    ),
    "longer answer": (
        "rewards_parts",
        "An answer that only contains the right one, such as 125 for 12,",
        "a policy learns long strings of digits or letters",
        "compare whole numbers and words, not parts of the text",
    ),
    "prompt": (
        "rewards_copies",
        "A copy of the prompt",
        "a policy learns to repeat the question",
        "read the answer only where it must stand, such as after a marker",
    ),
}


def read_table(table: Mapping[str, Mapping[str, Any]]) -> list[RewardFinding]:
    """Return what the means of the kinds of completions say."""
    right = table["right"]
    if right["mean"] is None:
        return [
            RewardFinding(
                "never_applies",
                "It gives None for every right answer, so that TRL leaves the completions out and nothing is learned",
                "return None only where the function does not apply to the row",
            )
        ]
    bad = [table[kind] for kind in ("wrong", "swapped", "empty") if kind in table and table[kind]["mean"] is not None]
    if bad and right["mean"] <= min(row["mean"] for row in bad) + 1e-9:
        constant = all(row["low"] == row["high"] == right["low"] == right["high"] for row in bad)
        return [
            RewardFinding(
                "never_varies" if constant else "right_is_not_better",
                f"Right answers get {right['mean']:.4g} and "
                + ("so does everything else" if constant else f"bad ones up to {max(row['mean'] for row in bad):.4g}")
                + ", so that no group has an advantage that means anything",
                "give --template (or completion=) as your prompt asks for the answer; if it is so already, the "
                "function does not find the answer in the text, or compares it with another column",
            )
        ]
    return [*_as_good_as_right(table), *_of_two_answers(table), *_partial(table), *_without_number(table)]


def _as_good_as_right(table: Mapping[str, Mapping[str, Any]]) -> list[RewardFinding]:
    found: list[RewardFinding] = []
    for kind, (rule, who, effect, advice) in _BAD.items():
        share = table[kind]["as_good"] if kind in table else None
        if share is None or share <= TOLERATED or rule in {one.rule for one in found}:
            continue
        problem = f"{who} gets as much as a right one on {share:.0%} of the rows, so that {effect}"
        found.append(RewardFinding(rule, problem, advice))
    return found


def _of_two_answers(table: Mapping[str, Mapping[str, Any]]) -> list[RewardFinding]:
    kinds = ("right then wrong", "wrong then right")
    shares = [table[kind]["as_good"] if kind in table else None for kind in kinds]
    if any(share is None for share in shares):
        return []
    high = [share is not None and share > TOLERATED for share in shares]
    if all(high):
        return [
            RewardFinding(
                "rewards_guesses",
                "A completion with a right and a wrong answer is rewarded in either order, so that a policy learns to "
                "list guesses",
                "refuse a completion with two different answers, or read the one after a marker",
            )
        ]
    if any(high):
        which = "first" if high[0] else "last"
        return [
            RewardFinding(
                "reads_one_of_two",
                f"Of two answers it reads the {which} one",
                "that is fine where the prompt says so; watch for completions that list guesses",
                "note",
            )
        ]
    return []


def _partial(table: Mapping[str, Mapping[str, Any]]) -> list[RewardFinding]:
    right, wrong = table["right"], table.get("wrong")
    floor = min((row["low"] for row in table.values() if row["low"] is not None), default=0.0)
    found = []
    span = right["mean"] - floor
    if wrong is not None and wrong["mean"] is not None and span > 0 and wrong["mean"] > floor + 0.02 * span:
        found.append(
            RewardFinding(
                "partial_credit",
                f"Wrong answers get {wrong['mean']:.4g} of {right['mean']:.4g}",
                "a group in which all are wrong teaches what this part rewards; keep it small",
                "note",
            )
        )
    long = table.get("long")
    if long is not None and long["mean"] is not None and abs(long["mean"] - right["mean"]) > 0.02 * abs(right["mean"]):
        found.append(
            RewardFinding(
                "depends_on_length",
                f"A right answer after 30 sentences gets {long['mean']:.4g} in place of {right['mean']:.4g}",
                "that is fine for a budget of length; otherwise the function does not find answers in long texts",
                "note",
            )
        )
    strange = table.get("strange")
    if strange is not None and strange["as_good"] is not None and strange["as_good"] < 1 - TOLERATED:
        found.append(
            RewardFinding(
                "strange_text",
                f"After a line of unusual characters {strange['as_good']:.0%} of the right answers keep their reward",
                "that is fine where the format is part of the reward",
                "note",
            )
        )
    if right["low"] < right["mean"] - 0.02 * abs(right["mean"]) and right["low"] <= floor:
        found.append(
            RewardFinding(
                "misses_right",
                f"Right answers get {right['mean']:.4g} on average and {right['low']:.4g} on some rows",
                "look at those rows: an answer that is never recognised is a prompt that never teaches",
            )
        )
    return found


def _without_number(table: Mapping[str, Mapping[str, Any]]) -> list[RewardFinding]:
    silent = [kind for kind in ("empty", "blank", "truncated", "wrong") if kind in table and table[kind]["none"] > 0]
    found = []
    if silent:
        found.append(
            RewardFinding(
                "none_for_bad",
                f"It gives None for {', '.join(silent)} completions, which TRL leaves out of the group, so that they "
                "are never punished",
                "return 0.0; None is for rows that the function does not apply to",
            )
        )
    if 0 < table["right"]["none"]:
        share = table["right"]["none"]
        found.append(
            RewardFinding(
                "does_not_apply",
                f"It gives None for right answers of {share:.0%} of the rows",
                "these rows need another reward function beside it",
                "note",
            )
        )
    return found
