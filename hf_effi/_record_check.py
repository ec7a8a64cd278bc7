"""
The form of a run's record and of a `trainer_state.json`: what is not of it is refused in one sentence, by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ._untrusted import is_number, load_json, shorten
from .errors import BrokenFileError

#: a run of any trainer logs some hundred names
_MOST_NAMES = 5000
_FINDING = {"rule": str, "problem": str, "advice": str, "severity": str}
_TEXTS = ("status", "run_id", "command", "updated", "arguments_class")
_MAPPINGS = ("arguments", "data", "machine", "versions", "commit", "schedule", "progress", "model")
_LISTS = ("segments", "findings", "checkpoints", "methods")
_NUMBERS = ("processes", "max_steps")
#: parts of the totals that are one number; every other part is a mapping from a name to a number
_PLAIN_TOTALS = ("updates", "probe_updates")


def check_summary(run: Any, where: object, schema: int) -> dict[str, Any]:
    """
    Return the summary of a run, having checked what readers lean on.

    Args:
        run: What `effi_run.json` holds.
        where: The file, for the message.
        schema (`int`): The one that this version reads.

    Raises:
        BrokenFileError: it is no record of this schema; the message names the field.
    """
    if not isinstance(run, dict):
        raise BrokenFileError(f"{where} is damaged: it holds {type(run).__name__} and no mapping.")
    damaged = _complaint(where)
    if run.get("schema", schema) != schema:
        raise BrokenFileError(
            f"{where} is of schema {shorten(run['schema'])}; this version of hf_effi reads {schema}. Upgrade hf_effi."
        )
    for names, kind in ((_TEXTS, str), (_MAPPINGS, dict), (_LISTS, list)):
        for name in names:
            if run.get(name) is not None and not isinstance(run[name], kind):
                raise damaged(name, run[name], kind.__name__)
    for name in _NUMBERS:
        if run.get(name) is not None and not is_number(run[name]):
            raise damaged(name, run[name], "a number")
    if not isinstance(run.get("segments"), list):
        raise damaged("segments", run.get("segments"), "a list")
    for number, segment in enumerate(run["segments"]):
        _check_segment(segment, f"segments[{number}]", damaged)
    for number, finding in enumerate(run.get("findings") or ()):
        _check_finding(finding, f"findings[{number}]", damaged)
    for name in ("machine", "versions"):
        for key, value in (run.get(name) or {}).items():
            if isinstance(value, (dict, list)):
                raise damaged(f"{name}.{key}"[:100], value, "text or a number")
    progress = run.get("progress") or {}
    if not is_number(progress.get("step", 0)):
        raise damaged("progress.step", progress["step"], "a number")
    _check_model(run.get("model"), damaged)
    # A field that is there and null is one that is not there.
    return {name: value for name, value in run.items() if value is not None}


def check_event(event: Any, segments: int, where: object) -> dict[str, Any]:
    """
    Return an event of a run, having checked what readers lean on.

    Args:
        segments (`int`): Segments that are known so far; an event may begin the next one.

    Raises:
        BrokenFileError: it is no event; the message names the field.
    """
    damaged = _complaint(where)
    if not isinstance(event, dict):
        raise damaged("line", event, "a mapping")
    for name in ("event", "time"):
        if not isinstance(event.get(name), str):
            raise damaged(name, event.get(name), "text")
    if not is_number(event.get("step")):
        raise damaged("step", event.get("step"), "a number")
    number = event.get("segment")
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= segments:
        raise damaged("segment", number, f"a number from 0 to {segments}")
    if "totals" in event:
        check_totals(event["totals"], damaged)
    if event["event"] == "log":
        check_log_entry(event.get("values"), damaged)
    if event["event"] == "checkpoint" and not isinstance(event.get("path"), str):
        raise damaged("path", event.get("path"), "text")
    return event


def check_state(state: Any, where: object) -> dict[str, Any]:
    """
    Return a `trainer_state.json`, having checked its step, length and log history.

    Raises:
        BrokenFileError: it is no state of a Trainer; the message names the field.
    """
    check_history(state, where)
    for name in ("global_step", "max_steps"):
        if not is_number(state.get(name)):
            raise _complaint(where)(name, state.get(name), "a number")
    return state


def check_history(state: Any, where: object) -> dict[str, Any]:
    """
    Return a mapping with a `log_history`, having checked its entries.

    Raises:
        BrokenFileError: it holds no such list; the message names the field.
    """
    damaged = _complaint(where)
    if not isinstance(state, dict):
        raise damaged("content", state, "a mapping")
    if not isinstance(state.get("log_history"), list):
        raise damaged("log_history", state.get("log_history"), "a list")
    for entry in state["log_history"]:
        check_log_entry(entry, damaged)
    return state


def load_trainer_state(checkpoint: str | Path) -> dict[str, Any]:
    """
    Return the `trainer_state.json` of a checkpoint.

    Raises:
        BrokenFileError: it is damaged; the message names the file and the field.
        OSError: it cannot be read.
    """
    path = Path(checkpoint) / "trainer_state.json"
    state = check_state(load_json(path), path)
    if not isinstance(state.get("stateful_callbacks") or {}, dict):
        raise _complaint(path)("stateful_callbacks", state["stateful_callbacks"], "a mapping")
    return state


Complaint = Callable[[str, Any, str], BrokenFileError]


def check_log_entry(entry: Any, damaged: Complaint) -> None:
    """Check that a log entry is a mapping with a bounded number of names."""
    if not isinstance(entry, dict):
        raise damaged("a log entry", entry, "a mapping")
    if len(entry) > _MOST_NAMES:
        raise damaged("a log entry", f"{len(entry)} names", f"of at most {_MOST_NAMES} names")


def check_totals(totals: Any, damaged: Complaint) -> None:
    """Check that totals are numbers, or mappings from a name to a number."""
    if not isinstance(totals, dict):
        raise damaged("totals", totals, "a mapping")
    for name, part in totals.items():
        shown = f"totals.{name}"[:100]
        if name in _PLAIN_TOTALS:
            if not is_number(part):
                raise damaged(shown, part, "a number")
        elif not isinstance(part, dict) or not all(map(is_number, part.values())) or len(part) > _MOST_NAMES:
            raise damaged(shown, part, "a mapping from names to numbers")


def _complaint(where: object) -> Complaint:
    def damaged(name: str, value: Any, wanted: str) -> BrokenFileError:
        return BrokenFileError(f"{where} is damaged: its {name} is {shorten(value, 60)} and not {wanted}.")

    return damaged


def _check_segment(segment: Any, name: str, damaged: Complaint) -> None:
    if not isinstance(segment, dict):
        raise damaged(name, segment, "a mapping")
    if not isinstance(segment.get("started"), str):
        raise damaged(f"{name}.started", segment.get("started"), "text")
    for key in ("start_step", "end_step"):
        if not is_number(segment.get(key, 0)):
            raise damaged(f"{name}.{key}", segment[key], "a number")
    check_totals(segment.get("totals"), damaged)


def _check_finding(finding: Any, name: str, damaged: Complaint) -> None:
    if not isinstance(finding, dict) or set(finding) - {*_FINDING, "step"} or "rule" not in finding:
        raise damaged(name, finding, "a finding of a doctor")
    for key, kind in _FINDING.items():
        if not isinstance(finding.get(key, "problem" if key == "severity" else None), kind):
            raise damaged(f"{name}.{key}", finding.get(key), "text")
    if not is_number(finding.get("step")):
        raise damaged(f"{name}.step", finding.get("step"), "a number")


def _check_model(model: Mapping[str, Any] | None, damaged: Complaint) -> None:
    if model is None:
        return
    if not is_number(model.get("parameters")):
        raise damaged("model.parameters", model.get("parameters"), "a number")
    for key in ("name", "class"):
        if not isinstance(model.get(key) or "", str):
            raise damaged(f"model.{key}", model[key], "text")
