"""TiledMLP as a value of `patch`: checked like every other replacement, and under the same handle."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

from ..parallel.tiled_mlp import check_num_shards, tiled_forward
from ._errors import PatchError
from ._layers import Unit
from ._targets import GATED_NAMES, Target, kernel_name


class TiledMLP:
    """
    A value of [`~hf_effi.patch`] for gated MLPs: what [`~hf_effi.tile_mlp`] does, under the handle of `patch`.

    Args:
        num_shards (`int`, *optional*): As in [`~hf_effi.tile_mlp`].

    Raises:
        ValueError: a bad `num_shards`.
        PatchError: when applied: a module that is no gated MLP.

    Example:
    ```python
    with patch(model, {"SwiGLUMLP": TiledMLP(num_shards=8), "RMSNorm": "liger"}):
        trainer.train()
    ```
    """

    def __init__(self, num_shards: int | None = None) -> None:
        check_num_shards(num_shards)
        self.num_shards = num_shards

    def units(self, targets: Sequence[Target]) -> list[Unit]:
        """Return one unit a target."""
        return [self._unit(target) for target in targets]

    def _unit(self, target: Target) -> Unit:
        if kernel_name(target.module) not in GATED_NAMES:
            raise PatchError(
                f"TiledMLP cannot compute {target.name}: {type(target.module).__name__} is none of "
                f"{', '.join(GATED_NAMES)}."
            )
        forward = MethodType(tiled_forward(target.name, target.module, self.num_shards), target.module)
        return Unit((target,), (forward,), target.original, forward, (target.module,), "TiledMLP")
