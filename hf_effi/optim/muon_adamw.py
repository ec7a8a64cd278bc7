"""Muon for the matrices inside of a model, AdamW for the rest, as one optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import RefusedError
from .base import EffiOptimizer, check_betas, check_positive, fp32_like, gradient_of
from .factory import optimizer_factory, parameter_groups, with_report
from .matrix_views import MatrixView, Split, matrix_views
from .roles import GroupRules, ParameterRole, is_matrix, parameter_roles

ADJUST = ("match_rms_adamw", "original")
WHICH = ("hidden", "all_matrices")


class MuonAdamW(EffiOptimizer):
    """
    `torch.optim.Muon` for groups whose `rule` is `"muon"`, `torch.optim.AdamW` for those whose rule is `"adamw"`.

    Both act on the groups of this optimizer, so that a schedule, a Trainer and a checkpoint see one. Formula of a
    matrix `W` with gradient `G`: `M <- mu M + (1 - mu) G`, `U = (1 - mu) G + mu M` (Nesterov) or `M`, then torch's
    Muon on `U`: `O` = its orthogonal factor by Newton-Schulz in bf16, `W <- W (1 - lr decay) - lr kappa O` with
    `kappa = 0.2 sqrt(max(rows, columns))`. Experts and the parts of a fused projection are matrices of their own.
    Momentum is fp32 also for bf16 weights, and is added to their fp32 value before it is rounded.

    Under FSDP2 momentum stays in shards; each update gathers one matrix in bf16, on all ranks alike, and each keeps
    its part of the result.

    Args:
        groups (`list[dict]`): As [`parameter_groups`] makes them, with `rule`.
        views (`Mapping[str, MatrixView]`): Name of a parameter -> how it is read; whole where it is missing.

    Raises:
        ValueError: a group of another rule.
    """

    def __init__(self, groups: list[dict[str, Any]], views: Mapping[str, MatrixView] | None = None) -> None:
        self.views = dict(views or {})
        # Their groups are set in each step; the tensors are only there because torch asks for some.
        self._muon = torch.optim.Muon([torch.zeros(1, 1)], momentum=0.0, nesterov=False)
        self._adamw = torch.optim.AdamW([torch.zeros(1)])
        inner = {"muon": torch.optim.Muon([torch.zeros(1, 1)]).defaults, "adamw": self._adamw.defaults}
        for group in groups:
            if group.get("rule") not in inner:
                raise ValueError(f"A group has rule={group.get('rule')!r}; the rules are 'muon' and 'adamw'.")
        super().__init__([{**inner[group["rule"]], **group} for group in groups], {"lr": 1e-3, "weight_decay": 0.0})

    def update_group(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Update the parameters of one group."""
        if group["rule"] == "adamw":
            self._adamw.param_groups, self._adamw.state = [group], self.state
            self._adamw.step()
            return
        names = group.get("param_names") or [""] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            if parameter.grad is not None:
                update = self.direction(group, self.state[parameter], parameter)
                self._step_matrices(group, parameter, update, self.views.get(name, MatrixView(None)))

    def direction(self, group: dict[str, Any], state: dict[str, Any], parameter: nn.Parameter) -> Tensor:
        """Return what is made orthogonal, in the shape of the parameter; its state moves on."""
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = fp32_like(parameter)
        buffer = state["momentum_buffer"]
        gradient = gradient_of(parameter, buffer.dtype)
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer

    def _step_matrices(self, group: dict[str, Any], parameter: nn.Parameter, update: Tensor, view: MatrixView) -> None:
        weight = parameter.detach()
        if isinstance(weight, DTensor):
            half: Any = update.bfloat16()  # torch's Muon rounds to it first, too
            whole = half.full_tensor().float()
            change = torch.zeros_like(whole)
            self._orthogonal(group, change, whole, view)
            own = distribute_tensor(change, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(own.to(weight.dtype))
        elif weight.dtype in (torch.float32, torch.float64):
            self._orthogonal(group, weight, update, view)
        else:
            wide = weight.float()
            self._orthogonal(group, wide, update, view)
            weight.copy_(wide)

    def _orthogonal(self, group: dict[str, Any], weight: Tensor, update: Tensor, view: MatrixView) -> None:
        """Step torch's Muon on the matrices of one weight, in place; momentum has been seen to."""
        back = []
        matrices = []
        for (matrix, block), (ahead, _) in zip(view.parts(weight), view.parts(update), strict=True):
            matrix.grad = ahead
            matrices.append(matrix)
            if matrix.untyped_storage().data_ptr() != block.untyped_storage().data_ptr():
                back.append((block, matrix))
        self._muon.param_groups = [{**group, "params": matrices, "momentum": 0.0, "nesterov": False}]
        self._muon.step()
        self._muon.state.clear()
        for block, matrix in back:
            block.copy_(matrix.view_as(block))


@dataclasses.dataclass(frozen=True)
class MuonPlan:
    """Groups, views and reasons of a Muon optimizer of a model; what its factories share."""

    groups: list[dict[str, Any]]
    views: dict[str, MatrixView]
    roles: list[ParameterRole]


def plan_muon(
    model: nn.Module,
    own: Mapping[str, Any],
    *,
    lr: float,
    weight_decay: float,
    which: str,
    adjust_lr: str,
    adam_lr_ratio: float | None,
    adam_lr: float | None,
    betas: tuple[float, float],
    eps: float,
    split: Split | None,
    rules: GroupRules | None,
) -> MuonPlan:
    """
    Sort the parameters of a model: matrices to the rule `"muon"` with what `own` says, the rest to `"adamw"`.

    Raises:
        ValueError: a value out of range.
        RefusedError: no parameter is a matrix of a layer, or one whose layout cannot be told.
    """
    if which not in WHICH:
        raise ValueError(f"which={which!r} must be one of {', '.join(map(repr, WHICH))}.")
    if adjust_lr not in ADJUST:
        raise ValueError(f"adjust_lr={adjust_lr!r} must be one of {', '.join(map(repr, ADJUST))}.")
    if adam_lr is not None and adam_lr_ratio is not None:
        raise ValueError(f"adam_lr={adam_lr} and adam_lr_ratio={adam_lr_ratio} both set AdamW's LR. Keep one.")
    for name, value in (("adam_lr", adam_lr), ("adam_lr_ratio", adam_lr_ratio)):
        if value is not None:
            check_positive(name, value)
    if adam_lr is not None and not lr > 0:
        raise ValueError(f"adam_lr={adam_lr} needs lr above 0, of which it is a part of. Got lr={lr!r}.")
    ratio = adam_lr / lr if adam_lr is not None else 1.0 if adam_lr_ratio is None else adam_lr_ratio
    adamw = {"betas": check_betas(betas), "eps": check_positive("eps", eps), "lr_ratio": ratio}
    kinds = ("hidden", "experts") if which == "hidden" else ("hidden", "experts", "embedding", "head")
    roles = parameter_roles(model, rules)
    matrices = {role.name: role for role in roles if role.role in kinds and is_matrix(role.parameter)}
    if not matrices:
        raise RefusedError(
            "No trainable parameter is a matrix of a layer: Muon is for those, and factors of LoRA, embeddings and "
            "norms are left to AdamW. Train whole weights, or use optim='adamw_torch'."
        )
    groups = parameter_groups(
        model,
        lambda role: ("muon", {**own, "adjust_lr_fn": adjust_lr}) if role.name in matrices else ("adamw", adamw),
        lr=lr,
        weight_decay=weight_decay,
        rules=rules,
    )
    views = matrix_views(model, list(matrices.values()), split)
    for name, view in views.items():
        if adjust_lr == "original" and view.out_dim is None:
            raise RefusedError(
                f"adjust_lr='original' scales by outputs over inputs, and it is not known which dimension of {name} "
                f"{tuple(matrices[name].parameter.shape)} is which. Use adjust_lr='match_rms_adamw'."
            )
    told = [
        dataclasses.replace(role, reason=f"{role.reason}; {views[role.name]}") if role.name in views else role
        for role in roles
    ]
    return MuonPlan(groups, views, told)


def check_momentum(momentum: Any, ns_steps: Any) -> None:
    """
    Check what every form of Muon has.

    Raises:
        ValueError: a value out of range.
    """
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r} must be a number in [0, 1). Moonlight: 0.95.")
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or not 1 <= ns_steps < 100:
        raise ValueError(f"ns_steps={ns_steps!r} must be an integer from 1 to 99. Usual: 5.")


@optimizer_factory(sharded=True)
def muon(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr: str = "match_rms_adamw",
    which: str = "hidden",
    adam_lr_ratio: float | None = None,
    adam_lr: float | None = None,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    split: Split | None = None,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make [`MuonAdamW`] for a model: Muon for the matrices inside of its layers, AdamW for embeddings, head, norms,
    biases, routers and adapters.

    Args:
        model (`nn.Module`): Its trainable parameters are updated. Not sharded yet.
        lr (`float`): LR of the matrices. With `match_rms_adamw` AdamW's LR can be kept.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled, of both. Moonlight: 0.1.
        momentum (`float`, *optional*, defaults to 0.95): In [0, 1).
        nesterov (`bool`, *optional*, defaults to `True`): Whether the update looks one step ahead.
        ns_steps (`int`, *optional*, defaults to 5): Newton-Schulz steps, 1 to 99.
        adjust_lr (`str`, *optional*, defaults to `"match_rms_adamw"`): `"match_rms_adamw"` scales an update to
            `0.2 sqrt(max(rows, columns))`, AdamW's usual size; `"original"` to `sqrt(max(1, outputs / inputs))`.
        which (`str`, *optional*, defaults to `"hidden"`): `"all_matrices"` gives Muon embeddings and head as well.
        adam_lr_ratio (`float`, *optional*): LR of AdamW as a multiple of `lr`, above 0; 1 by default.
        adam_lr (`float`, *optional*): The same, as a LR. A schedule scales both.
        betas, eps (*optional*, default to (0.9, 0.95) and 1e-8): Of AdamW.
        split (`Mapping[str, Sequence[int] | None]`, *optional*): Pattern in a name -> outputs of each part of a fused
            weight, repeated until the outputs end, or `None` for one matrix. Only for what cannot be measured.
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.

    Raises:
        ValueError: a value out of range.
        RefusedError: no matrix trains (LoRA), or a fused weight whose layout was not recognised.

    Example:
    ```python
    >>> optimizer = muon(nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8)), lr=1e-3)
    >>> [(group["rule"], group["param_names"]) for group in optimizer.param_groups]
    [('muon', ['0.weight']), ('adamw', ['0.bias', '1.weight', '1.bias'])]

    ```
    """
    check_momentum(momentum, ns_steps)
    plan = plan_muon(
        model,
        {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps},
        lr=lr,
        weight_decay=weight_decay,
        which=which,
        adjust_lr=adjust_lr,
        adam_lr_ratio=adam_lr_ratio,
        adam_lr=adam_lr,
        betas=tuple(betas),  # type: ignore[arg-type]
        eps=eps,
        split=split,
        rules=rules,
    )
    return with_report(MuonAdamW(plan.groups, plan.views), plan.roles)
