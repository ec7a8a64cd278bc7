"""`OptimizerMixin`: the optimizers and parameter groups of this package by the config of any Trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import Trainer

from ...errors import RefusedError
from ...optim.engines import check_engine, refuse_second_optimizer
from ...optim.factory import parameter_groups
from ...optim.names import arguments_from, is_own, optimizer_names, parse_optim_args, resolve_optimizer
from ...optim.roles import GroupRules


@dataclass
class OptimizerArguments:
    """
    What a config class gains: names of hf_effi in `optim=`, with their arguments in `optim_args=`, and `optim_groups`.

    Args:
        optim_groups (`dict` or `str`, *optional*): Arguments of [`GroupRules`], as a dict or as JSON: learning rates
            and weight decay by parameter, for every optimizer, also those of transformers.

    Raises:
        ValueError: an argument that the named optimizer does not take, or a rule that is not valid.
    """

    optim_groups: dict | str | None = field(
        default=None,
        metadata={
            "help": "LRs and weight decay by parameter: layer_decay, backbone_factor, head_factor, lora_plus_ratio, "
            "lr_factors, no_decay; as a dict or as JSON."
        },
    )

    def __post_init__(self) -> None:
        asked = self.optim
        if is_own(asked):
            self.optim = "adamw_torch"  # transformers knows its own names only, and looks at once
        try:
            super().__post_init__()  # of TrainingArguments
        except ValueError as error:
            if "OptimizerNames" not in str(error):
                raise
            raise ValueError(f"{error}. hf_effi has {', '.join(optimizer_names())} as well.") from error
        if is_own(asked):
            self.optim = str(asked)
            own_optimizer(self)
        rules_from_config(self)


def rules_from_config(args: Any) -> GroupRules | None:
    """
    Read `optim_groups=`.

    Raises:
        ValueError: no object, an unknown rule, or a value out of range.
    """
    given = getattr(args, "optim_groups", None)
    if not given:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"optim_groups={given!r} is not JSON ({error}). Write e.g. '{{\"layer_decay\": 0.9}}'."
            ) from error
    known = [f.name for f in fields(GroupRules)]
    if not isinstance(given, Mapping) or set(given) - set(known):
        raise ValueError(f"optim_groups={given!r} must be an object of {', '.join(known)}.")
    return GroupRules(**given)


def own_optimizer(args: Any) -> tuple[Any, dict[str, Any]] | None:
    """
    Return factory and arguments of the optimizer that a config names, or `None` where it is one of transformers.

    Raises:
        ValueError: arguments that it does not take.
        RefusedError: a DeepSpeed config that brings an optimizer too.
    """
    if not is_own(args.optim):
        return None
    factory, options = resolve_optimizer(args.optim, parse_optim_args(args.optim_args))
    if taken := sorted({"lr", "weight_decay", "rules"} & set(options)):
        names = {"lr": "learning_rate", "weight_decay": "weight_decay", "rules": "optim_groups"}
        raise ValueError(f"optim_args has {taken[0]!r}, which is the field {names[taken[0]]} of the config.")
    refuse_second_optimizer(args, f"optim={args.optim!r}")
    return factory, arguments_from(args, factory, {**options, "rules": rules_from_config(args)})


class OptimizerMixin:
    """
    Makes `optim=` and `optim_groups=` of the config act. Put it before the Trainer class. With a name of transformers
    and no `optim_groups` nothing changes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        asked = is_own(self.args.optim) and f"optim={self.args.optim!r}"
        asked = asked or (getattr(self.args, "optim_groups", None) and "optim_groups")
        if not asked:
            return
        given = self.optimizer is not None and "`optimizers`"
        given = given or (self.optimizer_cls_and_kwargs is not None and "`optimizer_cls_and_kwargs`")
        if given:
            raise RefusedError(f"{asked} in the config and {given} both name an optimizer. Keep one.")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.optimizer_cls_and_kwargs = self._configured(self.model if model is None else model)
            try:
                return super().create_optimizer(*args, **kwargs)
            finally:
                self.optimizer_cls_and_kwargs = None  # a search over hyperparameters makes another one
        return super().create_optimizer(*args, **kwargs)

    def _configured(self, model: Any) -> tuple[Any, dict[str, Any]] | None:
        if own := own_optimizer(self.args):
            check_engine(self, own[0])
            return own
        rules = rules_from_config(self.args)
        if rules is None:
            return None
        made, options = Trainer.get_optimizer_cls_and_kwargs(self.args, model)
        plain = isinstance(made, type) and issubclass(made, torch.optim.Optimizer)  # and no factory
        if not plain or {"params", "model", "optimizer_dict"} & set(options):
            raise RefusedError(f"optim={str(self.args.optim)!r} makes groups of its own, so optim_groups cannot act.")
        groups = parameter_groups(
            model, lambda role: made.__name__, lr=options["lr"], weight_decay=self.args.weight_decay, rules=rules
        )
        return made, {**options, "params": groups}
