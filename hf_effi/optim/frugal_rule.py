"""FRUGAL: an optimizer state for a part of the weights, which changes, and the sign of the gradient for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from ..functional.split_state import ORDERS, blocks_of_draw, positions_of_draw
from ._common import adamw_, check_count, check_same_options, names_of, precise
from .base import EffiOptimizer, check_betas, check_not_negative, check_positive, gradient_of
from .factory import optimizer_factory, parameter_groups, with_report
from .roles import GroupRules, ParameterRole, parameter_roles

#: what a draw takes: whole tensors, columns or rows of each matrix, or single weights of it
PROJECTIONS = ("block", "columns", "rows", "randk")
#: an option that the draws were made with -> the run would be another one
_FIXED = ("density", "update_gap", "projection", "order", "free_scale", "seed", "rule")


class FRUGAL(EffiOptimizer):
    """
    A share `density` of the matrices is updated by AdamW, the rest by the sign of its gradient, which needs no state.
    Every `update_gap` updates another share is drawn; what leaves loses its moments, what comes begins with none.

    Formula, t from 1, draw `k = floor((t - 1) / update_gap)`: `W <- W (1 - lr decay)`, then on the drawn weights
    AdamW's update, its moments and bias correction counted from the draw on, and on the others
    `W <- W - lr free_scale sign(G)`.
    Source: FRUGAL: Memory-Efficient Optimization by Reducing State Overhead (Zmushko et al., 2411.07837).

    A round of `ceil(1 / density)` draws reaches every block, every column, row or weight. Parameters of groups with
    `rule="adamw"` and vectors follow AdamW throughout.

    Args:
        params (iterable): Parameters or groups, as for torch's optimizers; named ones draw their
            positions by name, others by place.
        lr (`float`): For pre-training 1e-3 at 130M weights.
        density (`float`, *optional*, defaults to 0.25): In [0, 1]. 0 is signSGD on the matrices, 1 AdamW that
            forgets its moments at each draw.
        update_gap (`int`, *optional*, defaults to 200): Updates with one draw; 500 for fine-tuning. `None` draws once.
        projection (`str`, *optional*, defaults to `"block"`): What is drawn: `"block"` whole tensors, `"columns"` or
            `"rows"` of each matrix, `"randk"` single weights (their positions take as many bytes as the moments).
        order (`str`, *optional*, defaults to `"random"`): Of the blocks: `"random"`, `"ascending"`, `"descending"`,
            where ascending is the order of the groups, which is that of the model.
        free_scale (`float`, *optional*, defaults to 1.0): LR of the rest over that of the drawn; 0.1 for fine-tuning.
        betas (`tuple[float, float]`, *optional*, defaults to (0.9, 0.999)): In [0, 1).
        eps (`float`, *optional*, defaults to 1e-8): Above 0.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled, on all of a weight.
        seed (`int`, *optional*, defaults to 0): Of the draws. At least 0.

    Raises:
        ValueError: a value out of range, or an option that others turn off.
        MismatchError: by `load_state_dict`, for a state that other options made.

    Example:
    ```python
    >>> first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    >>> optimizer = FRUGAL([first, second], lr=0.1, density=0.5, update_gap=1, order="ascending", free_scale=0.5)
    >>> for weight in (first, second):
    ...     weight.grad = torch.full((2, 2), 3.0)
    >>> optimizer.step(); round(first[0, 0].item(), 4), round(second[0, 0].item(), 4)  # AdamW, sign
    (0.9, 0.95)
    >>> optimizer.step(); first in optimizer.state, second in optimizer.state
    (False, True)

    ```
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        density: float = 0.25,
        update_gap: int | None = 200,
        projection: str = "block",
        order: str = "random",
        free_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        _check_draws(density, projection, order, free_scale)
        defaults = {
            "lr": check_not_negative("lr", lr),
            "density": density,
            "update_gap": None if update_gap is None else check_count("update_gap", update_gap),
            "projection": projection,
            "order": order,
            "free_scale": check_not_negative("free_scale", free_scale),
            "betas": check_betas(betas),
            "eps": check_positive("eps", eps),
            "weight_decay": check_not_negative("weight_decay", weight_decay),
            "seed": check_count("seed", seed, least=0),
            "rule": "frugal",
            "updates": 0,
        }
        super().__init__(params, defaults)
        self._drawn: dict[Tensor, tuple[int, Tensor]] = {}
        self._blocks: tuple[int, set[Tensor]] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state without the draws: they follow from their number."""
        super().__setstate__(state)
        self._drawn, self._blocks = {}, None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state that the same options made."""
        check_same_options(self, state_dict, _FIXED)
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient; the first update of a draw frees the moments of the last one."""
        for group in self.param_groups:
            group["updates"] += 1
        active = self.active()
        for parameter in self._split():
            held = self.state.get(parameter)
            if held and (held["draw"] != self.draw or parameter not in active):
                del self.state[parameter]
        return super().step(closure)

    @property
    def draw(self) -> int:
        """Number of the draw of the last update, from 0."""
        group = self.param_groups[0]
        return max(group["updates"] - 1, 0) // group["update_gap"] if group["update_gap"] else 0

    def active(self) -> set[Tensor]:
        """Return the matrices with a state in the present draw: some with `"block"`, else all, none of density 0."""
        group, split = self.param_groups[0], self._split()
        if group["projection"] != "block":
            return set(split) if group["density"] else set()
        if self._blocks is None or self._blocks[0] != self.draw:
            sizes = [parameter.numel() for parameter in split]
            chosen = blocks_of_draw(sizes, group["density"], self.draw, group["order"], group["seed"])
            self._blocks = self.draw, {split[number] for number in chosen}
        return self._blocks[1]

    def _split(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups if group["rule"] != "adamw" for p in group["params"] if p.ndim >= 2]

    def update_group(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Update the parameters of one group."""
        active, names = self.active(), names_of(self.param_groups)
        for parameter in parameters:
            weight = parameter.to(precise(parameter.dtype))
            gradient = gradient_of(parameter, weight.dtype)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            if group["rule"] == "adamw" or parameter.ndim < 2:
                adamw_(weight, gradient, self.state[parameter], group)
            elif parameter not in active:
                weight.add_(gradient.sign(), alpha=-group["lr"] * group["free_scale"])
            else:
                state = self.state[parameter]
                state["draw"] = self.draw
                if group["projection"] == "block":
                    adamw_(weight, gradient, state, group)
                else:
                    weight = self._update_part(group, parameter, weight, gradient, names[parameter])
            if weight is not parameter:
                parameter.copy_(weight)

    def _update_part(
        self, group: dict[str, Any], parameter: nn.Parameter, weight: Tensor, gradient: Tensor, name: str
    ) -> Tensor:
        axis = {"columns": -1, "rows": -2, "randk": 0}[group["projection"]]
        if group["projection"] == "randk":
            weight, gradient = weight.reshape(-1), gradient.reshape(-1)
        kept = self._drawn.get(parameter)
        if kept is None or kept[0] != self.draw:
            places = positions_of_draw(weight.shape[axis], group["density"], self.draw, name, group["seed"])
            kept = self._drawn[parameter] = self.draw, places.to(weight.device)
        places = kept[1]
        part = weight.index_select(axis, places)
        adamw_(part, gradient.index_select(axis, places), self.state[parameter], group)
        weight.add_(gradient.sign(), alpha=-group["lr"] * group["free_scale"])
        return weight.index_copy_(axis, places, part).view(parameter.shape)


def _check_draws(density: Any, projection: Any, order: Any, free_scale: Any) -> None:
    blocks_of_draw((), density, 0)  # whether it is a share
    if projection not in PROJECTIONS:
        raise ValueError(f"projection={projection!r} must be one of {', '.join(PROJECTIONS)}.")
    if order not in ORDERS:
        raise ValueError(f"order={order!r} must be one of {', '.join(ORDERS)}.")
    if order != "random" and projection != "block":
        raise ValueError(f"order={order!r} is that of whole tensors, and projection={projection!r} draws in each.")
    if density in (0, 1) and (projection != "block" or order != "random"):
        raise ValueError(
            f"density={density} draws {'all' if density else 'nothing'}, so projection={projection!r} and "
            f"order={order!r} cannot act. Leave both out."
        )
    if density == 1 and free_scale != 1:
        raise ValueError(f"density=1 leaves nothing free, so free_scale={free_scale!r} cannot act. Leave it out.")


@optimizer_factory()
def frugal(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    density: float = 0.25,
    update_gap: int | None = 200,
    projection: str = "block",
    order: str = "random",
    free_scale: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make [`FRUGAL`] for a model: the matrices inside the layers are split, embeddings, head, norms, biases and routers
    follow AdamW with the same LR.

    Args:
        model (`nn.Module`): Its trainable parameters are updated.
        lr, weight_decay, density, update_gap, projection, order, free_scale, betas, eps, seed: As in [`FRUGAL`].
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.

    Raises:
        RefusedError: no matrix inside the layers trains, only factors of LoRA, say.
    """
    roles = parameter_roles(model, rules)

    def assign(role: ParameterRole) -> str:
        return "frugal" if role.role in ("hidden", "experts") else "adamw"

    if not any(assign(role) == "frugal" for role in roles):
        what = "only factors of LoRA train" if any(role.role == "adapter" for role in roles) else "none trains"
        raise RefusedError(
            f"frugal splits the matrices inside the layers, and {what}. Use optim='adamw_torch', or train the "
            "matrices."
        )
    optimizer = FRUGAL(
        parameter_groups(model, assign, lr=lr, weight_decay=weight_decay, rules=rules),
        lr=lr,
        density=density,
        update_gap=update_gap,
        projection=projection,
        order=order,
        free_scale=free_scale,
        betas=betas,
        eps=eps,
        seed=seed,
    )
    return with_report(optimizer, roles)
