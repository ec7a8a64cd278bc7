"""APOLLO and APOLLO-Mini: step sizes from the moments of a randomly projected gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..errors import RefusedError
from ..functional.low_rank import (
    draw_seed,
    growth_factor,
    is_tall,
    norm_over,
    project,
    random_projection,
    step_scale,
)
from ._common import adamw_, check_count, check_same_options, names_of, precise
from .base import EffiOptimizer, check_betas, check_not_negative, check_positive, gradient_of
from .factory import optimizer_factory, parameter_groups, with_report
from .roles import GroupRules, ParameterRole, parameter_roles

#: what a gradient is scaled by: one number per channel of the longer side, or one per matrix
SCALINGS = ("channel", "tensor")
#: an option that a state was made with -> the run would be another one
_FIXED = ("rank", "update_gap", "scale", "scaling", "gamma", "seed", "rule")


class APOLLO(EffiOptimizer):
    """
    Adam's moments of a gradient that is projected to `rank` dimensions say how long the step is; the raw gradient, of
    full rank, says where it goes.

    Formula, for a weight of shape (m, n) with m >= n (else transposed), t from 1:
    `R = G P^T` with P of shape (rank, n) from N(0, 1 / rank), drawn anew every `update_gap` updates;
    `M <- b1 M + (1 - b1) R`, `V <- b2 V + (1 - b2) R^2`, `N = M / (sqrt(V) + eps)`;
    per channel `s_j = |N_j| / (|R_j| + 1e-8)`, or per tensor `s = |N| / (|R| + 1e-8)`; `u = s G`, held to
    `|u_t| <= gamma |u_(t-1)|`; `W <- W (1 - lr decay) - lr sqrt(1 - b2^t) / (1 - b1^t) sqrt(scale) u`.
    Source: APOLLO: SGD-like Memory, AdamW-level Performance (Zhu et al., 2412.05270).

    Parameters of groups with `rule="adamw"`, vectors, and matrices whose shorter side is at most `rank` follow AdamW.
    A tensor of three dimensions is one matrix for each expert; they share a projection.

    Args:
        params (iterable): Parameters or groups, as for torch's optimizers; named ones draw their
            projections by name, others by place.
        lr (`float`): For pre-training 0.01, with 10 % warm-up; for fine-tuning 1e-5.
        rank (`int`, *optional*, defaults to 256): At least 1.
        update_gap (`int`, *optional*, defaults to 200): Updates with one projection. At least 1.
        scale (`float`, *optional*, defaults to 1.0): Above 0. It makes up for the smaller norm in the subspace, about
            the shorter side over the rank: 1 for a quarter of it, 32 for rank 128 of 4096, 128 for Mini.
        scaling (`str`, *optional*, defaults to `"channel"`): `"channel"` or `"tensor"`.
        gamma (`float`, *optional*, defaults to 1.01): Above 1; `None` limits nothing.
        betas (`tuple[float, float]`, *optional*, defaults to (0.9, 0.999)): In [0, 1).
        eps (`float`, *optional*, defaults to 1e-6): Above 0.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled.
        seed (`int`, *optional*, defaults to 0): Of the projections. At least 0.
        keep_projection (`bool`, *optional*, defaults to `True`): Keep each projection until the next one, `4 rank
            min(m, n)` bytes beside the state. `False` draws it on the CPU at every update.

    Raises:
        ValueError: a value out of range.
        MismatchError: by `load_state_dict`, for a state that other options made.

    Example:
    ```python
    >>> w = nn.Parameter(torch.ones(8, 4))
    >>> optimizer = APOLLO([w], lr=0.01, rank=1)
    >>> w.grad = torch.full((8, 4), 0.5)
    >>> optimizer.step(); tuple(optimizer.state[w]["exp_avg"].shape)
    (8, 1)

    ```
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        rank: int = 256,
        update_gap: int = 200,
        scale: float = 1.0,
        scaling: str = "channel",
        gamma: float | None = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        seed: int = 0,
        keep_projection: bool = True,
    ) -> None:
        if scaling not in SCALINGS:
            raise ValueError(f"scaling={scaling!r} must be one of {', '.join(SCALINGS)}.")
        if gamma is not None and check_positive("gamma", gamma) <= 1:
            raise ValueError(f"gamma={gamma!r} must be above 1, e.g. 1.01, or None to limit nothing.")
        if not isinstance(keep_projection, bool):
            raise ValueError(f"keep_projection={keep_projection!r} must be True or False.")
        defaults = {
            "lr": check_not_negative("lr", lr),
            "rank": check_count("rank", rank),
            "update_gap": check_count("update_gap", update_gap),
            "scale": check_positive("scale", scale),
            "scaling": scaling,
            "gamma": gamma,
            "betas": check_betas(betas),
            "eps": check_positive("eps", eps),
            "weight_decay": check_not_negative("weight_decay", weight_decay),
            "seed": check_count("seed", seed, least=0),
            "rule": "apollo",
            "keep_projection": keep_projection,
        }
        super().__init__(params, defaults)
        self._kept: dict[Tensor, tuple[int, Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state without the projections: they are drawn again."""
        super().__setstate__(state)
        self._kept = {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state that the same options made."""
        check_same_options(self, state_dict, _FIXED)
        kept = [group["keep_projection"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, keep in zip(self.param_groups, kept, strict=True):
            group["keep_projection"] = keep  # of this machine and not of the run

    def update_group(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Update the parameters of one group."""
        names = names_of([group]) if "param_names" in group else names_of(self.param_groups)
        for parameter in parameters:
            weight = parameter.to(precise(parameter.dtype))
            gradient = gradient_of(parameter, weight.dtype)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            if group["rule"] != "adamw" and is_projected(parameter.shape, group["rank"]):
                _check_layout(gradient, names[parameter])
                self._update_matrix(group, parameter, weight, gradient, names[parameter])
            else:
                adamw_(weight, gradient, self.state[parameter], group)
            if weight is not parameter:
                parameter.copy_(weight)

    def _update_matrix(
        self, group: dict[str, Any], parameter: nn.Parameter, weight: Tensor, gradient: Tensor, name: str
    ) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        step = state.get("step", 0) + 1
        projection = self._projection(group, parameter, gradient, name, (step - 1) // group["update_gap"])
        projected = _projected(gradient, projection)
        if not state:
            state.update(exp_avg=torch.zeros_like(projected), exp_avg_sq=torch.zeros_like(projected))
            if group["gamma"] is not None:
                state["last_norm"] = torch.zeros_like(_norm(gradient, (-2, -1)))
        state["step"] = step
        state["exp_avg"].lerp_(projected, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        direction = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        rank_axis = -1 if is_tall(gradient.shape) else -2
        axes = (rank_axis,) if group["scaling"] == "channel" else (-2, -1)
        update = gradient * _beside(step_scale(direction, projected, axes, norm=_norm), gradient)
        if group["gamma"] is not None:
            factor, state["last_norm"] = growth_factor(_norm(update, (-2, -1)), state["last_norm"], group["gamma"])
            update = update * factor
        rate = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        weight.sub_(update, alpha=rate * group["scale"] ** 0.5)

    def _projection(
        self, group: dict[str, Any], parameter: nn.Parameter, gradient: Tensor, name: str, index: int
    ) -> Tensor:
        seed = draw_seed(group["seed"], name, index)
        kept = self._kept.get(parameter)
        if kept is not None and kept[0] == seed:
            return kept[1]
        projection = random_projection(group["rank"], min(gradient.shape[-2:]), seed, gradient.dtype)
        projection = projection.to(gradient.device)
        if group["keep_projection"]:
            self._kept[parameter] = seed, projection
        return projection


def is_projected(shape: torch.Size | tuple[int, ...], rank: int) -> bool:
    """Return whether a tensor of this shape is one or several matrices that a projection to `rank` makes smaller."""
    return len(shape) in (2, 3) and min(shape[-2:]) > rank


# On the shards of FSDP2 (rows of a matrix, experts of a stack) every value below is the whole tensor's.


def _check_layout(tensor: Tensor, name: str) -> None:
    if isinstance(tensor, DTensor) and any(
        not isinstance(place, Replicate) and place != Shard(0) for place in tensor.placements
    ):
        raise RefusedError(
            f"APOLLO takes whole tensors and the shards of FSDP2; {name} is laid out as {tensor.placements} "
            "(tensor parallel). Use DDP, FSDP2, or an optimizer that takes each weight by itself (nadamw)."
        )


def _projected(gradient: Tensor, projection: Tensor) -> Tensor:
    """Project each rank's own rows or experts; where the rows are summed over, each rank keeps some of the columns."""
    if not isinstance(gradient, DTensor):
        return project(gradient, projection)
    mesh, tall = gradient.device_mesh, is_tall(gradient.shape)
    if gradient.ndim == 2 and not tall:
        everywhere = DTensor.from_local(projection, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return _settled(everywhere @ gradient, Shard(1))
    local = gradient.to_local()
    local = local @ projection.mT if tall else projection @ local
    whole = torch.empty(
        (*gradient.shape[:-1], len(projection)) if tall else (len(gradient), len(projection), gradient.shape[-1]),
        device="meta",
    )
    return DTensor.from_local(
        local, mesh, gradient.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _settled(tensor: Tensor, place: Placement) -> Tensor:
    """Add up what the ranks have parts of."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[place if old.is_partial() else old for old in tensor.placements])


def _norm(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    return _settled(norm_over(tensor, axes), Replicate())


def _beside(scale: Tensor, gradient: Tensor) -> Tensor:
    """Give each rank the scales of its own rows: all of them where the ranks have pieces along the other side."""
    if isinstance(scale, DTensor) and isinstance(gradient, DTensor):
        wanted = [
            own if own == other else Replicate()
            for own, other in zip(scale.placements, gradient.placements, strict=True)
        ]
        scale = scale.redistribute(placements=wanted)
    return scale


def _groups(
    model: nn.Module,
    label: str,
    rank: int,
    lr: float,
    weight_decay: float,
    rules: GroupRules | None,
) -> tuple[list[dict[str, Any]], list[ParameterRole]]:
    roles = parameter_roles(model, rules)
    check_count("rank", rank)

    def assign(role: ParameterRole) -> str:
        # A factor of LoRA is small already; one that is not more than 4 ranks wide gains nothing.
        least = 4 * rank if role.role == "adapter" else rank
        matrix = role.role in ("hidden", "experts", "adapter") and is_projected(role.parameter.shape, least)
        return label if matrix else "adamw"

    if not any(assign(role) == label for role in roles):
        _refuse(label, rank, roles)
    return parameter_groups(model, assign, lr=lr, weight_decay=weight_decay, rules=rules), roles


def _refuse(label: str, rank: int, roles: list[ParameterRole]) -> None:
    sides = {
        kind: [min(r.parameter.shape[-2:]) for r in roles if r.role in kinds and r.parameter.ndim in (2, 3)]
        for kind, kinds in (("adapter", ("adapter",)), ("matrix", ("hidden", "experts")))
    }
    if sides["adapter"] and not sides["matrix"]:
        raise RefusedError(
            f"{label} has nothing to save here: only factors of LoRA train, their shorter sides are "
            f"{min(sides['adapter'])} to {max(sides['adapter'])}, and rank={rank} would need more than {4 * rank}. "
            "Use optim='adamw_torch', or train whole matrices."
        )
    if not sides["matrix"]:
        raise RefusedError(f"{label} projects matrices inside the layers, and none trains. Use optim='adamw_torch'.")
    raise ValueError(
        f"rank={rank} is not below the shorter side of any matrix inside the layers ({min(sides['matrix'])} to "
        f"{max(sides['matrix'])}). Take a quarter of it, e.g. rank={max(1, max(sides['matrix']) // 4)}."
    )


@optimizer_factory(sharded=True)
def apollo(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    rank: int = 256,
    update_gap: int = 200,
    scale: float = 1.0,
    gamma: float | None = 1.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    seed: int = 0,
    keep_projection: bool = True,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make [`APOLLO`] for a model: the matrices inside the layers are projected, embeddings, head, norms, biases and
    routers follow AdamW with the same LR.

    Args:
        model (`nn.Module`): Its trainable parameters are updated.
        lr, weight_decay, rank, update_gap, scale, gamma, betas, eps, seed, keep_projection: As in [`APOLLO`].
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.

    Raises:
        ValueError: a rank that is not below the shorter side of any matrix.
        RefusedError: nothing but small factors of LoRA trains.
    """
    groups, roles = _groups(model, "apollo", rank, lr, weight_decay, rules)
    optimizer = APOLLO(
        groups,
        lr=lr,
        rank=rank,
        update_gap=update_gap,
        scale=scale,
        gamma=gamma,
        betas=betas,
        eps=eps,
        seed=seed,
        keep_projection=keep_projection,
    )
    return with_report(optimizer, roles)


@optimizer_factory(sharded=True)
def apollo_mini(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    rank: int = 1,
    update_gap: int = 200,
    scale: float = 128.0,
    gamma: float | None = 1.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    seed: int = 0,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make APOLLO-Mini for a model: [`apollo`] at rank 1 with one scale per matrix, whose state is about that of SGD.

    Args:
        model (`nn.Module`): Its trainable parameters are updated.
        lr, weight_decay, rank, update_gap, scale, gamma, betas, eps, seed: As in [`APOLLO`].
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.

    Raises:
        ValueError: a rank that is not below the shorter side of any matrix.
        RefusedError: nothing but small factors of LoRA trains.
    """
    groups, roles = _groups(model, "apollo_mini", rank, lr, weight_decay, rules)
    optimizer = APOLLO(
        groups,
        lr=lr,
        rank=rank,
        update_gap=update_gap,
        scale=scale,
        scaling="tensor",
        gamma=gamma,
        betas=betas,
        eps=eps,
        seed=seed,
    )
    return with_report(optimizer, roles)
