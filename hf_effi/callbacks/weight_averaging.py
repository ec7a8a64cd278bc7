"""`WeightAveragingCallback`: the average of the latest weights of a run, at any moment of it."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerState, TrainingArguments

from ..checkpoint.run_folder import run_folder
from ..errors import BrokenFileError, MismatchError, RefusedError
from ..functional.averaging import (
    AverageKind,
    RunningAverage,
    WindowAverage,
    averaging_weights,
    trend_weights,
)
from ..functional.kept_arguments import keeps_arguments
from ..functional.options import refuse_idle
from ._averaging import AVERAGE_FILE as AVERAGE_FILE
from ._averaging import Average, AveragingCallback, EvaluateOn
from ._live_weights import trained
from .probing import plan_of, trained_steps, trained_total

logger = logging.getLogger(__name__)

WindowKind = AverageKind | Literal["trend", "swa"]


class WeightAveragingCallback(AveragingCallback):
    """
    Average the weights after the latest `last` snapshots, `every_steps` updates apart; the last update is one.

    Training itself is not changed. The average rolls along: it exists from the first snapshot on, and is exact at any
    moment, so a run that is stopped early (`should_training_stop`, Ctrl-C) has its average too. It is saved at the end
    in `output_dir/folder`, with a file `average.json` that says of which updates it is; in a hyperparameter search, in
    the folder of each trial. Each checkpoint carries the snapshots, so that a resumed run equals the uninterrupted
    one. Updates that a search tries and undoes ([`AutoLRSCallback`]) are neither counted nor averaged; what another
    callback does to the weights after an update ([`ReptileCallback`]) is.

    Memory: `last` copies of the trained weights in their own dtype, on the host of every process (or on its disk), and
    one in fp32 while the average is read; `kind="swa"` keeps one fp32 copy. A checkpoint grows by the same. Under
    FSDP2 each process keeps its shards. Trained weights are trainable parameters, tied ones once, and floating-point
    buffers; of integer buffers the latest counts. Statistics of BatchNorm are averaged, not measured anew.

    Args:
        last (`int`, *optional*, defaults to 6): Snapshots, at least 1. Where the run is too short, as many as it has.
        every_steps (`int`, *optional*): Updates between two snapshots. `None`: 1 % of the run, at least 1; the paper's
            interval is not known to us.
        kind (`str`, *optional*, defaults to `"ema"`): `"uniform"` (LAWA), `"linear"` or `"ema"` over the window, see
            [`averaging_weights`]; `"trend"`, see [`trend_weights`], which tolerates a window that is several times too
            long; or `"swa"`, the mean of all snapshots from `start_step` on.
        alpha (`float`, *optional*, defaults to 0.2): Of `"ema"`, in `(0, 1]`.
        start_step (`int`, *optional*): Of `"swa"`: first update that counts, at least 1; three quarters of the run if
            `None`.
        evaluate_on (`str`, *optional*, defaults to `"live"`): Which weights the Trainer's evaluations see. `"average"`
            lends the average to the model for each of them, under the same names, so that `metric_for_best_model` and
            early stopping go by it; `"both"` evaluates twice and adds `eval_averaged_loss` and the like. Before the
            first snapshot the average is the weights themselves. The log entry has `effi/average_snapshots`.
        swap_in (`bool`, *optional*, defaults to `False`): Whether the model holds the average after training; a line
            in the log says so. `trainer.save_model()` then saves the average. With `load_best_model_at_end` and a
            metric of the average the model always holds the average of the best checkpoint.
        save_with_checkpoints (`bool`, *optional*, defaults to `False`): Whether each `checkpoint-N` holds a model of
            the average too, in `checkpoint-N/folder`.
        store (`str`, *optional*, defaults to `"memory"`): `"disk"` keeps the snapshots in files in `output_dir` that
            have no name and are gone when the process is.
        folder (`str`, *optional*, defaults to `"averaged"`): Name below `output_dir`.

    Raises:
        ValueError: an argument out of range, or a folder of that name that holds something else.
        RefusedError: DeepSpeed, FSDP 1, tensor parallelism or a schedule-free optimizer; `swap_in` together with
            `load_best_model_at_end` by a metric of the live weights; vLLM with an evaluation on the average.
        BrokenFileError: a checkpoint without the average it needs.
        MismatchError: an average of other updates.

    Example:
    ```python
    average = WeightAveragingCallback(10, every_steps=50, kind="uniform", evaluate_on="both")
    Trainer(model, args, train_dataset=rows, eval_dataset=held_out, callbacks=[average]).train()
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        last: int = 6,
        *,
        every_steps: int | None = None,
        kind: WindowKind = "ema",
        alpha: float = 0.2,
        swap_in: bool = False,
        folder: str = "averaged",
        start_step: int | None = None,
        evaluate_on: EvaluateOn = "live",
        save_with_checkpoints: bool = False,
        store: Literal["memory", "disk"] = "memory",
    ) -> None:
        numbers = {"last": last, "every_steps": every_steps, "start_step": start_step}
        for name, value in numbers.items():
            if value is None and name != "last":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        if kind in ("trend", "swa"):
            refuse_idle("alpha", alpha, 0.2, acts=False, needs="with kind='ema'")
        elif kind in ("ema", "uniform", "linear"):
            averaging_weights(last, kind, alpha)  # checks alpha
        else:
            raise ValueError(f"kind={kind!r} is unknown. Choose 'ema', 'uniform', 'linear', 'trend' or 'swa'.")
        refuse_idle("start_step", start_step, None, acts=kind == "swa", needs="with kind='swa'")
        refuse_idle("last", last, 6, acts=kind != "swa", needs="with a window, which kind='swa' has not")
        if store not in ("memory", "disk"):
            raise ValueError(f"store={store!r} is unknown. Choose 'memory' or 'disk'.")
        refuse_idle("store", store, "memory", acts=kind != "swa", needs="with a window, which kind='swa' has not")
        if store == "disk" and os.name == "nt":
            raise RefusedError("store='disk' needs files without a name, which Windows has not. Use store='memory'.")
        super().__init__(evaluate_on, swap_in, save_with_checkpoints, folder)
        self.last, self.every_steps, self.kind, self.alpha = last, every_steps, kind, alpha
        self.start_step, self.store = start_step, store

    def _fresh(self, args: TrainingArguments, state: TrainerState) -> Average:
        if self.kind == "swa":
            return RunningAverage()
        keep = None
        if self.store == "disk":
            folder = run_folder(args, state)
            folder.mkdir(parents=True, exist_ok=True)
            keep = lambda snapshot: _in_a_nameless_file(folder, snapshot)  # noqa: E731
        return WindowAverage(self.last, self._weights, keep)

    def _weights(self, count: int) -> list[float]:
        kind = self.kind
        if kind == "trend":
            return trend_weights(count)
        return averaging_weights(count, "uniform" if kind == "swa" else kind, self.alpha)

    def _interval(self, state: TrainerState) -> int:
        return self.every_steps or max(1, trained_total(state) // 100)

    def _first(self, state: TrainerState) -> int:
        """Return the first update of training that may be a snapshot."""
        if self.kind != "swa":
            return 1
        return self.start_step or max(1, 3 * trained_total(state) // 4)

    def _snapshots(self, state: TrainerState, until: int) -> list[int]:
        """Return the updates that the average is of after `until` updates of training."""
        total, every = trained_total(state), self._interval(state)
        counts = [n for n in range(until - (until - total) % every, self._first(state) - 1, -every) if n >= 1]
        kept = counts if self.kind == "swa" else counts[: self.last]
        return [plan_of(state).update_of(count) for count in reversed(kept)]

    def _note(self, state: TrainerState) -> None:
        done = trained_steps(state)
        if (trained_total(state) - done) % self._interval(state) or done < self._first(state):
            return
        average: Any = self._average
        average.push(trained(self._model))
        self._steps.append(state.global_step)
        if self.kind != "swa":
            self._steps = self._steps[-self.last :]

    def _settings(self) -> dict[str, Any]:
        return {"kind": "swa" if self.kind == "swa" else "window"}

    def _check_stored(
        self, args: TrainingArguments, path: Path, stored: dict[str, Any] | None, state: TrainerState
    ) -> bool:
        wanted = self._snapshots(state, trained_steps(state))
        if stored is None and not wanted:
            return False
        if stored is not None and stored.get("settings") == self._settings() and stored["steps"] == wanted:
            return True
        first = min(self._snapshots(state, trained_total(state)))
        if state.global_step < first:
            logger.warning(
                "%s holds no average that this run can go on with (max_steps, last, every_steps or the folder are "
                "others): its window begins anew. The average at the end will be whole.",
                path.parent,
            )
            return False
        if stored is None:
            raise BrokenFileError(
                f"{path} is missing: the checkpoint lies elsewhere or was made without WeightAveragingCallback. "
                f"Resume from a folder in output_dir={args.output_dir!r}, or from before update {first}."
            )
        made = stored.get("settings", {"kind": "one of an older version of hf_effi"})["kind"]
        raise MismatchError(
            f"{path} averages updates {stored['steps']} ({made}), but this run wants {wanted} "
            f"({self._settings()['kind']}). Keep max_steps, last, every_steps and kind, or resume from before update "
            f"{first}."
        )

    def _description(self, average: Average, steps: list[int]) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "alpha": self.alpha if self.kind == "ema" else None,
            "steps": steps,
            "weights": self._weights(len(steps)),
        }


def _in_a_nameless_file(folder: Path, snapshot: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write a snapshot to a file, and return it as the system reads it from there; no name of it is left."""
    number, name = tempfile.mkstemp(prefix="_snapshot_", dir=folder)
    os.close(number)
    try:
        torch.save(snapshot, name)
        return torch.load(name, mmap=True, weights_only=True)
    finally:
        os.unlink(name)
