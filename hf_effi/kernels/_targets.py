"""Finds what a key of `patch` means in a model: a kernel's name, a module's name, a glob or a regular expression."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import RefusedError

Key = str | re.Pattern[str]
Kind = Literal["module", "rotary", "loss"]

#: the function that every rotary attention of transformers calls, found in the globals of its module
ROTARY_FUNCTION = "apply_rotary_pos_emb"
ROTARY_NAME = "rotary_pos_emb"
LOSS_NAME = "ForCausalLMLoss"
LORA_NAME = "LoRALinear"
LM_HEAD_NAME = "LMHead"
#: the function that the forward of TRL's `add_fused_lm_head` calls, found in the globals of its module
TRL_HEAD_FUNCTION = "_ChunkedLogProbFunction"
GATED_NAMES = ("SwiGLUMLP", "GeGLUMLP")
_GATED_BY_ACTIVATION = {"silu": "SwiGLUMLP", "swish": "SwiGLUMLP", "gelu_pytorch_tanh": "GeGLUMLP"}


@dataclass(frozen=True, eq=False)
class Target:
    """
    One place that a replacement goes to.

    Args:
        name (`str`): Qualified name of the module.
        module (`nn.Module`): The module; the replacement is written into its `__dict__`.
        attribute (`str`): The entry of `__dict__`. `_old_forward` where an accelerate hook occupies `forward`.
        original (`Callable`): What is called there before the patch.
        kind (`str`): `"module"`: the whole forward. `"rotary"`: the rotary embedding inside an attention's forward.
            `"loss"`: the loss function of a model.
    """

    name: str
    module: nn.Module
    attribute: str
    original: Callable[..., Any]
    kind: Kind


def holds(cell: CellType, value: Any) -> bool:
    """Return whether a cell of a closure holds this very object."""
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


def decorated(function: Any) -> FunctionType | None:
    """
    Return what a decorator wraps, where it holds it in its closure, so that the decorator can be copied around it.
    """
    inner = getattr(function, "__wrapped__", None)
    is_held = any(holds(cell, inner) for cell in getattr(function, "__closure__", None) or ())
    return inner if isinstance(inner, FunctionType) and is_held else None


def calling(function: Any, name: str) -> FunctionType | None:
    """Return `function`, or what its decorators wrap, whichever calls the global `name`; `None` where neither does."""
    while function is not None and name not in getattr(getattr(function, "__code__", None), "co_names", ()):
        function = decorated(function)
    return function


def _has_trl_head(module: nn.Module) -> bool:
    forward = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    return TRL_HEAD_FUNCTION in getattr(getattr(forward, "__code__", None), "co_names", ())


def _gated_mlp_name(module: nn.Module) -> str | None:
    if not all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    config = getattr(module, "config", None)
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return _GATED_BY_ACTIVATION.get(act)


def kernel_name(module: nn.Module) -> str | None:
    """
    Return the kernel name of a module, or `None`.

    Transformers declares few names, and only where the `kernels` package is installed; the others follow from
    structure: a class called `...RMSNorm`, a gated MLP by its activation, an attention that calls
    `apply_rotary_pos_emb`, a causal language model by its loss type, PEFT's linear LoRA layers.
    """
    declared = getattr(type(module), "kernel_layer_name", None)
    if declared is not None:
        return declared
    if type(module).__name__.endswith("RMSNorm"):
        return "RMSNorm"
    if gated := _gated_mlp_name(module):
        return gated
    if calling(type(module).forward, ROTARY_FUNCTION) is not None:
        return ROTARY_NAME
    if getattr(module, "loss_type", None) == "ForCausalLM" and hasattr(type(module), "loss_function"):
        return LOSS_NAME
    if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.Linear):
        return LORA_NAME
    return None


def _matches(key: Key, name: str, module: nn.Module) -> bool:
    if isinstance(key, re.Pattern):
        return key.fullmatch(name) is not None
    if any(sign in key for sign in ".*?["):
        return fnmatch.fnmatchcase(name, key)
    if key == LM_HEAD_NAME:
        return _has_trl_head(module)
    return name == key or kernel_name(module) == key


def _target(key: Key, name: str, module: nn.Module) -> Target:
    if key == LOSS_NAME:
        return Target(name, module, "_loss_function", module.loss_function, "loss")
    if isinstance(module, GradientCheckpointingLayer):
        raise RefusedError(
            f"{key!r} matches {name} ({type(module).__name__}), whose class checkpoints around its own forward: a "
            "forward on the instance would switch checkpointing off. Patch the modules inside it, e.g. '*.mlp'."
        )
    attribute = "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"
    return Target(name, module, attribute, getattr(module, attribute), "rotary" if key == ROTARY_NAME else "module")


def find_targets(model: nn.Module, key: Key) -> list[Target]:
    """
    Return the targets of one key, in the order of `model.named_modules()`.

    Raises:
        ValueError: another kind of key.
        RefusedError: nothing matches, or a match cannot take an instance patch.
    """
    if not isinstance(key, (str, re.Pattern)):
        raise ValueError(f"{key!r} is no key: give a kernel's name, a module's name, a glob or a compiled regex.")
    found = [_target(key, name, module) for name, module in model.named_modules() if _matches(key, name, module)]
    if not found and key == LM_HEAD_NAME:
        raise RefusedError(
            f"{key!r}: {type(model).__name__} has no fused head of TRL that could be replaced. TRL's trainers add it "
            "when they are built and wrap it in train(): patch trainer.model between the two."
        )
    if not found:
        known = sorted({name for module in model.modules() if (name := kernel_name(module))})
        raise RefusedError(
            f"{key!r} matches no module of {type(model).__name__}. Kernel names in it: {', '.join(known) or 'none'}; "
            "or use a pattern on the names of `model.named_modules()`, e.g. '*.mlp'."
        )
    return found
