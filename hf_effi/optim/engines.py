"""Which engines an optimizer is right under."""

from __future__ import annotations

from typing import Any

from ..errors import RefusedError
from .factory import OptimizerFactory


def refuse_second_optimizer(args: Any, name: str) -> None:
    """
    Refuse a DeepSpeed config that brings an optimizer: DeepSpeed would make that one, and ours would never step.

    Args:
        args (`TrainingArguments`): Of the run.
        name (`str`): Of our optimizer.

    Raises:
        RefusedError: it has a section `optimizer`.
    """
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    if section := deepspeed.get("optimizer"):
        raise RefusedError(
            f"DeepSpeed owns the optimizer ({section.get('type')}). Remove the 'optimizer' section from the DeepSpeed "
            f"config to use {name}."
        )


def check_engine(trainer: Any, factory: OptimizerFactory) -> None:
    """
    Refuse an engine under which an optimizer would not see what it needs.

    DeepSpeed ZeRO gives an optimizer flat pieces of all weights in place of tensors, FSDP its shards: a rule that
    takes each weight by itself is right on both, one of matrices or norms is not right on the first, and on the second
    where it says so.

    Raises:
        RefusedError: the trainer runs under such an engine.
    """
    refuse_second_optimizer(trainer.args, factory.name)
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
