"""`norms_of`: the gradient norms of a finished run, wherever they were kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState

from .._files import load_json
from .._run_record import has_record, read_run
from ..callbacks.gradient_norms import STATE_KEY, GradientNormsCallback, read_norms
from ..checkpoint.folders import checkpoints_in
from ..errors import BrokenFileError, MismatchError
from ..functional import metrics
from ..functional.gradient_norms import GradientNorms
from ..functional.probes import without_probes

_STATE_FILE = "trainer_state.json"


def norms_of(run: Any) -> GradientNorms:
    """
    Return the gradient norms of a finished run, for [`refined_by_gradient_norm`].

    The record of a [`GradientNormsCallback`] is taken where there is one. Otherwise it is the log: the means that this
    callback logged, or the Trainer's own `grad_norm`, which is an L2 norm, so that only `optimizer="sgd"` can be
    refined from it.

    Args:
        run: The callback; a Trainer that has trained; a `TrainerState`; a folder: `output_dir`, of which the latest
            checkpoint or the run record is read, or one checkpoint; or a record that [`read_run`] returned.

    Raises:
        FileNotFoundError: the folder has neither a checkpoint nor a run record.
        BrokenFileError: a file is damaged.
        MismatchError: the run has logged no norms, or none of its last tenth.
        ValueError: `run` is none of these.

    Example:
    ```python
    Trainer(model, args, train_dataset=rows, callbacks=[GradientNormsCallback()]).train()
    schedule = refined_by_gradient_norm(norms_of(args.output_dir))
    ```
    """
    if isinstance(run, GradientNormsCallback):
        found = run.norms
    elif isinstance(run, (Trainer, TrainerState)):
        state = run.state if isinstance(run, Trainer) else run
        kept: Any = state.stateful_callbacks  # a dict, once the state is made
        found = _of_state(kept, state.log_history, state.max_steps)
    elif isinstance(run, (str, Path)):
        found = _of_folder(Path(run))
    elif isinstance(run, Mapping):
        found = _of_log(run["log_history"], _total(run))
    else:
        raise ValueError(
            f"run is {type(run).__name__}. Pass a GradientNormsCallback, a Trainer, a TrainerState, the folder of a "
            "run, or what read_run returned."
        )
    if found is None:
        raise MismatchError(
            "The run has no gradient norms: it trained without GradientNormsCallback() and logged no grad_norm. Train "
            "it with the callback."
        )
    if found.updates[-1] < 0.9 * found.total:
        raise MismatchError(
            f"The norms end at update {found.updates[-1]} of {found.total}, and a schedule of a whole run is refined "
            "from the whole of one. Let it finish; of a run that was stopped on purpose pass "
            "GradientNorms(updates, total=where it stopped, l1=..., l2=...)."
        )
    return found


def _of_state(kept: Mapping[str, Any] | None, log: Iterable[Mapping[str, Any]], total: int) -> GradientNorms | None:
    record = (kept or {}).get(STATE_KEY)
    recorded = read_norms(record) if record is not None else None
    return recorded or _of_log(log, total)


def _of_log(log: Iterable[Mapping[str, Any]], total: int) -> GradientNorms | None:
    entries = without_probes(log)
    for names in ({"l1": metrics.GRADIENT_L1, "l2": metrics.GRADIENT_L2}, {"l2": "grad_norm"}):
        rows = {
            int(entry["step"]): [float(entry[name]) for name in names.values()]
            for entry in entries
            if all(math.isfinite(float(entry.get(name, math.nan))) for name in names.values())
        }
        if rows:
            updates = tuple(sorted(rows))
            columns = zip(*(rows[update] for update in updates), strict=True)
            return GradientNorms(updates, max(total, updates[-1]), **dict(zip(names, columns, strict=True)))
    return None


def _of_folder(folder: Path) -> GradientNorms | None:
    """Read the checkpoint with the most updates, or the run record where that got further."""
    sources: list[tuple[int, Any, list[Any], int]] = []
    for file in (place / _STATE_FILE for place in (folder, *checkpoints_in(folder))):
        if file.is_file():
            state = load_json(file)
            try:
                parts = state["stateful_callbacks"], state["log_history"], state["max_steps"]
                sources.append((state["global_step"], *parts))
            except (KeyError, TypeError) as error:
                raise BrokenFileError(f"{file} is no state of a Trainer: {error!r} is missing.") from error
    if has_record(folder):
        run = read_run(folder)
        sources.append((max([e["step"] for e in run["events"]], default=0), None, run["log_history"], _total(run)))
    if not sources:
        raise FileNotFoundError(
            f"{folder} has no checkpoint, no {_STATE_FILE} and no run record. Pass the output_dir of a run that "
            "saved one of them (trainer.save_state() writes the state), or the callback."
        )
    return _of_state(*max(sources, key=lambda source: source[0])[1:])


def _total(run: Mapping[str, Any]) -> int:
    return int(run.get("max_steps") or 1)
