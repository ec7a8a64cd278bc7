"""
The record of a training run on disk: an append-only list of events and one summary, readable at any moment.

Both lie in the folder `effi` of the trainer's `output_dir`; records of earlier versions lie beside the checkpoints,
and are read there too. `effi_events.jsonl` gets one line per event and is only ever appended to. `effi_run.json` is
replaced as a whole. [`read_run`] joins them: after a crash the events know more than the last summary.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._files import append_text, drop_link, save_json
from ._record_check import check_event, check_summary
from ._secrets import REDACTED, hide_in_text, is_secret_name, secrets_of_environment
from ._untrusted import load_json
from .errors import BrokenFileError
from .functional.probes import without_probes

logger = logging.getLogger(__name__)
SUMMARY, EVENTS = "effi_run.json", "effi_events.jsonl"
#: folder of the record in an `output_dir`
FOLDER = "effi"
SCHEMA = 1
#: a record holds no more of one value: depth, values in all, and bits of an integer, above which it is no float any
#: more
_DEEPEST, _MOST_VALUES, _MOST_BITS = 40, 20_000, 1023


def redact(value: Any, name: str = "", hidden: bool = False) -> Any:
    """
    Return a copy as plain JSON data, without secrets.

    Text goes when its key, or that of a mapping around it, names a secret (`hub_token`, `api_key`); the part of it
    that looks like one goes (a token of a known kind, `user:password@` in an address), and so does every value of an
    environment variable that names a secret: see `hf_effi._secrets`. Numbers that JSON cannot hold become `"nan"` and
    `"inf"`; other objects become text. Never raises: what has no text, contains itself, or is too deep or too large is
    told as such.

    Args:
        name (`str`, *optional*): Key of the value.
        hidden (`bool`, *optional*, defaults to `False`): Whether a mapping around it names a secret.

    Example:
    ```python
    >>> redact({"hub_token": "abc", "eos_token": "<end>", "url": "https://me:pass@host/x", "loss": float("nan")})
    {'hub_token': '<redacted>', 'eos_token': '<end>', 'url': 'https://<redacted>@host/x', 'loss': 'nan'}
    ```
    """
    return _Redactor().plain(value, name, hidden)


class _Redactor:
    """One walk through a value: bounded, whatever the value is."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES
        self._secrets = secrets_of_environment()
        self._inside: set[int] = set()  # the containers around the value that is looked at

    def plain(self, value: Any, name: str, hidden: bool) -> Any:
        try:
            return self._plain(value, name, hidden or is_secret_name(name))
        except Exception as error:  # a `repr` that raises, a mapping that does not give its items
            return f"<{type(value).__name__} without a text: {type(error).__name__}>"

    def _plain(self, value: Any, name: str, hidden: bool) -> Any:
        self._left -= 1
        if self._left < 0:
            return f"<not shown: more than {_MOST_VALUES} values>"
        if isinstance(value, (Mapping, list, tuple, set, frozenset)):
            return self._container(value, name, hidden)
        if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _MOST_BITS:
            return f"<integer of {value.bit_length()} bits>"
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            return self.plain(value.item(), name, hidden)
        text = str(value)
        return REDACTED if text and hidden else hide_in_text(text, self._secrets)

    def _container(self, value: Any, name: str, hidden: bool) -> Any:
        if id(value) in self._inside:
            return f"<{type(value).__name__} that contains itself>"
        if len(self._inside) >= _DEEPEST:
            return f"<{type(value).__name__} nested more than {_DEEPEST} deep>"
        self._inside.add(id(value))
        try:
            if isinstance(value, Mapping):
                return {self._key(key): self.plain(inner, self._key(key), hidden) for key, inner in value.items()}
            return [self.plain(inner, name, hidden) for inner in value]
        finally:
            self._inside.discard(id(value))

    def _key(self, key: Any) -> str:
        return str(self.plain(str(key), "", False))


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class RunStore:
    """
    Write the record of one run into a folder. Each process that trains has at most one; only the first has any.

    Args:
        folder (`Path`): Usually `effi` in the trainer's `output_dir`. Symbolic links in it are replaced, not followed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.summary: dict[str, Any] = {}

    def begin(self, header: Mapping[str, Any], step: int) -> None:
        """
        Start a run, or the next segment of one.

        Args:
            header (`Mapping`): What is known about the run; replaces the stored values on a resume.
            step (`int`): Finished updates. 0 starts a new record and keeps one that is already there under a number.
        """
        for path in (self.folder, self.folder / SUMMARY, self.folder / EVENTS):
            drop_link(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        if step == 0:
            self._put_aside()
            self.summary = {}
        else:
            self.summary = self._continued()
            for derived in ("events", "log_history", "totals", "error"):
                self.summary.pop(derived, None)
            self._end_torn_line()
        segment = {"started": now(), "start_step": step, "end_step": step, "totals": {}}
        self.summary = {
            "schema": SCHEMA,
            "run_id": uuid.uuid4().hex,
            "checkpoints": [],
            "segments": [],
            **self.summary,
            **redact(header),
            "status": "running",
        }
        self.summary["segments"].append(segment)
        self.event("begin", step=step, run_id=self.summary["run_id"])
        self.save()

    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        """Append one line. `totals`, where given, are those of the segment so far."""
        segment = self.summary["segments"][-1]
        segment["end_step"] = step
        if "totals" in fields:
            segment["totals"] = fields["totals"]
        line = {"event": kind, "time": now(), "segment": len(self.summary["segments"]) - 1, "step": step, **fields}
        append_text(self.folder / EVENTS, json.dumps(redact(line)) + "\n")

    def save(self, **fields: Any) -> None:
        """Put new values into the summary and replace the file, so that a reader sees the old or the new one whole."""
        self.summary |= redact(fields) | {"updated": now()}
        save_json(self.folder / SUMMARY, self.summary, indent=1)

    def end(self, status: str, error: str | None = None) -> None:
        """Say how the run ended where training did not come to its end: `"failed"` or `"interrupted"`, and by what."""
        self.event("end", step=self.summary["segments"][-1]["end_step"], status=status, error=error)
        self.save(status=status, error=error)

    def _continued(self) -> dict[str, Any]:
        """Return the record that a resumed run goes on with; a damaged one is put aside, and a new one begins."""
        try:
            return read_run(self.folder) if (self.folder / SUMMARY).exists() else {}
        except BrokenFileError as error:
            logger.warning("The record of the run begins anew, and the old one is kept under a number: %s", error)
            self._put_aside()
            return {}

    def _put_aside(self) -> None:
        """Number the record of an earlier run in the same folder."""
        paths = [self.folder / SUMMARY, self.folder / EVENTS]
        if not any(path.exists() for path in paths):
            return
        number = 1
        while any(path.with_stem(f"{path.stem}-{number}").exists() for path in paths):
            number += 1
        for path in paths:
            if path.exists():
                path.rename(path.with_stem(f"{path.stem}-{number}"))

    def _end_torn_line(self) -> None:
        """A process that was killed may have left half a line; the next event must not continue it."""
        path = self.folder / EVENTS
        if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
            append_text(path, "\n")


def record_folder(output_dir: str | Path) -> Path:
    """
    Return where the record of a run is, or would be: `effi` in its folder, or beside the checkpoints (earlier
    versions).
    """
    output_dir = Path(output_dir)
    places = (output_dir / FOLDER, output_dir)
    return next((place for place in places if (place / SUMMARY).is_file()), places[0])


def has_record(output_dir: str | Path) -> bool:
    """Return whether there is the record of a run in a folder."""
    return (record_folder(output_dir) / SUMMARY).is_file()


def adopt_old_record(output_dir: str | Path) -> None:
    """Move a record of an earlier version from beside the checkpoints into the folder of the record."""
    old = record_folder(output_dir)
    if old != Path(output_dir) or not (old / SUMMARY).is_file():
        return
    drop_link(old / FOLDER)
    (old / FOLDER).mkdir(exist_ok=True)
    for path in (
        old / EVENTS,
        old / SUMMARY,
    ):  # the summary last: a reader finds the record in one place or in the other
        if path.is_file():
            path.rename(old / FOLDER / path.name)


def read_run(folder: str | Path) -> dict[str, Any]:
    """
    Return the record of the run in a folder, as far as it got.

    Args:
        folder (`str` or `Path`): `output_dir` of a run. A killed run's record is read in the same way.

    Returns:
        `dict`: The summary, brought up to date from the events, and these under `events`. `totals` are sums over the
        segments: work that was done, also where a resumed run did it again. `log_history` is the run's, without log
        entries that a resume went back behind, and without those of probes, which were undone.

    Raises:
        FileNotFoundError: there is no record; the message says who writes one.
        BrokenFileError: a file of it is damaged; a `ValueError` that names the field.
    """
    place = record_folder(folder)
    if not (place / SUMMARY).is_file():
        raise FileNotFoundError(
            f"{folder} has no {FOLDER}/{SUMMARY}. RunRecordCallback() writes one while a run trains."
        )
    run = check_summary(load_json(place / SUMMARY), place / SUMMARY, SCHEMA)
    events = _read_events(place / EVENTS)
    segments = run["segments"]
    for line, event in enumerate(events, 1):
        number = check_event(event, len(segments), f"Event {line} of {place / EVENTS}")["segment"]
        if number == len(segments):  # its process died between the event and the summary
            segments.append({"started": event["time"], "start_step": event["step"], "totals": {}})
        segments[number]["end_step"] = event["step"]
        segments[number]["totals"] = event.get("totals", segments[number]["totals"])
    run["events"] = events
    run["log_history"] = _effective_logs(events)
    run["checkpoints"] = [
        {"step": event["step"], "path": event["path"]} for event in events if event["event"] == "checkpoint"
    ]
    run["totals"] = totals = _sum_totals([segment["totals"] for segment in segments])
    if real := totals.get("tokens", {}).get("real"):
        totals["tokens_forwarded_per_real_token"] = round(totals["tokens"].get("forwarded", 0) / real, 4)
    return run


def _read_events(path: Path) -> list[dict[str, Any]]:
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            events.append(json.loads(line))
        except (ValueError, RecursionError):
            continue  # torn by a kill, or nothing that was written here
    return events


def _effective_logs(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    logs: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "begin":
            logs = [entry for entry in logs if entry["step"] <= event["step"]]
        elif event["event"] == "log":
            logs.append({**event["values"], "step": event["step"]})
    return without_probes(logs)


def _sum_totals(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up nested numbers; peaks are no sums."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                inner = [p[key] for p in parts if key in p]
                total[key] = {
                    name: max(i.get(name, 0) for i in inner)
                    if key == "peak_memory_bytes"
                    else sum(i.get(name, 0) for i in inner)
                    for name in {n: None for i in inner for n in i}
                }
            else:
                total[key] = total.get(key, 0) + value
    return total
