"""`EMACallback`: an exponential average of the weights over the whole run, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import TrainerState, TrainingArguments

from ..errors import BrokenFileError, MismatchError
from ..functional.averaging import EMACorrection, RunningAverage, ema_decay, ema_rate
from ..functional.kept_arguments import keeps_arguments
from ..functional.options import refuse_idle
from ._averaging import Average, AveragingCallback, EvaluateOn
from ._live_weights import trained
from .probing import trained_steps


class EMACallback(AveragingCallback):
    """
    Keep an exponential average of the weights, one fp32 copy: `e <- d e + (1 - d) theta` after each `every_steps`
    updates.

    The copy is fp32 also where the weights are bf16: with `d = 0.999` one update moves the average by less than bf16
    can tell, and an average in bf16 stands still. For the rest it is as [`WeightAveragingCallback`], whose window
    forgets old weights wholly and needs a copy of each snapshot: the average exists from the beginning, is saved in
    `output_dir/folder` at the end or at Ctrl-C, is part of each checkpoint, and can be evaluated.

    Args:
        decay (`float`, *optional*, defaults to 0.999): `d`, in `[0, 1)`, for each snapshot. 0 is the weights
            themselves. The average looks back about `every_steps / (1 - d)` updates; more than a few per cent of the
            run is too long.
        half_life_steps (`float`, *optional*): Instead of `decay`: updates after which weights count half, see
            [`ema_decay`].
        every_steps (`int`, *optional*, defaults to 1): Updates between two snapshots, at least 1.
        start_step (`int`, *optional*, defaults to 0): Update whose weights the average begins with, at least 0.
        correction (`str`, *optional*, defaults to `"warmup"`): How it forgets the weights that it began with:
            `"warmup"`, `"bias"` or `"none"`, see [`ema_rate`].
        device (`str`, *optional*, defaults to `"cpu"`): Where the copy is; `"model"` for where the weights are, which
            is faster and takes 4 bytes of that memory for each trained weight.
        evaluate_on, swap_in, save_with_checkpoints, folder: As in [`WeightAveragingCallback`].

    Raises:
        ValueError: an argument out of range, or a folder of that name that holds something else.
        RefusedError: As in [`WeightAveragingCallback`].
        BrokenFileError: a checkpoint without the average.
        MismatchError: an average with other settings.

    Example:
    ```python
    average = EMACallback(half_life_steps=200, evaluate_on="average")
    Trainer(model, args, train_dataset=rows, eval_dataset=held_out, callbacks=[average]).train()
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        decay: float = 0.999,
        *,
        half_life_steps: float | None = None,
        every_steps: int = 1,
        start_step: int = 0,
        correction: EMACorrection = "warmup",
        device: Literal["cpu", "model"] = "cpu",
        evaluate_on: EvaluateOn = "live",
        swap_in: bool = False,
        save_with_checkpoints: bool = False,
        folder: str = "averaged",
    ) -> None:
        for name, value, least in (("every_steps", every_steps, 1), ("start_step", start_step, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        refuse_idle("decay", decay, 0.999, acts=half_life_steps is None, needs="without half_life_steps")
        if half_life_steps is not None:
            decay = ema_decay(half_life_steps, every_steps)
        ema_rate(1, decay, correction)  # checks both
        if device not in ("cpu", "model"):
            raise ValueError(f"device={device!r} is unknown. Choose 'cpu' or 'model'.")
        super().__init__(evaluate_on, swap_in, save_with_checkpoints, folder)
        self.decay, self.every_steps, self.start_step = decay, every_steps, start_step
        self.correction, self.device = correction, device

    def _fresh(self, args: TrainingArguments, state: TrainerState) -> Average:
        return RunningAverage("cpu" if self.device == "cpu" else None)

    def _begin(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.start_step == 0 and self.correction != "bias":
            self._blend(0)

    def _note(self, state: TrainerState) -> None:
        since = trained_steps(state) - self.start_step
        if since < 0 or since % self.every_steps:
            return
        number = since // self.every_steps
        if number or self.correction != "bias":
            self._blend(number)

    def _blend(self, number: int) -> None:
        average: Any = self._average
        average.blend(trained(self._model), ema_rate(number, self.decay, self.correction))

    def _load(self, stored: dict[str, Any]) -> None:
        super()._load(stored)
        if self.device == "model":
            places = {name: tensor.device for name, tensor in trained(self._model).items()}
            average: Any = self._average
            average.mean = {name: tensor.to(places[name]) for name, tensor in average.mean.items()}

    def _settings(self) -> dict[str, Any]:
        return {
            "kind": "ema of the run",
            "decay": self.decay,
            "every_steps": self.every_steps,
            "start_step": self.start_step,
            "correction": self.correction,
        }

    def _check_stored(
        self, args: TrainingArguments, path: Path, stored: dict[str, Any] | None, state: TrainerState
    ) -> bool:
        begun = trained_steps(state) - self.start_step
        if begun < (self.every_steps if self.correction == "bias" else 0):
            return False
        if stored is None:
            raise BrokenFileError(
                f"{path} is missing: the checkpoint lies elsewhere or was made without EMACallback. Resume from a "
                f"folder in output_dir={args.output_dir!r}, or begin the average later: start_step above "
                f"{trained_steps(state)}."
            )
        if stored.get("settings") != self._settings():
            raise MismatchError(
                f"{path} holds an average with {stored.get('settings', 'other settings')}, but this run has "
                f"{self._settings()}. Keep these arguments, or begin the average later: start_step above "
                f"{trained_steps(state)}."
            )
        return True

    def _description(self, average: Average, steps: list[int]) -> dict[str, Any]:
        return self._settings() | {"snapshots": average.count}
