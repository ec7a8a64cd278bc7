"""`KernelPatchMixin`: lets any Trainer take kernel patches from its config."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ...callbacks.kernel_patch import refuse_data_parallel
from ...errors import RefusedError
from ...kernels import patch


@dataclass
class KernelArguments:
    """
    Field that a config class gains.

    Args:
        kernel_patch (`str` or `dict`, *optional*): `"liger"`, or a mapping from kernel names or module patterns to
            `"liger"`, `"hf_effi"` or `"organisation/repository:Layer"`, as a dict or as JSON. See [`~hf_effi.patch`].
    """

    kernel_patch: dict | str | None = field(
        default=None,
        metadata={"help": "Kernels for the training: 'liger', or {kernel name or pattern: source}. None: as it is."},
    )


def layers_from_config(args: Any) -> dict[str, Any] | str | None:
    """
    Return what a config asks `patch` to do, or `None`.

    Raises:
        ValueError: text that is neither `"liger"` nor a JSON object, or another type.
    """
    value = getattr(args, "kernel_patch", None)  # a plain config of the stock trainer has no such field
    if value is None or value == "liger":
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"kernel_patch={args.kernel_patch!r} must be 'liger' or a mapping such as {{'RMSNorm': 'liger'}}, as a "
            "dict or as JSON."
        )
    return value


class KernelPatchMixin:
    """
    Overrides `train` so that `args.kernel_patch` holds during it, and only then. Put it before the Trainer class.

    The model is patched before it is wrapped, and is back to what it was when `train` returns or raises.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if layers_from_config(self.args) is None:
            return
        refuse_data_parallel(self.args)
        if self.model_init is not None:
            raise RefusedError(
                "kernel_patch with model_init: train() makes a new model after the patch. Pass "
                "callbacks=[KernelPatchCallback(...)] instead."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        layers = layers_from_config(self.args)
        if layers is None:
            return super().train(*args, **kwargs)
        with patch(self.model, layers):
            return super().train(*args, **kwargs)
