"""Layer-wise learning rates as parameter groups, which every schedule then multiplies."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..options import refuse_idle
from ._checks import check_number

_NO_DECAY = ("bias", "norm")
_LAYER = re.compile(r"\.(\d+)\.")


def _depth(name: str, layers: int, embeddings: set[str], head: set[str], pattern: re.Pattern) -> int:
    """Distance from the top: 0 for the head, 1 for what is above the layers, then one per layer, `layers+2` below."""
    if name in head:
        return 0
    if match := pattern.search(name):
        return layers - int(match.group(1)) + 1
    return layers + 2 if name in embeddings else 1


def layerwise_param_groups(
    model: torch.nn.Module,
    base_lr: float,
    decay: float = 0.9,
    *,
    head_factor: float = 1.0,
    backbone_factor: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = _NO_DECAY,
    head: Sequence[str] = ("lm_head", "classifier", "score"),
    embeddings: Sequence[str] = ("embed", "wte", "wpe"),
) -> list[dict[str, Any]]:
    """
    Split the trainable parameters into groups whose LR falls with the distance from the top.

    Formula: `lr = base_lr backbone_factor decay^(L - l)` for layer l of L (top layer: L), one power more for the
    embeddings, `base_lr head_factor` for the head. Each trainable parameter is in exactly one group; a tied weight
    goes to the lower of its LRs. Groups are in a fixed order, so a checkpoint fits.
    Papers: Howard and Ruder, ULMFiT (1801.06146): decay 1/2.6; Zhang et al., SLCA (2303.05118): backbone_factor 0.01.

    Args:
        model (`torch.nn.Module`): Its layers are numbered in the parameter names (`layers.3.`).
        base_lr (`float`): LR of the top layer and, times `head_factor`, of the head. Above 0.
        decay (`float`, *optional*, defaults to 0.9): In (0, 1]; 1 for one LR.
        head_factor, backbone_factor (`float`, *optional*, default to 1.0): Above 0.
        weight_decay (`float`, *optional*, defaults to 0.0): For all but the parameters named in `no_decay`.
        no_decay, head, embeddings (`Sequence[str]`): Parts of parameter names, lower case.

    Returns:
        `list[dict]`: Parameter groups for a torch optimizer, with `lr`, `weight_decay` and `name`.

    Raises:
        ValueError: nothing is trainable, or a bad value.

    Example:
    ```python
    >>> model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(3)])
    >>> model = torch.nn.ModuleDict({"layers": model, "head": torch.nn.Linear(2, 2)})
    >>> groups = layerwise_param_groups(model, 1e-3, decay=0.5, head=("head",))
    >>> [(group["name"], group["lr"]) for group in groups][:2]
    [('depth0', 0.001), ('depth1', 0.001)]
    ```
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model={model!r} is not a torch.nn.Module. Pass the model, then the base LR.")
    for name, value in (("base_lr", base_lr), ("head_factor", head_factor), ("backbone_factor", backbone_factor)):
        check_number(name, value, 0.0, math.inf, low_open=True)
    check_number("decay", decay, 0.0, 1.0, low_open=True)
    check_number("weight_decay", weight_decay, 0.0, math.inf)
    named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not named:
        raise ValueError("The model has no trainable parameter. Unfreeze some before building groups.")
    numbers = [int(m.group(1)) for n, _ in named if (m := _LAYER.search(n))]
    layers = max(numbers, default=-1)
    needs = "where weight_decay is above 0"
    refuse_idle("no_decay", tuple(no_decay), _NO_DECAY, weight_decay > 0, needs)
    heads = {n for n, _ in named if any(part in n.lower() for part in head)}
    needs = f"on parameters of the head, and no trainable one has a part of head={tuple(head)} in its name"
    refuse_idle("head_factor", head_factor, 1.0, bool(heads), needs)
    embedded = {n for n, _ in named if any(part in n.lower() for part in embeddings)}
    depth: dict[int, int] = {}
    undecayed: dict[int, bool] = {}
    names: dict[int, str] = {}

    def lr_at(d: int) -> float:
        return base_lr * head_factor if d == 0 else base_lr * backbone_factor * decay ** (d - 1)

    for n, p in named:
        d = _depth(n, layers, embedded, heads, _LAYER)
        if id(p) not in depth or lr_at(d) < lr_at(depth[id(p)]):
            depth[id(p)] = d
        names.setdefault(id(p), n)
        undecayed[id(p)] = undecayed.get(id(p), False) or any(part in n.lower() for part in no_decay)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for p in sorted({id(p): p for _, p in named}.values(), key=lambda p: names[id(p)]):
        key = (depth[id(p)], undecayed[id(p)])
        label = f"depth{key[0]}" + ("_no_decay" if key[1] and weight_decay else "")
        group = groups.setdefault(
            key if weight_decay else (key[0], False),
            {"params": [], "lr": lr_at(key[0]), "weight_decay": 0.0 if key[1] else weight_decay, "name": label},
        )
        group["params"].append(p)
    return [groups[key] for key in sorted(groups)]
