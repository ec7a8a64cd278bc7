"""Which rows of which weights belong to each attention head of a model, and how QK-Clip scales them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ..attention.projections import AttentionProjections, MeasuredProjections
from ..errors import RefusedError
from ..functional.qk_clip import projection_factors

_NEAR = 0.02
Heads = tuple[dict[str, Tensor], ...]


@dataclasses.dataclass(frozen=True)
class ClippedAttention:
    """
    One attention whose heads can be clipped.

    Args:
        name (`str`): Name of its module.
        scaling (`float`): Of its logits.
        query, key (`tuple[dict[str, Tensor], ...]`): For each head, projection -> its rows.
        own_keys (`bool`): Whether each key head has rows of its own, which nothing else reads.
        keeps_length (`bool`): Whether queries and keys are as long as what the projections give, as after a rotation.
    """

    name: str
    scaling: float
    query: Heads
    key: Heads
    own_keys: bool
    keeps_length: bool

    def alpha(self, gqa: str, alpha: float) -> float | None:
        """Return the share of the factor that goes to the query, or `None` where the query takes it all."""
        divided = self.own_keys and (gqa == "min" or len(self.query) == len(self.key))
        return alpha if divided else None

    def factors(self, gamma: Tensor, alpha: float | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Return projection -> (rows, what each is multiplied by)."""
        query, key = projection_factors(gamma, len(self.key), alpha)
        found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for heads, factors in ((self.query, query), (self.key, key) if alpha is not None else ((), ())):
            for feeds, factor in zip(heads, factors, strict=True):
                for name, rows in feeds.items():
                    kept = found.setdefault(name, ([], []))
                    kept[0].append(rows)
                    kept[1].append(factor.expand(len(rows)))
        return {name: (torch.cat(rows), torch.cat(values)) for name, (rows, values) in found.items()}


def clipped_attentions(
    model: nn.Module, found: MeasuredProjections, threshold: float, gqa: str
) -> list[ClippedAttention]:
    """
    Return the attentions of a model that can be clipped.

    Raises:
        RefusedError: nothing was measured, every attention bounds its logits itself, or one cannot be scaled.
    """
    if not found.attentions:
        raise RefusedError(
            "QKClipCallback finds no attention whose queries and keys it can read: "
            + (found.failed or f"{type(model).__name__} does not go through transformers' AttentionInterface.")
        )
    kept, bounded = [], []
    for attention in found.attentions:
        if why := _bound(attention, threshold):
            bounded.append(f"{attention.name}: {why}")
        else:
            kept.append(_checked(model, attention, found, gqa))
    if not kept:
        raise RefusedError(
            f"QKClipCallback has nothing to do: the attentions of {type(model).__name__} bound their logits "
            f"themselves ({bounded[0]}). Leave it out."
        )
    return kept


def _bound(attention: AttentionProjections, threshold: float) -> str:
    """Return why the logits of an attention do not follow its weights; empty where they do."""
    if all(abs(attention.degree[part]) < _NEAR for part in ("query", "key")):
        return "a norm follows the projections of queries and keys"
    if attention.softcap is not None and attention.softcap <= threshold:
        return f"they are capped at {attention.softcap}"
    return ""


def _checked(
    model: nn.Module, attention: AttentionProjections, found: MeasuredProjections, gqa: str
) -> ClippedAttention:
    query, key = attention.channels["query"], attention.channels["key"]
    if len(query) % len(key):
        raise RefusedError(f"{attention.name} has {len(query)} query heads and {len(key)} key heads: no group fits.")
    users: dict[tuple[str, int], set[tuple[str, int]]] = {}
    for part, heads in attention.channels.items():
        for number, feeds in enumerate(heads):
            for name, rows in feeds.items():
                for row in rows.tolist():
                    users.setdefault((name, row), set()).add((part, number))
    own = {
        part: all(
            users[name, row] == {(part, number)}
            for number, feeds in enumerate(attention.channels[part])
            for name, rows in feeds.items()
            for row in rows.tolist()
        )
        for part in ("query", "key")
    }
    if gqa == "min" and not own["key"]:
        raise RefusedError(
            f"gqa='min' scales keys, and the rows of the keys of {attention.name} are read by other heads or by "
            "values too (multi-head latent attention). Use gqa='query'."
        )
    scaled = ("query", "key") if own["key"] and (gqa == "min" or len(query) == len(key)) else ("query",)
    for part in scaled:
        if abs(attention.degree[part] - 1) > _NEAR or not own[part]:
            raise RefusedError(
                f"QKClipCallback cannot scale one head of {attention.name}: what reaches its {part} is not in "
                "proportion to rows of its own. Train without it."
            )
        for feeds in attention.channels[part]:
            for name in feeds:
                _check_projection(model, name, found)
    steady = all(abs(attention.gain[part] - 1) < _NEAR for part in ("query", "key"))
    return ClippedAttention(attention.name, attention.scaling, query, key, own["key"], steady)


def _check_projection(model: nn.Module, name: str, found: MeasuredProjections) -> None:
    module: Any = model.get_submodule(name)
    frozen = [leaf for leaf, p in module.named_parameters(recurse=False) if not p.requires_grad]
    if frozen:
        raise RefusedError(
            f"{name}.{frozen[0]} does not train, and QK-Clip has to scale it with the rest of its head: under LoRA "
            "the base weight is frozen. Train whole weights, or leave the callback out."
        )
    if name not in found.out_dims:
        raise RefusedError(f"It is not known which dimension of {name}.weight is its output. Train without QK-Clip.")


def scale_rows(
    module: Any, out_dim: int, rows: Tensor, factors: Tensor, state: Mapping[Any, Mapping[str, Any]] | None
) -> None:
    """
    Multiply outputs of a projection in place: its weight, its bias, and where a schedule-free optimizer trains them
    their second iterate.
    """
    size = module.weight.shape[out_dim]
    every = torch.ones(size, dtype=torch.float32, device=factors.device)
    every[rows.to(factors.device)] = factors.to(torch.float32)
    for parameter, dim in ((module.weight, out_dim), (getattr(module, "bias", None), 0)):
        if isinstance(parameter, Tensor):
            _multiply(parameter, every, dim)
            iterate = {} if state is None else state.get(parameter, {})
            if isinstance(iterate.get("z"), Tensor):
                _multiply(iterate["z"], every, dim)


@torch.no_grad()
def _multiply(tensor: Tensor, factors: Tensor, dim: int) -> None:
    shaped = factors.to(tensor.device).view([-1 if d == dim else 1 for d in range(tensor.ndim)])
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        shaped = DTensor.from_local(shaped, mesh, [Replicate()] * mesh.ndim, run_check=False)
    tensor.copy_((tensor * shaped).to(tensor.dtype))
