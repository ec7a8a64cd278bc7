"""`PatchCallback`: changes to the model for the time of a training, in a stock Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class PatchCallback(TrainerCallback):
    """
    Apply patches such as `tile_mlp` to the Trainer's model, and revert them when training has ended.

    They are applied when the Trainer is built, so that what cannot be patched is known before the data is touched, and
    anew at the start of training, on the model that is trained. An evaluation during training runs the patched model.
    After a training that failed the model stays patched: call `revert()`.

    Args:
        patches (`Callable`): Functions `model -> handle`, where `handle.revert()` undoes the patch; in order.

    Raises:
        TypeError: a patch that cannot be called, or none at all.

    Example:
    ```python
    callback = PatchCallback(tile_mlp, partial(stream_layers, num_chunks=4))
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    ```
    """

    def __init__(self, *patches: Callable[[nn.Module], Any]) -> None:
        wrong = [patch for patch in patches if not callable(patch)]
        if wrong or not patches:
            raise TypeError(
                f"PatchCallback takes functions of a model, such as tile_mlp; got {wrong or 'none'}. Pass the "
                "function itself, or functools.partial(function, setting=...), not the handle that it returns."
            )
        self.patches = patches
        self._handles: list[Any] = []

    def apply(self, model: nn.Module) -> None:
        """Patch `model`, with all patches or none; what was patched before is reverted."""
        self.revert()
        try:
            for patch in self.patches:
                self._handles.append(patch(model))
        except Exception:
            self.revert()
            raise

    def revert(self) -> None:
        """Undo the patches, the last one first; does nothing where there are none."""
        while self._handles:
            self._handles[-1].revert()
            self._handles.pop()

    def __enter__(self) -> PatchCallback:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.revert()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.apply(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.apply(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.revert()
