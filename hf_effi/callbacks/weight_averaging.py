"""`WeightAveragingCallback`: the average of the last checkpoints of a run, saved beside it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._files import load_state, save_aside, save_json
from ..checkpoint.run_folder import run_folder
from ..errors import BrokenFileError, MismatchError, RefusedError
from ..functional.averaging import AverageKind, RunningAverage, averaging_weights, exchange
from ..functional.kept_arguments import keeps_arguments
from ..functional.schedules import warn_decay_to_zero
from ._engines import sharding_engine
from ._side_file import SideFileCallback
from ._turns import READ, TurnCallback, in_turn
from .owners import Role
from .probing import plan_of, trained_total

logger = logging.getLogger(__name__)

AVERAGE_FILE = "effi_average.pt"
_DESCRIPTION = "average.json"


class WeightAveragingCallback(TurnCallback, SideFileCallback):
    """
    Average the weights at the last update, and at `last - 1` earlier ones, `every_steps` apart.

    Training itself is not changed. The average is held in fp32 on the CPU, and saved at the end in
    `output_dir/folder`, with a file `average.json` that says of which updates it is; in a hyperparameter search, in
    the folder of each trial. A checkpoint inside the window carries the average so far, so that a resumed run equals
    the uninterrupted one. Updates that a search tries and undoes ([`AutoLRSCallback`]) are neither counted nor
    averaged; what another callback does to the weights after an update ([`ReptileCallback`]) is.

    Args:
        last (`int`, *optional*, defaults to 6): Snapshots, at least 1. Where the run is too short, as many as it has.
        every_steps (`int`, *optional*): Updates between two snapshots. `None`: 1 % of the run, at least 1; the paper's
            interval is not known to us.
        kind (`str`, *optional*, defaults to `"ema"`): `"ema"`, `"uniform"` or `"linear"`, see [`averaging_weights`].
        alpha (`float`, *optional*, defaults to 0.2): Of `"ema"`, in `(0, 1]`.
        swap_in (`bool`, *optional*, defaults to `False`): Whether the model holds the average after training; a line
            in the log says so. `trainer.save_model()` then saves the average.
        folder (`str`, *optional*, defaults to `"averaged"`): Name below `output_dir`.

    Raises:
        ValueError: an argument out of range, or a folder of that name that holds something else.
        RefusedError: DeepSpeed, FSDP or a schedule-free optimizer; `swap_in` together with `load_best_model_at_end`.
        BrokenFileError: a checkpoint without the average it needs.
        MismatchError: an average of other updates.

    Example:
    ```python
    Trainer(model, args, train_dataset=rows, callbacks=[WeightAveragingCallback(swap_in=True)]).train()
    ```
    """

    role = Role(
        "weight average",
        "Two averages of the weights want the same place in a checkpoint",
        "Keep one; average_checkpoints makes others from the checkpoints of the run.",
    )
    side_file = AVERAGE_FILE

    @keeps_arguments
    def __init__(
        self,
        last: int = 6,
        *,
        every_steps: int | None = None,
        kind: AverageKind = "ema",
        alpha: float = 0.2,
        swap_in: bool = False,
        folder: str = "averaged",
    ) -> None:
        for name, value in (("last", last), ("every_steps", 1 if every_steps is None else every_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        averaging_weights(last, kind, alpha)  # checks the other two
        if not folder or Path(folder).name != folder:
            raise ValueError(f"folder={folder!r} must be a plain name; it is made inside output_dir.")
        self.last, self.every_steps, self.kind, self.alpha = last, every_steps, kind, alpha
        self.swap_in, self.folder = swap_in, folder
        self._plan: dict[int, float] = {}
        self._average = RunningAverage()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._check(args, state)
        self._plan, self._average = {}, RunningAverage()

    def _make_plan(self, args: TrainingArguments, state: TrainerState) -> None:
        """Choose the updates to average, once every callback has said at the beginning which ones are probes."""
        if self._plan:
            return
        total = trained_total(state)
        every = self.every_steps or max(1, total // 100)
        counts = [total - every * back for back in range(self.last)]
        steps = [plan_of(state).update_of(count) for count in reversed(counts) if count > 0]
        self._plan = dict(zip(steps, averaging_weights(len(steps), self.kind, self.alpha), strict=True))
        if any(step <= state.global_step for step in steps):
            self._restore(args, state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._make_plan(args, state)
        if state.global_step == 0 and args.process_index == 0:
            warn_decay_to_zero(
                kwargs["lr_scheduler"],
                state.max_steps,
                "and after such a decay the average of the last checkpoints is worth little or nothing. Let it end at "
                "a third of its peak, or drop WeightAveragingCallback.",
            )

    @in_turn(READ)
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step in self._plan:
            self._average.push(_trained(kwargs["model"]), self._plan[state.global_step])

    def side_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        if not args.should_save or not self._average.count:
            return None
        return {"steps": self._done(state), "average": self._average.state_dict()}

    @in_turn(READ)
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._make_plan(args, state)  # a run that was resumed at its end has no epoch
        steps = self._done(state)
        if not steps:
            logger.warning(
                "Training ended after %d updates, before the first snapshot at update %d: nothing was averaged.",
                state.global_step,
                min(self._plan),
            )
            return
        live, mean = _trained(kwargs["model"]), self._average.mean
        exchange(live, mean)
        if args.should_save:
            save_aside(run_folder(args, state) / self.folder, lambda folder: self._save(folder, steps, **kwargs))
        if self.swap_in:
            logger.warning("The model now holds the average of its weights after updates %s, not the last.", steps)
        else:
            exchange(live, mean)
        self._average = RunningAverage()

    def _check(self, args: TrainingArguments, state: TrainerState) -> None:
        if sharding_engine(args):
            raise RefusedError(
                "WeightAveragingCallback reads whole weights, which DeepSpeed, FSDP and tensor parallelism keep in "
                "shards. Train with DDP or on one device, or average what was saved: average_checkpoints."
            )
        if "schedule_free" in str(args.optim):
            raise RefusedError(f"optim={args.optim!r} averages its iterates itself. Drop WeightAveragingCallback.")
        if self.swap_in and args.load_best_model_at_end:
            raise RefusedError(
                "swap_in=True and load_best_model_at_end=True both say what the model holds at the end. Set one to "
                f"False; the average is in {self.folder!r} either way."
            )
        folder = run_folder(args, state) / self.folder
        if folder.exists() and not (folder / _DESCRIPTION).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"{folder} exists and holds no average, and would be replaced by one. Choose another folder=, or move "
                "it."
            )

    def _done(self, state: TrainerState) -> list[int]:
        return [step for step in self._plan if step <= state.global_step]

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        path = self.side_path(args, state)
        if not path.exists():
            raise BrokenFileError(
                f"{path} is missing: the checkpoint lies elsewhere or was made without WeightAveragingCallback. "
                f"Resume from a folder in output_dir={args.output_dir!r}, or from before update {min(self._plan)}."
            )
        stored = load_state(path)
        if stored["steps"] != self._done(state):
            raise MismatchError(
                f"{path} averages updates {stored['steps']}, but this run wants {self._done(state)}. Keep max_steps, "
                f"last and every_steps, or resume from before update {min(self._plan)}."
            )
        self._average.load_state_dict(stored["average"])

    def _save(self, folder: Path, steps: list[int], **kwargs: Any) -> None:
        folder.mkdir()
        model, processing = kwargs["model"], kwargs.get("processing_class")
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        else:
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        if hasattr(processing, "save_pretrained"):
            processing.save_pretrained(folder)
        total = sum(self._plan[step] for step in steps)
        shares = [self._plan[step] / total for step in steps]
        made = {
            "kind": self.kind,
            "alpha": self.alpha if self.kind == "ema" else None,
            "steps": steps,
            "weights": shares,
        }
        save_json(folder / _DESCRIPTION, made, indent=1)


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes: trainable parameters, tied ones once, and floating-point buffers."""
    state = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return state | {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
