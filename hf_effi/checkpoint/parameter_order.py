"""
Which parameter each number in the state of an optimizer stands for.

PyTorch stores the state of an optimizer by number: the place of a parameter in the groups that the optimizer was made
with. Sharded states have names. [`names_of_optimizer`] is stored by safe checkpoints; for others the order is found
again from the model and shown to fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import RefusedError

#: key of a manifest: the names of the parameters of each group of the optimizer
OPTIMIZER_NAMES = "optimizer_parameters"
#: what a Trainer takes for names without weight decay, beside those of `torch.nn.LayerNorm`
_NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def names_of_optimizer(model: torch.nn.Module, optimizer: Any) -> list[list[str]] | None:
    """
    Return the names of the parameters of each group of an optimizer; `None` where one is no parameter of the model.

    Args:
        model (`torch.nn.Module`): That the optimizer trains.
        optimizer (`torch.optim.Optimizer`): Or one that wraps it.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    return groups if all(name is not None for group in groups for name in group) else None  # type: ignore[return-value]


def groups_of_a_trainer(model: torch.nn.Module) -> list[list[str]]:
    """
    Return the names of the parameters of each group as `Trainer.create_optimizer` makes them: with weight decay and
    without.

    Args:
        model (`torch.nn.Module`): All of whose parameters are trained.
    """
    names = [name for name, _ in model.named_parameters()]
    layer_norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    plain = {name for name in names if name in layer_norms or any(re.search(part, name.lower()) for part in _NO_DECAY)}
    return [[name for name in names if name not in plain], [name for name in names if name in plain]]


def find_names(
    state: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    stored: Any,
    model: torch.nn.Module | None,
    why_no_model: str,
) -> list[list[str]]:
    """
    Return the names of the parameters of each group of a stored optimizer.

    In this order: names that a safe checkpoint has stored; names that the optimizer itself has; the groups that a
    Trainer makes for the model, or, where there is one group, the parameters in the order of the model. The last two
    are shown to fit: the number of parameters in each group, and of each parameter a state of its shape.

    Args:
        state (`dict`): `state_dict()` of the optimizer.
        shapes (`dict`): Of the tensors of the model, by name.
        stored: Of the manifest.
        model (`torch.nn.Module`, *optional*): The model without its weights.
        why_no_model (`str`): Where there is none.

    Raises:
        RefusedError: they cannot be found, or do not fit.
    """
    groups = state["param_groups"]
    counts = [len(group["params"]) for group in groups]
    own = [group.get("param_names") for group in groups]
    if stored is not None:
        found, source = stored, "the names in its manifest"
    elif all(isinstance(names, list) for names in own):
        found, source = own, "the names that its optimizer stores"
    elif model is None:
        raise RefusedError(
            f"Which parameter each state of the optimizer belongs to is not stored, and {why_no_model}. Resume once "
            "with a SafeCheckpointer, which stores the names, save, and convert that checkpoint."
        )
    else:
        found, source = groups_of_a_trainer(model), "the groups that Trainer.create_optimizer makes for this model"
        if len(groups) == 1:
            found, source = [[name for name, _ in model.named_parameters()]], "the parameters of this model in order"
    wrong = _misfit(found, counts, shapes)
    if wrong is None and stored is None:
        wrong = next(_without_state_of_its_shape(found, state, shapes), None)
    if wrong is not None:
        raise RefusedError(
            f"The state of the optimizer does not fit {source}: {wrong}. Frozen parameters, an optimizer with groups "
            "of its own or a changed model do that. Resume once with a SafeCheckpointer, which stores the names, "
            "save, and convert that checkpoint."
        )
    return found


def _misfit(found: Any, counts: list[int], shapes: Mapping[str, Sequence[int]]) -> str | None:
    good = isinstance(found, list) and all(isinstance(group, list) for group in found)
    if not good or not all(isinstance(name, str) for group in found for name in group):
        return "they are no lists of names"
    if [len(group) for group in found] != counts:
        return f"its groups have {counts} parameters where those have {[len(group) for group in found]}"
    names = [name for group in found for name in group]
    if len(set(names)) != len(names):
        return "a name stands there twice"
    missing = next((name for name in names if name not in shapes), None)
    return None if missing is None else f"the weights have no {missing}"


def _without_state_of_its_shape(
    found: list[list[str]], state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, name in zip(numbers, (name for group in found for name in group), strict=True):
        values = state["state"].get(number, {}).values()
        there = [list(value.shape) for value in values if isinstance(value, torch.Tensor)]
        if list(shapes[name]) not in there:
            yield f"{name} has the shape {list(shapes[name])}, and the state in its place {there}"
