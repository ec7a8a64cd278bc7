"""What APOLLO and FRUGAL share: AdamW for the rest, names of parameters, options that a checkpoint was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError

#: what wrappers put before the name of a parameter
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return in which precision weights of a dtype are updated: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def adamw_(weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    """
    Make one update of AdamW in place, without its weight decay; in the operations of torch's, so that bits agree.

    Args:
        weight, gradient (`Tensor`): Of one shape, in the precision of the moments.
        state (`dict`): Empty before the first update, then `step`, `exp_avg` and `exp_avg_sq`.
        group (`Mapping`): `lr`, `betas` and `eps`.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    if "exp_avg" not in state:
        state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(gradient))
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (state["exp_avg_sq"].sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
    weight.addcdiv_(state["exp_avg"], scale, value=-(lr / (1 - beta1 ** state["step"])))


def names_of(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Return a name for each parameter that is the same whatever wraps the model; without names, its place."""
    found = {}
    for number, group in enumerate(groups):
        known = group.get("param_names") or [f"{number}.{place}" for place in range(len(group["params"]))]
        for parameter, name in zip(group["params"], known, strict=True):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            found[parameter] = name
    return found


def check_same_options(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], options: Sequence[str]
) -> None:
    """
    Compare the options that shape a state with those that a saved one was made with.

    Raises:
        MismatchError: they differ, and what was saved would not fit or the run would go on with other draws.
    """
    for ours, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for option in options:
            if option in saved and saved[option] != ours[option]:
                raise MismatchError(
                    f"The checkpoint was made with {option}={saved[option]!r}, and this optimizer has "
                    f"{option}={ours[option]!r}. Set it as it was, or start a new run from the weights."
                )


def check_count(name: str, value: Any, least: int = 1) -> int:
    """
    Return an integer of at least `least`.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
    return value
