"""`KernelPatchCallback`: kernel patches for the time of a training, in a stock Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..kernels import PatchError, PatchHandle, patch


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Raise where the Trainer would use `nn.DataParallel`, whose replicas would call the functions of the first one."""
    if args.n_gpu > 1:
        raise PatchError(
            f"{args.n_gpu} devices in one process: nn.DataParallel copies a patched module with the original's weights. "
            "Start one process a device (torchrun, accelerate launch), or make one device visible."
        )


class KernelPatchCallback(TrainerCallback):
    """
    Apply [`~hf_effi.patch`] to the Trainer's model, and revert it when training has ended.

    The patch is applied when the Trainer is built, before DDP, FSDP, mixed precision or `torch.compile` wrap the model,
    and again at the start of a training whose model is another one (`model_init`) or was reverted. Checkpoints are the
    same with and without it. No event tells a callback that a training failed: use it as a context manager, or call
    `revert()`, to have the model back in that case too.

    Args:
        layers (`Mapping` or `str`): As in [`~hf_effi.patch`]; `"liger"` for all that Liger has for the model.
        options: The other arguments of [`~hf_effi.patch`]: `on_mismatch`, `verify`, `inputs`.

    Raises:
        PatchError: as [`~hf_effi.patch`], when the Trainer is built; or several devices in one process.

    Example:
    ```python
    with KernelPatchCallback("liger") as kernels:
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[kernels])
        print(kernels.handle)
        trainer.train()
    ```
    """

    def __init__(self, layers: Mapping[Any, Any] | str, **options: Any) -> None:
        self.layers, self.options = layers, options
        self.handle: PatchHandle | None = None
        self._model: nn.Module | None = None

    def apply(self, model: nn.Module) -> None:
        """Patch `model`, unless it, or a model that it wraps, is patched already."""
        if self._model is not None and any(module is self._model for module in model.modules()):
            return
        self.revert()
        self.handle = patch(model, self.layers, **self.options)
        self._model = model

    def revert(self) -> None:
        """Undo the patch; does nothing where there is none. The handle stays, to be printed."""
        self._model = None
        if self.handle is not None:
            self.handle.revert()

    def __enter__(self) -> KernelPatchCallback:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.revert()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_data_parallel(args)
        self.apply(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.apply(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.revert()
