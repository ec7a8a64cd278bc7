"""Whether a model can be run here and now, and in which dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

#: what FSDP1 marks the parameters with that it has made a part of a flat one
_FLATTENED = "_fsdp_flattened"


def out_of_reach(model: nn.Module) -> str | None:
    """
    Say why a model cannot be run here and now, or return `None`: sharded weights are whole only in a training step.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return (
            "the weights are sharded by FullyShardedDataParallel (FSDP1), which has them whole in a training step only"
        )
    hooked = _loaded_by_hooks(model)
    for name, parameter in model.named_parameters():
        if sharded_by_zero3([parameter]):
            return f"the weights are sharded by DeepSpeed ZeRO-3 ({name})"
        if hasattr(parameter, _FLATTENED) or isinstance(parameter, FlatParameter):
            return f"the weights are sharded by FullyShardedDataParallel, FSDP1 ({name})"
        if not parameter.numel():
            return f"the weights are not here: {name} is empty, as in a shard of FSDP"
        if parameter.device.type == "meta" and id(parameter) not in hooked:
            return f"the weights are on the meta device ({name})"
    return None


def _loaded_by_hooks(model: nn.Module) -> set[int]:
    """
    Return the parameters that accelerate keeps elsewhere and brings in when their module, or one around it, is called.
    """
    hooked = (module for module in model.modules() if hasattr(module, "_hf_hook"))
    return {id(parameter) for module in hooked for parameter in module.parameters()}


def dtypes_to_try(model: nn.Module) -> list[torch.dtype | None]:
    """
    Return the dtypes to try: double precision where the device has it, then single precision, then as it is.

    Packed weights begin at single precision: bitsandbytes' kernels for a CPU return memory that nobody has written to
    when they are asked for double. Sharded ones are brought together in dtypes of their own.
    """
    if is_sharded(model):
        return [None]
    if any(map(is_packed, model.parameters())) or any(p.device.type == "mps" for p in model.parameters()):
        return [torch.float32, None]
    return [torch.float64, torch.float32, None]


def is_sharded(model: nn.Module) -> bool:
    """
    Whether FSDP2 or tensor parallelism has the weights in parts; after a forward FSDP2 may show them whole for a
    while.
    """
    parts = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return parts or any(isinstance(module, FSDPModule) for module in model.modules())


def sharded_by_zero3(parameters: Iterable[nn.Parameter]) -> bool:
    """
    Whether DeepSpeed ZeRO-3 has a part of one of these; a rank sees them whole only while their own module is called.

    FSDP2 gathers whole blocks: inside of a layer, whoever reads the weights of its modules finds them there.
    """
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds codes in place of numbers, as 4-bit and 8-bit weights do."""
    return not (parameter.is_floating_point() or parameter.is_complex()) or hasattr(parameter, "quant_state")


def precision_of(dtype: torch.dtype | None, results: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that results were really computed in."""
    found = {t.dtype for t in results.values()}
    narrow = found & {torch.float16, torch.bfloat16}
    return narrow.pop() if narrow else torch.float64 if dtype == torch.float64 else torch.float32
