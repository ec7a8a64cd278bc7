"""torch's hooks that compress the gradients of DDP, for a Trainer, which has no argument for them."""

from __future__ import annotations

from typing import Any, Literal, get_args

from accelerate.utils.dataclasses import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel

from ..callbacks._engines import sharding_engine
from ..errors import RefusedError
from ..functional.options import refuse_idle

Compression = Literal["fp16", "bf16", "powersgd"]
_TYPES = {
    "fp16": DDPCommunicationHookType.FP16,
    "bf16": DDPCommunicationHookType.BF16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}


def register_gradient_compression(
    target: Any, kind: Compression, *, rank: int = 1, start_steps: int = 1000, min_rate: float = 2.0
) -> None:
    """
    Let DDP send compressed gradients: half of the bytes, or factors of low rank.

    The hooks are torch's own (`torch.distributed.algorithms.ddp_comm_hooks`). Of a Trainer this sets the `comm_hook`
    of accelerate's `DistributedDataParallelKwargs`, which the Trainer makes itself and offers no argument for;
    accelerate registers it when `train()` wraps the model. Call it between the two.

    Args:
        target (`Trainer` or `DistributedDataParallel`): Whose gradients.
        kind (`str`): `"fp16"` and `"bf16"` round to 16 bits for the way; a gradient above 65504 is infinite in fp16,
            and torch has bf16 for GPUs only.
            `"powersgd"` sends two factors of rank `rank` for each matrix, and adds what was lost to the next gradient.
        rank (`int`, *optional*, defaults to 1): Of PowerSGD, at least 1.
        start_steps (`int`, *optional*, defaults to 1000): Updates of PowerSGD that send whole gradients first, at
            least 2.
        min_rate (`float`, *optional*, defaults to 2.0): A matrix is factored where that makes it at least this many
            times smaller, at least 1.

    Raises:
        ValueError: an argument out of range, or one of PowerSGD with another kind.
        TypeError: another kind of target.
        RefusedError: `"bf16"` on CPUs, one process, FSDP, DeepSpeed or tensor parallelism, local updates, or a Trainer
            whose model DDP has wrapped already.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows)
    register_gradient_compression(trainer, "powersgd", rank=4, start_steps=100)
    trainer.train()
    ```
    """
    if kind not in get_args(Compression):
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, get_args(Compression)))}.")
    low_rank = kind == "powersgd"
    for name, value, default in (("rank", rank, 1), ("start_steps", start_steps, 1000), ("min_rate", min_rate, 2.0)):
        refuse_idle(name, value, default, low_rank, "with kind='powersgd'")
    for name, value, least in (("rank", rank, 1), ("start_steps", start_steps, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number, at least {least}.")
    if not 1 <= min_rate < float("inf"):
        raise ValueError(f"min_rate={min_rate!r} must be at least 1 and finite.")
    options = {
        "matrix_approximation_rank": rank,
        "start_powerSGD_iter": start_steps,
        "min_compression_rate": min_rate,
    }
    if isinstance(target, DistributedDataParallel):
        _check_device(kind, target.device_type)
        handler = DistributedDataParallelKwargs()
        handler.comm_hook, handler.comm_state_option = _TYPES[kind], options if low_rank else {}
        handler.register_comm_hook(target)
        return
    if not hasattr(target, "accelerator") or not hasattr(target, "model_wrapped"):
        raise TypeError(
            f"{type(target).__name__} is neither a Trainer nor a model in DistributedDataParallel. Pass one of them."
        )
    _check_trainer(target)
    _check_device(kind, target.args.device.type)
    handler = target.accelerator.ddp_handler
    handler.comm_hook, handler.comm_state_option = _TYPES[kind], options if low_rank else {}


def _check_device(kind: str, device: str) -> None:
    if kind == "bf16" and device == "cpu":
        raise RefusedError("torch's bf16 hook needs NCCL, or XCCL, and this model is on the CPU. Use kind='fp16'.")


def _check_trainer(trainer: Any) -> None:
    """Refuse a Trainer in which the hook would never act."""
    if engine := sharding_engine(trainer.args):
        raise RefusedError(
            f"{engine} sends its gradients itself, and no hook of DDP sees them. Train with DDP, or use what {engine} "
            "has: ZeRO++ of DeepSpeed quantises with zero_quantized_gradients in its config."
        )
    if trainer.args.world_size == 1:
        raise RefusedError("With one process no gradient is sent. Compress with two or more.")
    if getattr(trainer, "local_updates", None) is not None:
        raise RefusedError("With local_updates no gradient is sent, so a hook never acts. Keep one of the two.")
    if trainer.model_wrapped is not trainer.model:
        raise RefusedError("The model is in DDP already, which takes a hook once. Call this before train().")
