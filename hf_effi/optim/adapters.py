"""Optimizers of `pytorch_optimizer`, made for a model: SOAP, Prodigy, LARS, LAMB by name, all others as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._compat import require
from ..errors import RefusedError
from .base import check_betas
from .factory import OptimizerFactory, optimizer_factory, parameter_groups, with_report
from .roles import GroupRules, parameter_roles
from .split import SplitOptimizer

PURPOSE = "for SOAP, Prodigy, LARS, LAMB and the other optimizers of that package"
#: What a state may hold for a Trainer to load it again: it reads checkpoints with `weights_only=True`.
_LOADABLE = (torch.Tensor, int, float, str, bool, type(None))
#: Keywords of the class that a factory gives itself, or that say nothing to a user of one.
_OWN = {"self", "params", "lr", "weight_decay", "kwargs"}
#: Rules whose trust ratio makes no sense for biases and gains of norms, which stay out of it in the papers.
_VECTORS = ("bias", "norm", "other", "small")


def from_package(name: str) -> OptimizerFactory:
    """
    Return a factory of an optimizer of `pytorch_optimizer`, for `optim="pytorch_optimizer:NAME"`.

    Its keywords are those of the class; groups, LRs and weight decay by parameter are ours. Nothing is known of what
    it needs of a tensor, so it is refused under DeepSpeed ZeRO and FSDP.

    Args:
        name (`str`): As `pytorch_optimizer.get_supported_optimizers()` has it, for example `"ademamix"`.

    Raises:
        ValueError: no such optimizer; the message has those with a similar name.
        RefusedError: its step needs a closure, which a Trainer does not give.
        MissingPackageError: the package is not installed.
    """
    package = require("pytorch_optimizer", PURPOSE)
    known = package.get_supported_optimizers()
    if not name or name.lower() not in known:
        near = [other for other in known if name and other[:4] == name.lower()[:4]] or known
        raise ValueError(f"pytorch_optimizer has no {name!r}. It has, for example, {', '.join(near[:8])}.")
    made = package.load_optimizer(name)
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise RefusedError(f"{made.__name__} needs a closure in each step, and a Trainer gives none.")
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for key, parameter in inspect.signature(made.__init__).parameters.items()
        if key not in _OWN and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]

    def build(
        model: nn.Module, *, lr: float, weight_decay: float = 0.0, rules: GroupRules | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        return _made(made, name.lower(), model, lr, weight_decay, rules, options)

    common = [p for p in inspect.signature(build).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    build.__name__ = build.__qualname__ = f"pytorch_optimizer:{name.lower()}"
    build.__doc__ = made.__doc__
    build.__signature__ = inspect.Signature([*common, *own])  # type: ignore[attr-defined]
    return OptimizerFactory(build)


def _made(
    made: Callable[..., torch.optim.Optimizer],
    label: str,
    model: nn.Module,
    lr: float,
    weight_decay: float,
    rules: GroupRules | None,
    options: dict[str, Any],
) -> torch.optim.Optimizer:
    groups = parameter_groups(model, lambda role: label, lr=lr, weight_decay=weight_decay, rules=rules)
    optimizer = made(groups, lr=lr, **options)
    _checked_once(optimizer)
    return with_report(optimizer, parameter_roles(model, rules))


def _checked_once(optimizer: torch.optim.Optimizer) -> None:
    """Look at the state after the first update: what cannot be loaded again is said before hours are spent on it."""

    def look(*_: Any) -> None:
        handle.remove()
        saved = optimizer.state_dict()
        wrong = {type(value).__name__ for value in _leaves([saved["state"], saved["param_groups"]])}
        if wrong:
            raise RefusedError(
                f"{type(optimizer).__name__} keeps {', '.join(sorted(wrong))} in its state, which a Trainer cannot "
                "load from a checkpoint. Take another optimizer, or train without checkpoints in a loop of your own."
            )

    handle = optimizer.register_step_post_hook(look)


def _leaves(value: Any) -> list[Any]:
    """Return what lies in nested containers and is of no type that can be loaded."""
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [] if isinstance(value, _LOADABLE) else [value]


@optimizer_factory()
def soap(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    precondition_frequency: int = 10,
    max_precondition_dim: int = 10000,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make SOAP: Adam in the eigenbasis of Shampoo's preconditioner. Paper: Vyas et al. (2409.11321).

    The implementation is that of `pytorch_optimizer`, whose first step only starts the preconditioner. Embeddings and
    the head are preconditioned on their short side alone where the long one exceeds `max_precondition_dim`.

    Args:
        model (`nn.Module`): Its trainable parameters are updated.
        lr (`float`): 3e-3 in the paper, for pre-training.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled.
        betas (`tuple[float, float]`, *optional*, defaults to (0.95, 0.95)): Of the moments; the second one is that of
            the preconditioner too.
        eps (`float`, *optional*, defaults to 1e-8): Above 0.
        precondition_frequency (`int`, *optional*, defaults to 10): Updates between two refreshes of the basis.
        max_precondition_dim (`int`, *optional*, defaults to 10000): Longest side that gets a basis.
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.
    """
    options = {"betas": tuple(betas), "eps": eps, "precondition_frequency": precondition_frequency}
    options["max_precondition_dim"] = max_precondition_dim
    return _made(require("pytorch_optimizer", PURPOSE).SOAP, "soap", model, lr, weight_decay, rules, options)


@optimizer_factory()
def prodigy(
    model: nn.Module,
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = float("inf"),
    bias_correction: bool = False,
    safeguard_warmup: bool = False,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make Prodigy, which estimates its own step size. Paper: Mishchenko and Defazio (2306.06101).

    `lr` multiplies the estimate and should stay at 1, with a schedule on top. The estimate is one number for all
    parameters.

    Args:
        model (`nn.Module`): Its trainable parameters are updated.
        lr (`float`, *optional*, defaults to 1.0): At least 0.1; a config says `learning_rate=1.0`.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled.
        betas, eps: Those of Adam.
        d0, d_coef, growth_rate, bias_correction, safeguard_warmup: As in the paper's code; `safeguard_warmup=True`
            with a warm-up.
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.

    Raises:
        ValueError: an `lr` that looks like one of Adam's.
    """
    if lr < 0.1:
        raise ValueError(
            f"lr={lr} multiplies the step size that Prodigy estimates, and would make it {lr} of what it should be. "
            "Set learning_rate=1.0."
        )
    options = {"betas": tuple(betas), "eps": eps, "d0": d0, "d_coef": d_coef, "growth_rate": growth_rate}
    options |= {"bias_correction": bias_correction, "safeguard_warmup": safeguard_warmup}
    return _made(require("pytorch_optimizer", PURPOSE).Prodigy, "prodigy", model, lr, weight_decay, rules, options)


@optimizer_factory()
def lars(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    nesterov: bool = False,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make LARS: momentum on `g c |w| / (|g| + decay |w|)`. Paper: You et al. (1708.03888).

    Matrices follow that rule; biases and gains of norms follow plain momentum without weight decay. The norms are
    those of whole tensors, which a shard does not have.

    Args:
        model (`nn.Module`): Its trainable parameters are updated.
        lr (`float`): LR.
        weight_decay (`float`, *optional*, defaults to 0.0): Inside of the ratio.
        momentum (`float`, *optional*, defaults to 0.9): In [0, 1).
        trust_coefficient (`float`, *optional*, defaults to 1e-3): `c`.
        nesterov (`bool`, *optional*, defaults to `False`): Nesterov momentum.
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.
    """
    options = {"momentum": momentum, "trust_coefficient": trust_coefficient, "nesterov": nesterov}
    return _made(require("pytorch_optimizer", PURPOSE).LARS, "lars", model, lr, weight_decay, rules, options)


@optimizer_factory()
def lamb(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    rules: GroupRules | None = None,
) -> torch.optim.Optimizer:
    """
    Make LAMB: `w <- w - lr (|w| / |u|) u` with `u = m / (sqrt(v) + eps) + decay w`, for each matrix. Paper: You et al.
    (1904.00962).

    The implementation is that of `pytorch_optimizer`, with `|w|` at most 10 and weight decay inside of the ratio, as
    in the paper; its moments have no bias correction, which the ratio takes out again but for the share of the decay.
    Biases and gains of norms are left to AdamW with the same LR: the paper's experiments take them out of the ratio.

    Args:
        model (`nn.Module`): Its trainable parameters are updated.
        lr (`float`): LR.
        weight_decay (`float`, *optional*, defaults to 0.0): Inside of the ratio.
        betas (`tuple[float, float]`, *optional*, defaults to (0.9, 0.999)): In [0, 1).
        eps (`float`, *optional*, defaults to 1e-6): Above 0.
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.
    """
    groups = parameter_groups(
        model,
        lambda role: "adamw" if role.role in _VECTORS else "lamb",
        lr=lr,
        weight_decay=weight_decay,
        rules=rules,
    )
    by_ratio = [group for group in groups if group["rule"] == "lamb"]
    plain = [group for group in groups if group["rule"] == "adamw"]
    if not by_ratio:
        raise ValueError("lamb needs a matrix to train, and all trainable parameters are biases or norms.")
    # `adam_debias=True` leaves the LR alone: otherwise it would be divided by `1 - beta1^t`, ten times it at first.
    options = {"betas": tuple(betas), "eps": eps, "weight_decouple": False, "adam_debias": True}
    parts = [require("pytorch_optimizer", PURPOSE).Lamb(by_ratio, lr=lr, **options)]
    if plain:
        parts.append(torch.optim.AdamW(plain, lr=lr, betas=check_betas(betas), eps=eps))
    optimizer = SplitOptimizer(parts, lr=lr)
    _checked_once(optimizer)
    return with_report(optimizer, parameter_roles(model, rules))
