"""Which engine shards the model of a run, if any, and which processes share their data."""

from __future__ import annotations

from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState, is_initialized

_SHARDING = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.FSDP: "FSDP"}


def sharding_engine(args: Any) -> str | None:
    """
    Return `"DeepSpeed"`, `"FSDP"`, `"tensor parallelism"`, or `None` where each process has the whole model and its
    optimizer.

    The training arguments alone do not tell: under `accelerate launch` the launch file chooses the engine, and
    `args.deepspeed` and `args.fsdp` stay empty. What counts is the accelerator of the Trainer, which exists from
    `on_init_end` on.

    Args:
        args (`TrainingArguments`): Of the run.
    """
    if is_initialized():
        state = AcceleratorState()
        if engine := _SHARDING.get(state.distributed_type):
            return engine
        if state.parallelism_config is not None and state.parallelism_config.tp_enabled:
            return "tensor parallelism"
    if getattr(args, "deepspeed", None):
        return "DeepSpeed"
    return "FSDP" if getattr(args, "fsdp", None) else None


def data_rank(args: Any) -> int:
    """
    Return which part of the data this process works on: ranks that compute one forward together have the same.

    What is drawn for the rows of a batch is drawn by this number, and not by the process's own.

    Args:
        args (`TrainingArguments`): Of the run.
    """
    parallelism = AcceleratorState().parallelism_config if is_initialized() else None
    return args.process_index // (1 if parallelism is None else parallelism.non_data_parallel_size)


def is_fsdp2() -> bool:
    """Return whether FSDP2 shards the model of this run: its parameters are then tensors with local shards."""
    if not is_initialized():
        return False
    state = AcceleratorState()
    plugin = getattr(state, "fsdp_plugin", None)
    return state.distributed_type == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 2
