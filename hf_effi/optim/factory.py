"""What makes an optimizer out of a model: one call for a stock Trainer, a config and a script of your own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import RefusedError
from .base import check_not_negative
from .report import OptimizerReport, report_of
from .roles import GroupRules, ParameterRole, parameter_roles

#: What every factory takes beside its own arguments.
COMMON = ("lr", "weight_decay", "rules")


class OptimizerFactory:
    """
    A function from a model to an optimizer, in the form that `Trainer(optimizer_cls_and_kwargs=(factory, {...}))` asks
    for: called without a model it returns itself.

    Args:
        build (`Callable`): `build(model, *, lr, weight_decay=..., rules=None, ...)`.
        elementwise (`bool`, *optional*, defaults to `False`): Each weight is updated from its own gradient alone, so
            that the flat pieces of DeepSpeed ZeRO and the shards of FSDP are as good as tensors.
        sharded (`bool`, *optional*, defaults to `False`): It is right on the shards of FSDP2 all the same.

    Raises:
        ValueError: on a call with an argument that `build` does not take; the message lists those it does.

    Example:
    ```python
    >>> @optimizer_factory(elementwise=True)
    ... def plain_sgd(model, *, lr, weight_decay=0.0, rules=None):
    ...     groups = parameter_groups(model, lambda role: "sgd", lr=lr, weight_decay=weight_decay, rules=rules)
    ...     return torch.optim.SGD(groups, lr=lr)
    >>> plain_sgd()(nn.Linear(8, 8), lr=0.1).defaults["lr"]
    0.1

    ```
    """

    def __init__(
        self, build: Callable[..., torch.optim.Optimizer], *, elementwise: bool = False, sharded: bool = False
    ) -> None:
        functools.update_wrapper(self, build)
        self.build, self.elementwise, self.sharded = build, elementwise, sharded
        self.__signature__ = inspect.signature(build)

    def __call__(self, model: nn.Module | None = None, **kwargs: Any) -> Any:
        if model is None and not kwargs:
            return self  # what `Trainer.create_optimizer` does first with a factory
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{self.name} makes an optimizer out of a model and got {type(model).__name__}. "
                f"Call {self.name}(model, lr=...), or pass optimizer_cls_and_kwargs=({self.name}, {{'lr': ...}})."
            )
        unknown = sorted(set(kwargs) - set(self.options))
        if unknown:
            raise ValueError(
                f"{self.name} has no argument {', '.join(map(repr, unknown))}. It takes {', '.join(self.options)}."
            )
        if "lr" in self.options and kwargs.get("lr", self.defaults.get("lr")) is None:
            raise ValueError(f"{self.name} needs lr, e.g. {self.name}(model, lr=1e-3).")
        optimizer = self.build(model, **kwargs)
        if not self.elementwise:
            _expect_whole(optimizer, self)
        return optimizer

    @property
    def name(self) -> str:
        """Name of the function, which a config writes as `optim=`."""
        return self.build.__name__

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its keywords."""
        return tuple(name for name, p in self.__signature__.parameters.items() if p.kind is p.KEYWORD_ONLY)

    @property
    def defaults(self) -> dict[str, Any]:
        """Keywords that have a default, and it."""
        parameters = self.__signature__.parameters
        return {
            name: parameters[name].default for name in self.options if parameters[name].default is not inspect._empty
        }

    def __repr__(self) -> str:
        return f"<optimizer factory {self.name}{self.__signature__}>"


def _expect_whole(optimizer: torch.optim.Optimizer, factory: OptimizerFactory) -> None:
    """
    Refuse the first update where an engine has put pieces in the place of the tensors that the optimizer was made for.

    [`check_engine`] says it earlier; a factory in `optimizer_cls_and_kwargs` of a stock Trainer does not pass there.
    """
    shapes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]

    def look(*_: Any) -> None:
        handle.remove()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        pieces = shapes != [[p.shape for p in group["params"]] for group in optimizer.param_groups]
        if pieces or (not factory.sharded and any(isinstance(p, DTensor) for p in held)):
            raise RefusedError(
                f"{factory.name} needs whole matrices, and the engine of this run has put pieces of them in its "
                f"groups. Use DDP{', FSDP2' if factory.sharded else ''} or an optimizer that takes each weight by "
                "itself (nadamw, adamw_torch)."
            )

    handle = optimizer.register_step_pre_hook(look)


def optimizer_factory(
    *, elementwise: bool = False, sharded: bool = False
) -> Callable[[Callable[..., torch.optim.Optimizer]], OptimizerFactory]:
    """
    Decorate a function that makes an optimizer out of a model.

    Args:
        elementwise, sharded (`bool`, *optional*, default to `False`): As in [`OptimizerFactory`].
    """
    return lambda build: OptimizerFactory(build, elementwise=elementwise, sharded=sharded)


def parameter_groups(
    model: nn.Module,
    assign: Callable[[ParameterRole], str | tuple[str, Mapping[str, Any]]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    rules: GroupRules | None = None,
) -> list[dict[str, Any]]:
    """
    Sort the trainable parameters of a model into the groups of an optimizer.

    Args:
        model (`nn.Module`): The model.
        assign (`Callable[[ParameterRole], str | tuple[str, Mapping]]`): Returns the label of the rule that a
            parameter follows and, beside it, what its group holds (`{"lr_ratio": 0.3}`; `lr_ratio` multiplies the LR).
        lr (`float`): LR of a parameter whose factor is 1. At least 0.
        weight_decay (`float`, *optional*, defaults to 0.0): Of the parameters that decay. At least 0.
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.

    Returns:
        `list[dict]`: Groups with `params` as `(name, parameter)` pairs, `lr`, `weight_decay`, `rule` and what `assign`
        gave; in the order in which their first parameter stands in the model, so that a checkpoint fits.

    Raises:
        ValueError: a bad value, or a model without a trainable parameter.
    """
    for option, value in (("lr", lr), ("weight_decay", weight_decay)):
        check_not_negative(option, value)
    groups: dict[tuple, dict[str, Any]] = {}
    for role in parameter_roles(model, rules):
        answer = assign(role)
        label, extra = (answer, {}) if isinstance(answer, str) else answer
        ratio = dict(extra).pop("lr_ratio", 1.0)
        decay = weight_decay if role.decays else 0.0
        rate = lr * role.lr_factor * ratio
        key = (label, rate, decay, tuple(sorted((k, repr(v)) for k, v in extra.items())))
        own = {k: v for k, v in extra.items() if k != "lr_ratio"}
        group = groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay, "rule": label, **own})
        group["params"].append((role.name, role.parameter))
    return list(groups.values())


def with_report(optimizer: torch.optim.Optimizer, roles: Sequence[ParameterRole]) -> torch.optim.Optimizer:
    """Let an optimizer carry why each parameter follows the rule it does; [`optimizer_report`] reads it."""
    optimizer.hf_effi_reasons = {  # type: ignore[attr-defined]
        role.name: (role.role, role.reason) for role in roles
    }
    return optimizer


def use_optimizer(trainer: Any, optim: str | OptimizerFactory, **options: Any) -> None:
    """
    Let a Trainer train with an optimizer of this package; the one line for a stock `Trainer`, `SFTTrainer` or
    `GRPOTrainer` (whose constructor has no `optimizer_cls_and_kwargs`).

    The optimizer is made when training begins, as the Trainer's own is. LR and weight decay are those of
    `trainer.args`; `adam_beta1`, `adam_beta2` and `adam_epsilon` too, where they are not at their defaults.

    Args:
        trainer (`transformers.Trainer`): Any trainer that has made no optimizer yet.
        optim (`str` or `OptimizerFactory`): A name of [`optimizer_names`], or a factory.
        options (`Any`): Arguments of the factory.

    Raises:
        ValueError: an unknown name or argument.
        RefusedError: the trainer has an optimizer, or was told of another one.

    Example:
    ```python
    trainer = GRPOTrainer(model, rewards, args=args, train_dataset=prompts)
    use_optimizer(trainer, "apollo", rank=128)
    trainer.train()
    ```
    """
    from .engines import check_engine
    from .names import arguments_from, resolve_optimizer

    if getattr(trainer, "optimizer", None) is not None:
        raise RefusedError(
            f"The trainer has an optimizer already ({type(trainer.optimizer).__name__}). Call use_optimizer before "
            "train(), and pass no `optimizers` to its constructor."
        )
    if getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
        raise RefusedError("The trainer was given optimizer_cls_and_kwargs already. Keep one of the two.")
    factory, options = resolve_optimizer(optim, options)
    check_engine(trainer, factory)
    trainer.optimizer_cls_and_kwargs = (factory, arguments_from(trainer.args, factory, options))


def optimizer_report(holder: Any) -> OptimizerReport:
    """
    Return which parameter follows which rule, and why.

    Args:
        holder (`Trainer` or `torch.optim.Optimizer`): A trainer whose optimizer was made, or the optimizer, wrapped by
            accelerate or not.

    Raises:
        ValueError: there is no optimizer yet.
    """
    return report_of(holder)
