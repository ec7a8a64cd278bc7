"""Bytes that each optimizer keeps for its parameters, by arithmetic: ours, torch's, transformers', bitsandbytes'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .split_state import blocks_of_draw

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
        role (`str`, *optional*, defaults to `""`): What it is to an optimizer of this package, one of
            `hf_effi.optim.roles.ROLES`. Those that treat matrices by their role need it.
    """

    shape: tuple[int, ...]
    itemsize: int
    trainable: bool
    four_bit: bool = False
    embedding: bool = False
    role: str = ""

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
#: Defaults of our factories that shape a state.
_RANK = {"apollo": 256, "apollo_mini": 1}
_DENSITY, _SMALLEST_SIDE, _LONGEST_BASIS = 0.25, 8, 10_000
#: Roles of `hf_effi.optim.roles` whose matrices a rule of matrices updates; LAMB leaves the others to AdamW.
_MATRICES, _LAMB_VECTORS = ("hidden", "experts"), ("bias", "norm", "other", "small")


def optimizer_bytes(parameters: Iterable[Parameter], optimizer: str) -> int:
    """
    Return the bytes of the optimizer's state after its first step.

    Torch's optimizers keep values of the parameter's dtype (two for AdamW, one for Adagrad and RMSprop, none for SGD
    without momentum) and a step of 4 bytes a tensor. Those of bitsandbytes keep fp32 values whatever the parameter's
    dtype, or 8-bit values with an fp32 scale for 256 of them; the Trainer keeps the states of embeddings in 32 bits
    under the 8-bit ones, and bitsandbytes those of tensors below 4096 values. `adafactor` (transformers) keeps a row
    and a column of a matrix and one number in fp32. The two tables that all 8-bit tensors share (1 KiB each) are left
    out. Those of this package are counted at the defaults of their factories: Muon one fp32 value for each of a hidden
    matrix, MARS-M the gradient before beside it, APOLLO the moments and the projection of rank 256 (Mini: 1), FRUGAL
    the moments of the blocks of its first draw; the rest of a model follows AdamW in all of them.

    Args:
        parameters (`Iterable[Parameter]`): All parameters; those without a gradient have no state.
        optimizer (`str`): One of `OPTIMIZERS`, names of `optim=`.

    Raises:
        ValueError: unknown optimizer, or parameters without a role for one that needs it.

    Example:
    ```python
    >>> weights = [Parameter((64, 100), itemsize=4, trainable=True)]
    >>> [optimizer_bytes(weights, name) for name in ("adamw_torch", "adamw_8bit", "adafactor", "sgd", "lion_8bit")]
    [51204, 13000, 660, 0, 6500]
    >>> optimizer_bytes([Parameter((64, 100), itemsize=2, trainable=True, embedding=True)], "adamw_8bit")
    51200
    >>> optimizer_bytes([Parameter((64, 100), itemsize=2, trainable=True, role="hidden")], "muon")
    25600

    ```
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not known. Known: {', '.join(OPTIMIZERS)}.")
    trained = [parameter for parameter in parameters if parameter.trainable]
    if optimizer in _KNOWN:
        return sum(_state_bytes(parameter, _KNOWN[optimizer]) for parameter in trained)
    if optimizer in _BY_ROLE and any(not parameter.role for parameter in trained):
        raise ValueError(
            f"optimizer={optimizer!r} treats parameters by their role, and some have none. Give Parameter(role=...), "
            "one of hf_effi.optim.roles.ROLES."
        )
    return _OURS[optimizer](trained)


def _plain(parameter: Parameter, values: int, itemsize: int | None = None) -> int:
    """Return the bytes of some values for each of a parameter: fp32 unless its weights are fp64."""
    return values * parameter.size * (max(4, parameter.itemsize) if itemsize is None else itemsize)


def _torch_adamw(parameter: Parameter) -> int:
    return _state_bytes(parameter, _KNOWN["adamw_torch"])


def _muon(trained: list[Parameter], before: bool = False) -> int:
    def held(parameter: Parameter) -> int:
        shape = parameter.shape
        if parameter.role not in _MATRICES or len(shape) not in (2, 3) or min(shape[-2:]) < _SMALLEST_SIDE:
            return _torch_adamw(parameter)
        return _plain(parameter, 1) + (_plain(parameter, 1, parameter.itemsize) if before else 0)

    return sum(map(held, trained))


def _apollo(trained: list[Parameter], rank: int) -> int:
    def held(parameter: Parameter) -> int:
        shape, least = parameter.shape, 4 * rank if parameter.role == "adapter" else rank
        if parameter.role not in (*_MATRICES, "adapter") or len(shape) not in (2, 3) or min(shape[-2:]) <= least:
            return _plain(parameter, 2)
        matrices = math.prod(shape[:-2])
        moments = 2 * matrices * max(shape[-2:]) * rank
        return max(4, parameter.itemsize) * (moments + matrices + rank * min(shape[-2:]))  # norms, the projection

    return sum(map(held, trained))


def _frugal(trained: list[Parameter]) -> int:
    split = [parameter for parameter in trained if parameter.role in _MATRICES and len(parameter.shape) >= 2]
    drawn = blocks_of_draw([parameter.size for parameter in split], _DENSITY, 0)
    whole = sum(_plain(parameter, 2) for parameter in trained)
    rest = whole - sum(_plain(parameter, 2) for parameter in split)
    return rest + sum(_plain(split[number], 2) for number in drawn)


def _soap(trained: list[Parameter]) -> int:
    def values(parameter: Parameter) -> int:
        sides = parameter.shape if len(parameter.shape) > 1 else ()
        # A statistic and a basis for each side.
        return 2 * parameter.size + sum(2 * side**2 for side in sides if side <= _LONGEST_BASIS)

    return sum(values(parameter) * parameter.itemsize for parameter in trained)


def _lamb(trained: list[Parameter]) -> int:
    def held(parameter: Parameter) -> int:
        if parameter.role in _LAMB_VECTORS:
            return _torch_adamw(parameter)
        return (2 * parameter.size + 3) * parameter.itemsize  # two norms and their ratio

    return sum(map(held, trained))


#: name of `hf_effi.optim` -> bytes of what it keeps for the trained parameters, after the first step
_OURS: dict[str, Callable[[list[Parameter]], int]] = {
    "muon": _muon,
    "mars_m": lambda trained: _muon(trained, before=True),
    "apollo": lambda trained: _apollo(trained, _RANK["apollo"]),
    "apollo_mini": lambda trained: _apollo(trained, _RANK["apollo_mini"]),
    "frugal": _frugal,
    "nadamw": lambda trained: sum(_plain(parameter, 2) for parameter in trained),
    "soap": _soap,
    "prodigy": lambda trained: sum(_plain(parameter, 4, parameter.itemsize) for parameter in trained),
    "lars": lambda trained: sum(_plain(parameter, 1, parameter.itemsize) for parameter in trained),
    "lamb": _lamb,
}
_BY_ROLE = ("muon", "mars_m", "apollo", "apollo_mini", "frugal", "lamb")
OPTIMIZERS = (*_KNOWN, *_OURS)


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
