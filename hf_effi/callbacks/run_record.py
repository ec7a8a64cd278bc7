"""`RunRecordCallback`: one tidy record per run of any Trainer, written as it goes."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import logging
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .._compat import installed_versions
from .._environment import commit_of, current_commit, describe_machine
from .._run_record import FOLDER, RunStore, adopt_old_record
from ..checkpoint.snapshot import restore_rng, take_rng
from ..functional import metrics
from ..functional.accounting import PhaseClock
from ..functional.options import is_finite
from ..functional.rollouts import GenerationLayout
from ..methods import METHODS, find_method
from ..samplers.trainer_checks import STATE_KEY as ORDER_KEY
from ._endings import end_record, forget_end, watch_end
from ._forward_watch import ForwardWatch
from ._turns import READ, in_turn
from .lr_schedule import LEARNING_RATE, LRScheduleCallback
from .lr_schedule import STATE_KEY as SCHEDULE_KEY
from .observer import describe, only_observes
from .owners import OwningCallback, Role, owner_of
from .patch import PatchCallback
from .probing import mark_log, plan_of
from .sampler import ROW_ORDER

logger = logging.getLogger(__name__)
#: seconds between two summaries that only a log entry asks for
_SUMMARY_EVERY = 30.0
_SAMPLED_ROWS = 16
#: what the trainer's own count of tokens is called in the record
_TOKENS = {metrics.TOKENS_FORWARD: "forwarded", metrics.TOKENS_REAL: "real", metrics.TOKENS_SAVED: "saved"}
_ROWS = {metrics.ROWS_GENERATED: "generated", metrics.ROWS_TRAINED: "trained"}


class RunRecordCallback(OwningCallback):
    """
    Write what a run was and did: arguments, schedule, methods, versions, hardware, commits, data, time, tokens, drops.

    Two files in `output_dir/effi`, written by the first process: `effi_events.jsonl`, appended to at every log entry,
    evaluation and checkpoint, and `effi_run.json`, the summary, replaced as a whole. Whatever kills the process, what
    it logged can be read with [`read_run`]. `status` is "running", "finished", "failed" (with the error) or
    "interrupted" (by Ctrl-C or SIGTERM); what SIGKILL ended stays "running", and `updated` says since when. A resumed
    run goes on in the same record, as its next segment; a new run in the same folder puts the old record aside.
    Nothing that looks like a token or password is written. The run never fails because of the record: whatever goes
    wrong ends the record with a warning, and values that have no text or no end are told as such.

    Args:
        methods (`Sequence[str]`, *optional*): Keys of `hf_effi.METHODS` in use that arguments and checkpoints do not
            tell, for example those of callbacks such as `"adalora"`.

    Raises:
        ValueError: an unknown method, or a second record of the same run.

    Example:
    ```python
    from hf_effi import RunRecordCallback, read_run

    Trainer(model, args, train_dataset=rows, callbacks=[RunRecordCallback()]).train()
    print(read_run(args.output_dir)["totals"]["seconds"])
    ```
    """

    role = Role(
        "run record",
        "Two records of one run want to be written into output_dir",
        "Keep one: an Effi trainer makes its own, unless one is in the list of callbacks already.",
    )

    in_recipe = False

    def __init__(self, methods: Sequence[str] = ()) -> None:
        if isinstance(methods, str) or not isinstance(methods, Collection):
            raise ValueError(f"methods={methods!r} must be a list of keys of hf_effi.METHODS, such as ['adalora'].")
        for key in methods:
            try:
                find_method(key)
            except KeyError as error:
                raise ValueError(f"methods: {error.args[0]}") from None
        self.methods = tuple(methods)
        self._store: RunStore | None = None
        self._watch: ForwardWatch | None = None
        self._time = PhaseClock()
        self._counts: dict[str, dict[str, float]] = {}
        self._saved_at = 0.0
        self._logged_step = self._begun_at = self._probes = 0
        self._steps_per_pass: int | None = None  # of a loader that knows its length
        self._noted_checkpoint: int | None = None

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.end(None)  # of an earlier call of `train` that did not come to its end
        if state.is_world_process_zero:
            self._begin(args, state, **kwargs)

    @only_observes
    def _begin(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        self._time.clear()
        self._counts = {part: defaultdict(float) for part in ("tokens", "drops", "rows", "phases")}
        self._logged_step = self._begun_at = state.global_step
        self._probes = 0
        self._store = RunStore(Path(args.output_dir) / FOLDER)
        loader = kwargs.get("train_dataloader")
        self._steps_per_pass = length_of(loader)
        header = {
            "arguments_class": type(args).__name__,
            "arguments": arguments_of(args),
            "model": describe_model(kwargs["model"]),
            "data": {"train": describe_data(getattr(loader, "dataset", None))},
            "max_steps": state.max_steps,
            "processes": args.world_size,
            "command": command_line(),
            "machine": describe_machine(),
            "versions": installed_versions(),
            "commit": {"hf_effi": current_commit(), "project": commit_of(Path.cwd())},
        }
        self._watch = ForwardWatch(kwargs["model"])
        adopt_old_record(args.output_dir)
        self._store.begin(header, state.global_step)
        watch_end(self._store)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._time.start()
        self._saved_at = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._time.lap("data")

    @only_observes
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._time.lap("train")
        if self._store is not None and state.global_step == self._begun_at + 1:
            # Only now have all callbacks begun, and the schedule is the one that is followed.
            spec = schedule_of(args, state, kwargs["lr_scheduler"])
            methods = sorted({*self.methods, *methods_of(args, state, spec)})
            self._store.save(schedule=spec, methods=methods)

    @in_turn(READ)
    @only_observes
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = dict(kwargs.get("logs") or {})
        mark_log(state, logs)
        # An evaluation logs its metrics before it reports that it is over.
        evaluated = any(name.startswith("eval_") for name in logs)
        self._time.lap("evaluate" if evaluated else "log")
        if self._store is None or not logs:
            return
        if not evaluated:
            self._count(args, state, logs)
        self._event("log", state, values=logs)
        self._summarize(state, force=False)

    @only_observes
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._time.lap("evaluate")
        self._event("evaluate", state)
        if self._store is not None:
            self._add_evaluation_data(getattr(kwargs.get("eval_dataloader"), "dataset", None))

    @only_observes
    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:  # inside a save, so that what is pushed knows of this checkpoint
            self._time.lap("save")
            self._note_checkpoint(state)

    @only_observes
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._time.lap("save")
        self._note_checkpoint(state)
        self._noted_checkpoint = None

    def _note_checkpoint(self, state: TrainerState) -> None:
        if self._noted_checkpoint != state.global_step:
            self._event("checkpoint", state, path=f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        self._summarize(state, force=True)
        self._noted_checkpoint = state.global_step

    @only_observes
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._time.lap("other")
        self._event("end", state)
        self._summarize(state, force=True, status="finished")
        self._close()

    # ---- helpers ----

    def _count(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        """
        Add what happened since the last log entry. Trainers log means; the counts of what was averaged undo them.
        """
        updates = state.global_step - self._logged_step
        made = self._generations(args, self._logged_step, state.global_step)
        self._probes += plan_of(state).probes(state.global_step) - plan_of(state).probes(self._logged_step)
        self._logged_step = state.global_step
        # The trainer's own count also has the passes without a gradient, on all processes.
        told = {word: logs[name] * updates for name, word in _TOKENS.items() if _is_number(logs.get(name))}
        for word, seen in zip(("forwarded", "real"), self._watch.take(), strict=True):
            told[word] = told.get(word, 0) or seen
        for word, tokens in told.items():
            self._counts["tokens"][word] += tokens
        for name, value in logs.items():
            if not _is_number(value):
                continue
            if name.startswith(metrics.DROPPED):
                self._counts["drops"][name.removeprefix(metrics.DROPPED)] += value * sum(made)
            elif name in _ROWS:
                # Logged once for each update that generates, with the sum of its generations.
                self._counts["rows"][_ROWS[name]] += value * sum(map(bool, made))
            elif name.startswith(metrics.TIME):
                self._counts["phases"][name.removeprefix(metrics.TIME)] += value * updates

    def _generations(self, args: Any, first: int, last: int) -> list[int]:
        """How many generations each update from `first` to `last - 1` made; nothing where the trainer makes none."""
        try:
            layout = GenerationLayout.of(args)
        except (AttributeError, ValueError):
            return []  # no trainer that generates, or one whose rows are laid out in another way
        return layout.generations_of(first, last, self._steps_per_pass)

    def _add_evaluation_data(self, dataset: Any) -> None:
        found, data = describe_data(dataset), self._store.summary["data"]
        known = data.get("evaluation", [])
        if found is not None and found not in known:
            self._store.save(data={**data, "evaluation": [*known, found]})

    def _totals(self) -> dict[str, Any]:
        parts = {name: {key: round(n) for key, n in part.items()} for name, part in self._counts.items() if part}
        if "phases" in parts:
            parts["phases"] = {key: round(n, 4) for key, n in self._counts["phases"].items()}
        return {
            "updates": self._logged_step - self._begun_at,
            **({"probe_updates": self._probes} if self._probes else {}),
            "seconds": {key: round(value, 4) for key, value in self._time.seconds.items()},
            "peak_memory_bytes": peak_memory(),
            **parts,
        }

    def _event(self, kind: str, state: TrainerState, **fields: Any) -> None:
        if self._store is not None:
            self._store.event(kind, step=state.global_step, totals=self._totals(), **fields)

    def _summarize(self, state: TrainerState, force: bool, **fields: Any) -> None:
        if self._store is None or (not force and time.perf_counter() - self._saved_at < _SUMMARY_EVERY):
            return
        found = [
            entry for key, entries in state.stateful_callbacks.items() if key.endswith("Doctor") for entry in entries
        ]
        progress = {"step": state.global_step, "epoch": state.epoch, "best_checkpoint": state.best_model_checkpoint}
        self._store.save(progress=progress, findings=found, **fields)
        self._saved_at = time.perf_counter()

    def stop_observing(self, error: Exception) -> None:
        """Say that the record is over, and let go of the model."""
        if self._store is not None:
            logger.warning("The run goes on without its record: %s", describe(error))
        self._close()

    def end(self, error: BaseException | None) -> None:
        """Write how a run ended that did not come to its end: by an error, or, with Ctrl-C or `None`, interrupted."""
        if self._store is not None:
            end_record(self._store, error)
        self._close()

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._store is not None:
            forget_end(self._store)
        self._store = self._watch = None


def arguments_of(args: Any) -> dict[str, Any]:
    """
    Return the arguments field by field. `to_dict` copies what they hold, which need not be possible, nor have an end.
    """
    found = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(args) if field.init}
    return {name: _named(value) for name, value in found.items()}


def _named(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list):
        return [inner.value if isinstance(inner, enum.Enum) else inner for inner in value]
    return vars(value) if dataclasses.is_dataclass(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and is_finite(value)


def length_of(loader: Any) -> int | None:
    """Return the batches of a pass, or `None` for a loader of a stream."""
    try:
        return len(loader)
    except TypeError:
        return None


def command_line() -> str:
    """Return the command of this process; a module that `python -m` runs is told by its name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [sys.argv[0]] if spec is None else ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """Return class, name and size of a model."""
    parameters = list(model.parameters())
    return {
        "class": type(model).__name__,
        "name": getattr(getattr(model, "config", None), "_name_or_path", "") or "",
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def describe_data(dataset: Any) -> dict[str, Any] | None:
    """
    Return size, columns and a fingerprint of the content of up to 16 rows, evenly spread; `None` without a dataset.

    The fingerprint is the same in every process and on every machine. It tells other data from this, not every change
    of a row. Random numbers that reading draws are put back.
    """
    if dataset is None:
        return None
    found: dict[str, Any] = {"class": type(dataset).__name__, "columns": getattr(dataset, "column_names", None)}
    stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if stream or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return {**found, "rows": None, "fingerprint": None}  # a stream: reading it would use it up
    rows, digest, random_state = len(dataset), hashlib.sha256(), take_rng()
    try:
        for index in sorted({i * rows // _SAMPLED_ROWS for i in range(_SAMPLED_ROWS)}) if rows else []:
            digest.update(repr(_plain(dataset[index])).encode())
    except Exception:  # rows that cannot be read in this way; training may never ask for them
        return {**found, "rows": rows, "fingerprint": None}
    finally:
        restore_rng(random_state)
    return {**found, "rows": rows, "fingerprint": digest.hexdigest()[:16]}


def _plain(value: Any) -> Any:
    """Return data whose text does not depend on addresses or on how a library prints."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, (str, bytes, int, float, bool, type(None))) else type(value).__name__


def schedule_of(args: Any, state: TrainerState, scheduler: Any) -> dict[str, Any]:
    """Return the spec of a schedule of this package, or the arguments of the Trainer's own."""
    stored = state.stateful_callbacks.get(SCHEDULE_KEY)
    if stored is not None and _is_live(stored, state, LEARNING_RATE, LRScheduleCallback):
        return stored["current"]
    own = getattr(scheduler, "schedule", None)
    if hasattr(own, "spec"):
        return own.spec()
    return {
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "lr_scheduler_kwargs": args.lr_scheduler_kwargs or {},
        "warmup_steps": args.warmup_steps,
    }


def methods_of(args: Any, state: TrainerState, schedule: dict[str, Any]) -> set[str]:
    """Return the keys of methods that arguments, schedule and sampler tell."""
    sampler = state.stateful_callbacks.get(ORDER_KEY, {})
    sampler = sampler if _is_live(sampler, state, ROW_ORDER, object) else {}
    # A class of a user may have the name of one of ours; checkpoints of earlier versions hold the name alone.
    ours = sampler.get("class", "hf_effi.").split("(")[-1].startswith("hf_effi.")
    found = set(methods_by_name({schedule.get("kind"), sampler.get("sampler") if ours else None}))
    found |= {"exact_sampler_resume"} if sampler else set()
    return found | {method.key for method in METHODS if method.is_on(args)}


def _is_live(entry: dict[str, Any], state: TrainerState, role: Role, writer: type) -> bool:
    """Whether an entry of the state is of this run, and not carried along from a checkpoint by a run without it."""
    owner = owner_of(state, role)
    return (owner is not None and isinstance(owner, writer)) or entry.get("step") == state.global_step


def methods_of_parts(parts: Iterable[Any]) -> set[str]:
    """
    Return the keys of methods that these callbacks, samplers and policies are; classes of users count as their base.
    """
    names = set()
    for part in _with_inner(parts):
        ours = next((base for base in type(part).__mro__ if base.__module__.startswith("hf_effi.")), None)
        if ours is None:
            continue
        names.add(ours.__name__)
        if ours is PatchCallback:
            functions = [getattr(patch, "func", patch) for patch in part.patches]
            names.update(f.__name__ for f in functions if getattr(f, "__module__", "").startswith("hf_effi."))
    return set(methods_by_name(names))


def _with_inner(parts: Iterable[Any]) -> Iterator[Any]:
    """Yield the parts, and the selector that one of ours wraps."""
    for part in parts:
        yield part
        inner = getattr(part, "selector", None)
        if inner is not None and type(part).__module__.startswith("hf_effi."):
            yield from _with_inner([inner])


def methods_by_name(names: Collection[str | None]) -> list[str]:
    """Return the keys of methods that have an entry point of one of these names."""
    return [
        method.key for method in METHODS if any(entry.rpartition(":")[2] in names for entry in method.entry_points)
    ]


def peak_memory() -> dict[str, int]:
    """Return the peaks of this process: resident memory since it started, accelerator memory since training began."""
    found = {}
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["host"] = peak if sys.platform == "darwin" else peak * 1024
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.max_memory_allocated()
    return found
