"""Names of optimizers, as `optim=` of a config writes them, and their arguments, as `optim_args=` does."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from .factory import OptimizerFactory

#: name -> module that defines a factory of this name
_FACTORIES: dict[str, str] = {
    "mars_m": ".mars_muon",
    "muon": ".muon_adamw",
    "apollo": ".apollo_rule",
    "apollo_mini": ".apollo_rule",
    "frugal": ".frugal_rule",
    "nadamw": ".nesterov",
    "soap": ".adapters",
    "prodigy": ".adapters",
    "lars": ".adapters",
    "lamb": ".adapters",
}
#: prefix -> module with `from_package(name) -> OptimizerFactory`, for optimizers of other packages
_PACKAGES: dict[str, str] = {"pytorch_optimizer": ".adapters"}
#: field of TrainingArguments -> its default; a field at its default leaves the default of the optimizer
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def optimizer_names() -> tuple[str, ...]:
    """Return the names that `optim=` of an Effi config and [`use_optimizer`] take, beside those of transformers."""
    return (*sorted(_FACTORIES), *(f"{prefix}:NAME" for prefix in sorted(_PACKAGES)))


def is_own(optim: Any) -> bool:
    """Return whether `optim=` names an optimizer of this package; a name of transformers is not."""
    # A member of transformers' enum is a `str` too, and never one of ours.
    return isinstance(optim, str) and (
        str(optim) in _FACTORIES or optim.partition(":")[0] in _PACKAGES and ":" in optim
    )


def find_factory(optim: str) -> OptimizerFactory:
    """
    Return the factory of a name.

    Raises:
        ValueError: an unknown name.
        MissingPackageError: the package that has it is not installed.
    """
    prefix, colon, rest = optim.partition(":")
    if colon and prefix in _PACKAGES:
        return importlib.import_module(_PACKAGES[prefix], __package__).from_package(rest)
    if optim not in _FACTORIES:
        raise ValueError(
            f"optim={optim!r} is no optimizer of hf_effi. It has {', '.join(optimizer_names())}; for those of "
            "transformers use the Trainer's own optim=."
        )
    return getattr(importlib.import_module(_FACTORIES[optim], __package__), optim)


def resolve_optimizer(optim: str | OptimizerFactory, options: Mapping[str, Any]) -> tuple[OptimizerFactory, dict]:
    """
    Return the factory of a name (or the factory itself) and its checked options.

    Raises:
        ValueError: an unknown name, or an option that it does not take.
    """
    if not isinstance(optim, (str, OptimizerFactory)):
        raise ValueError(f"optim={optim!r} must be a name ({', '.join(optimizer_names())}) or an optimizer factory.")
    factory = find_factory(optim) if isinstance(optim, str) else optim
    unknown = sorted(set(options) - set(factory.options))
    if unknown:
        raise ValueError(
            f"{factory.name} has no argument {', '.join(map(repr, unknown))}. It takes {', '.join(factory.options)}."
        )
    return factory, dict(options)


def arguments_from(args: Any, factory: OptimizerFactory, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the arguments of a factory: those given, then LR, weight decay and Adam's coefficients of a config.

    `adam_beta1`, `adam_beta2` and `adam_epsilon` count where they are not at their defaults, so that an optimizer
    keeps its own.
    """
    found: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if (args.adam_beta1, args.adam_beta2) != (_ADAM["adam_beta1"], _ADAM["adam_beta2"]):
        found["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.adam_epsilon != _ADAM["adam_epsilon"]:
        found["eps"] = args.adam_epsilon
    for name in ("betas", "eps"):
        if name in found and name not in factory.options:
            raise ValueError(
                f"adam_{'beta1, adam_beta2' if name == 'betas' else 'epsilon'} are set, and {factory.name} has no "
                f"{name}. Leave them at their defaults."
            )
    return {**found, **options}


def parse_optim_args(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Read `optim_args=`: `"rank=128, scale=32"` as transformers writes it, a JSON object, or a dict.

    Values are read as JSON where they are JSON, and as text where not.

    Raises:
        ValueError: text that is neither.

    Example:
    ```python
    >>> parse_optim_args("rank=128, nesterov=false, block=random")
    {'rank': 128, 'nesterov': False, 'block': 'random'}

    ```
    """
    if not text:
        return {}
    if isinstance(text, Mapping):
        return dict(text)
    if not isinstance(text, str):
        raise ValueError(f"optim_args={text!r} must be text like 'rank=128,scale=32', a JSON object or a dict.")
    if text.strip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"optim_args={text!r} is not JSON ({error}).") from error
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(
                f"optim_args has {part.strip()!r}, which is not NAME=VALUE. Write e.g. 'rank=128,scale=32'."
            )
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False", "None") else text)
    except json.JSONDecodeError:
        return None if text == "None" else text
