"""Which engines an optimizer is right under."""

from __future__ import annotations

from typing import Any

from ..errors import RefusedError
from .factory import OptimizerFactory


def check_engine(trainer: Any, factory: OptimizerFactory) -> None:
    """
    Refuse an engine under which an optimizer would not see what it needs.

    DeepSpeed ZeRO gives an optimizer flat pieces of all weights in place of tensors, FSDP its shards: a rule that
    takes each weight by itself is right on both, one of matrices or norms is not right on the first, and on the second
    where it says so.

    Raises:
        RefusedError: the trainer runs under such an engine.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    stage = plugin.zero_stage if plugin is not None else 0
    if stage and not factory.elementwise:
        sharded = "FSDP2, " if factory.sharded else ""
        raise RefusedError(
            f"{factory.name} needs whole matrices, and DeepSpeed ZeRO-{stage} gives an optimizer flat pieces. Use "
            f"DDP, {sharded}ZeRO stage 0, or an optimizer that takes each weight by itself (nadamw, adamw_torch)."
        )
    if not getattr(trainer, "is_fsdp_enabled", False) or factory.elementwise:
        return
    if not factory.sharded:
        raise RefusedError(
            f"{factory.name} needs whole matrices, and FSDP shards them. Use DDP, or another optimizer."
        )
    if getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise RefusedError(
            f"{factory.name} needs matrices, and version 1 of FSDP makes one flat tensor of several. Set "
            "fsdp_config={'version': 2}, or use DDP."
        )
