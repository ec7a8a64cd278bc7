"""`ReptileCallback`: a Reptile step every k updates, against forgetting in continual pre-training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._files import load_state
from ..errors import BrokenFileError, MismatchError, RefusedError
from ..functional.kept_arguments import keeps_arguments
from ..functional.reptile import reptile_step
from ._engines import sharding_engine
from ._side_file import SideFileCallback
from ._turns import WRITE, TurnCallback, in_turn
from .owners import Role
from .probing import holds_training_weights, outside_probes, trained_steps, trained_total

REFERENCE_FILE = "effi_reptile.pt"


class ReptileCallback(TurnCallback, SideFileCallback):
    """
    Every `every_steps` updates, go back most of the way: `theta <- theta_ref + beta (theta - theta_ref)`.

    With replayed data in the batches this is meta-experience replay. The optimizer's moments stay as they are. The
    reference is saved with each checkpoint, so a resumed run equals the uninterrupted one. Updates that a search tries
    and undoes ([`AutoLRSCallback`]) are not counted.

    Args:
        every_steps (`int`): Updates between two Reptile steps. Released code: 500; IBM's port: 100.
        beta (`float`): Share of the way that is kept, in `(0, 1]`. Released code: 0.01, which keeps almost nothing of
            the progress; the port: 0.1. For short runs start at 0.3. With 1 nothing changes, to the bit.
        last_partial (`bool`, *optional*, defaults to `False`): Whether to step once more when training ends inside an
            interval.

    Raises:
        ValueError: an argument out of range.
        RefusedError: DeepSpeed or FSDP, whose master weights a callback cannot reach.
        BrokenFileError: a checkpoint without its reference.
        MismatchError: a reference of other parameters.

    Example:
    ```python
    Trainer(model, args, train_dataset=rows, callbacks=[ReptileCallback(every_steps=100, beta=0.3)]).train()
    ```
    """

    role = Role("Reptile", "Two Reptile steps want the same place in a checkpoint", "Keep one.")
    side_file = REFERENCE_FILE

    @keeps_arguments
    def __init__(self, every_steps: int, beta: float, *, last_partial: bool = False) -> None:
        if not isinstance(every_steps, int) or isinstance(every_steps, bool) or every_steps < 1:
            raise ValueError(f"every_steps={every_steps!r} must be an integer of at least 1.")
        reptile_step([], [], beta)  # checks the range
        self.every_steps, self.beta, self.last_partial = every_steps, beta, last_partial
        self._references: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if sharding_engine(args):
            raise RefusedError(
                "ReptileCallback writes the weights, but DeepSpeed and FSDP train from master weights of their own "
                "that would overwrite them, and tensor parallelism has them in parts. Train with DDP or on one device."
            )
        super().on_train_begin(args, state, control, **kwargs)
        weights = self._trainable(kwargs["model"])
        self._references = {name: weight.detach().clone() for name, weight in weights.items()}
        if self._is_the_model(state):
            return  # the reference of this moment is the weights themselves
        path = self.side_path(args, state)
        if not path.exists():
            raise BrokenFileError(
                f"{path} is missing: the checkpoint lies elsewhere or was made without ReptileCallback. Resume from "
                f"a folder in output_dir={args.output_dir!r}, or from an update of training that is a multiple of "
                f"{self.every_steps}."
            )
        stored = load_state(path)
        if stored.keys() != weights.keys():
            raise MismatchError(f"{path} holds other parameters than the model trains. Train the same ones.")
        for name, value in stored.items():
            self._references[name].copy_(value)

    @in_turn(WRITE)
    @outside_probes
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if trained_steps(state) % self.every_steps == 0:
            self._step(kwargs["model"])

    def side_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, torch.Tensor] | None:
        return self._references if args.should_save and not self._is_the_model(state) else None

    @in_turn(WRITE)
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        done = trained_steps(state)
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None  # other weights than these
        if self.last_partial and not best and done >= trained_total(state) and done % self.every_steps:
            self._step(kwargs["model"])
        self._references = {}

    def _is_the_model(self, state: TrainerState) -> bool:
        """Whether the reference of this moment is the model: right after a Reptile step, and not inside of a probe."""
        return trained_steps(state) % self.every_steps == 0 and holds_training_weights(state)

    def _step(self, model: Any) -> None:
        reptile_step(self._trainable(model).values(), self._references.values(), self.beta)

    @staticmethod
    def _trainable(model: Any) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
