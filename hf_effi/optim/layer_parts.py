"""Which layer of a model each trained weight belongs to, and which part of the layer it is: read from its modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from .roles import parameter_roles

#: roles whose tensors are matrices that multiply hidden states
MATRIX_ROLES = ("hidden", "experts", "adapter")
#: what a weight outside of the layers is called
OUTER = {"embedding": "embedding", "head": "head"}
REST = "rest"


@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """
    One trained weight and its place.

    Args:
        name (`str`): In `named_parameters()`.
        parameter (`nn.Parameter`): Itself.
        role (`str`): See [`~hf_effi.optim.roles.ROLES`].
        layer (`str`): Number of its layer, or what [`layer_modules`] calls it; empty outside of the layers.
        part (`str`): Its module inside of the layer, such as `self_attn.q_proj`; outside of them `embedding`, `head`
            or `rest`.
    """

    name: str
    parameter: nn.Parameter
    role: str
    layer: str
    part: str

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix inside of a layer, or several of them in one tensor."""
        return bool(self.layer) and self.role in MATRIX_ROLES and self.parameter.ndim in (2, 3)


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """
    Return the layers of a model, in order: the members of its outermost `nn.ModuleList`s that all hold matrices.

    They are called by their number; where a model has several lists, as an encoder and a decoder, by their whole name.
    A model without such a list has the members of its outermost `nn.Sequential`s, or no layers.

    Example:
    ```python
    >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "layers": nn.ModuleList([nn.Linear(4, 4) for _ in "ab"])})
    >>> list(layer_modules(model))
    ['0', '1']
    ```
    """
    lists = list(_outermost(model, nn.ModuleList, 1)) or list(_outermost(model, nn.Sequential, 2))
    found = {}
    for name, members in lists:
        for number, layer in members:
            found[number if len(lists) == 1 else f"{name}.{number}".lstrip(".")] = layer
    return found


def _outermost(
    model: nn.Module, kind: type[nn.Module], least: int
) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if not isinstance(module, kind) or module in inside:
            continue
        members = list(module.named_children())
        if len(members) >= least and all(any(p.ndim >= 2 for p in layer.parameters()) for _, layer in members):
            inside.update(module.modules())
            yield name, members


def layer_weights(model: nn.Module) -> list[LayerWeight]:
    """
    Return every trained weight with its layer and part, in the order of `named_parameters()`.

    Raises:
        ValueError: nothing is trainable.

    Example:
    ```python
    >>> from hf_effi.demo import toy
    >>> [(w.layer, w.part) for w in layer_weights(toy().model) if w.is_matrix][:2]
    [('0', 'self_attn.q_proj'), ('0', 'self_attn.k_proj')]

    ```
    """
    places: dict[nn.Parameter, tuple[str, str]] = {}
    for number, layer in layer_modules(model).items():
        for path, module in layer.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                places.setdefault(parameter, (number, path or leaf))
    found = []
    for role in parameter_roles(model):
        label, part = places.get(role.parameter, ("", OUTER.get(role.role, REST)))
        found.append(LayerWeight(role.name, role.parameter, role.role, label, part))
    return found
