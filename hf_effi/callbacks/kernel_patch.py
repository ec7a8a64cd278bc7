"""`KernelPatchCallback`: kernel patches for the time of a training, in a stock Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional.kept_arguments import keeps_arguments
from ..kernels import KernelPatchHandle, patch
from .patch import PatchCallback


def refuse_data_parallel(args: TrainingArguments) -> None:
    """
    Raise where the Trainer would use `nn.DataParallel`, whose replicas would call the functions of the first one.
    """
    if args.n_gpu > 1:
        raise RefusedError(
            f"{args.n_gpu} devices in one process: nn.DataParallel copies a patched module with the original's "
            "weights. Start one process per device (torchrun, accelerate launch), or make one device visible."
        )


class KernelPatchCallback(PatchCallback):
    """
    [`PatchCallback`] with [`~hf_effi.patch`]: kernels for the time of a training.

    The patch is applied when the Trainer is built, before DDP, FSDP, mixed precision or `torch.compile` wrap the
    model, and reverted when training has ended. Checkpoints are the same with and without it.

    Args:
        layers (`Mapping` or `str`): As in [`~hf_effi.patch`]; `"liger"` for all that Liger has for the model.
        options: The other arguments of [`~hf_effi.patch`]: `on_mismatch`, `verify`, `inputs`.

    Attributes:
        handle ([`~hf_effi.kernels.KernelPatchHandle`]): The last patch, to be printed; also when it is reverted.

    Raises:
        RefusedError: as [`~hf_effi.patch`], when the Trainer is built; or several devices in one process.

    Example:
    ```python
    with KernelPatchCallback("liger") as kernels:
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[kernels])
        print(kernels.handle)
        trainer.train()
    ```
    """

    @keeps_arguments
    def __init__(self, layers: Mapping[Any, Any] | str, **options: Any) -> None:
        super().__init__(self._patch)
        self.layers, self.options = layers, options
        self.handle: KernelPatchHandle | None = None
        self._model: nn.Module | None = None

    def apply(self, model: nn.Module) -> None:
        """
        Patch `model`, unless it, or a model that it wraps, is patched: once it is sharded, nothing can be checked.
        """
        if self.handle is not None and self.handle.active and any(m is self._model for m in model.modules()):
            return
        super().apply(model)
        self._model = model

    def _patch(self, model: nn.Module) -> KernelPatchHandle:
        self.handle = patch(model, self.layers, **self.options)
        return self.handle

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_data_parallel(args)
        super().on_init_end(args, state, control, **kwargs)
