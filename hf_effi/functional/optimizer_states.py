"""Bytes that each optimizer keeps for its parameters, by arithmetic: torch's, transformers' and bitsandbytes'."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

#: bytes a block of 64 weights of bitsandbytes' 4-bit types takes: 32 of weights and one fp32 scale
_FOUR_BIT_BYTES = (32 + 4) / 64
#: bitsandbytes' 8-bit optimizers: one fp32 scale for a block; tensors below 4096 values stay in fp32
_EIGHT_BIT_BLOCK, _EIGHT_BIT_MIN = 256, 4096


@dataclass(frozen=True)
class Parameter:
    """
    One parameter tensor.

    Args:
        shape (`tuple[int, ...]`): Its shape.
        itemsize (`int`): Bytes of a value.
        trainable (`bool`): Whether it gets a gradient.
        four_bit (`bool`, *optional*, defaults to `False`): Whether it is stored in a 4-bit type of bitsandbytes.
        embedding (`bool`, *optional*, defaults to `False`): Whether it is the weight of a `torch.nn.Embedding`, also
            where the LM head is tied to it.
    """

    shape: tuple[int, ...]
    itemsize: int
    trainable: bool
    four_bit: bool = False
    embedding: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights."""
        return math.ceil(self.size * _FOUR_BIT_BYTES) if self.four_bit else self.size * self.itemsize


@dataclass(frozen=True)
class _States:
    """
    `values` numbers for each of a parameter: in its own dtype (`own`), in fp32 or in 8 bits; a step in a tensor or
    not.
    """

    values: int
    kind: str
    step_bytes: int = 0


_OWN, _FP32, _8BIT, _FACTORED = "own", "fp32", "8bit", "factored"
#: name in `TrainingArguments.optim` -> what it keeps
_KNOWN: dict[str, _States] = {
    "adamw_torch": _States(2, _OWN, 4),
    "adamw_8bit": _States(2, _8BIT),
    "adafactor": _States(0, _FACTORED),
    "sgd": _States(0, _OWN),
    "adamw_torch_fused": _States(2, _OWN, 4),
    "adagrad": _States(1, _OWN, 4),
    "rmsprop": _States(1, _OWN, 4),
    "adamw_bnb_8bit": _States(2, _8BIT),
    "paged_adamw_8bit": _States(2, _8BIT),
    "paged_adamw_32bit": _States(2, _FP32),
    "ademamix": _States(3, _FP32),
    "ademamix_8bit": _States(3, _8BIT),
    "paged_ademamix_32bit": _States(3, _FP32),
    "paged_ademamix_8bit": _States(3, _8BIT),
    "lion_32bit": _States(1, _FP32),
    "lion_8bit": _States(1, _8BIT),
    "paged_lion_32bit": _States(1, _FP32),
    "paged_lion_8bit": _States(1, _8BIT),
    "rmsprop_bnb": _States(1, _FP32),
    "rmsprop_bnb_32bit": _States(1, _FP32),
    "rmsprop_bnb_8bit": _States(1, _8BIT),
}
OPTIMIZERS = tuple(_KNOWN)


def optimizer_bytes(parameters: Iterable[Parameter], optimizer: str) -> int:
    """
    Return the bytes of the optimizer's state after its first step.

    Torch's optimizers keep values of the parameter's dtype (two for AdamW, one for Adagrad and RMSprop, none for SGD
    without momentum) and a step of 4 bytes a tensor. Those of bitsandbytes keep fp32 values whatever the parameter's
    dtype, or 8-bit values with an fp32 scale for 256 of them; the Trainer keeps the states of embeddings in 32 bits
    under the 8-bit ones, and bitsandbytes those of tensors below 4096 values. `adafactor` (transformers) keeps a row
    and a column of a matrix and one number in fp32. The two tables that all 8-bit tensors share (1 KiB each) are left
    out.

    Args:
        parameters (`Iterable[Parameter]`): All parameters; those without a gradient have no state.
        optimizer (`str`): One of `OPTIMIZERS`, names of `TrainingArguments.optim`.

    Raises:
        ValueError: unknown optimizer.

    Example:
    ```python
    >>> weights = [Parameter((64, 100), itemsize=4, trainable=True)]
    >>> [optimizer_bytes(weights, name) for name in ("adamw_torch", "adamw_8bit", "adafactor", "sgd", "lion_8bit")]
    [51204, 13000, 660, 0, 6500]
    >>> optimizer_bytes([Parameter((64, 100), itemsize=2, trainable=True, embedding=True)], "adamw_8bit")
    51200

    ```
    """
    if optimizer not in _KNOWN:
        raise ValueError(f"optimizer={optimizer!r} is not known. Known: {', '.join(OPTIMIZERS)}.")
    return sum(_state_bytes(parameter, _KNOWN[optimizer]) for parameter in parameters if parameter.trainable)


def _state_bytes(parameter: Parameter, states: _States) -> int:
    size = parameter.size
    if states.kind == _OWN:
        return (states.values * size * parameter.itemsize + states.step_bytes) if states.values else 0
    if states.kind == _FACTORED:
        *outer, last = parameter.shape or (1,)
        return 4 + 4 * (size if not outer else math.prod(outer) + math.prod(outer[:-1]) * last)
    if states.kind == _FP32 or parameter.embedding or size < _EIGHT_BIT_MIN:
        return states.values * size * 4
    return states.values * (size + 4 * math.ceil(size / _EIGHT_BIT_BLOCK))
