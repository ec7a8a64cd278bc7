"""Random draws of a forward under control: pinned to one value, or pushed to either end of their range."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._generators import UNIFORM, Level, accelerator_generators

_NORMAL = {"low": -1.0, "middle": 0.0, "high": 1.0}


class PinnedDraws(TorchDispatchMode):
    """
    Give every random operation of torch the same outcome each time; nothing is drawn from any generator.

    In the middle, dropout of any kind keeps everything, a layer that is skipped at random runs, noise is zero: a
    forward in training mode is a function of its input. At the two ends, whatever depends on a draw comes out
    differently. An operation is random where torch says so (`torch.Tag.nondeterministic_seeded`).

    Args:
        level (`str`): `"low"`, `"middle"` or `"high"`.

    Attributes:
        drawn (`dict[str, None]`): Names of the random operations that were met, in order.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.level = level
        self.drawn: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What a mode of functions had to say about the call, it has said.
        with torch._C.DisableTorchFunction():
            if torch.Tag.nondeterministic_seeded not in func.tags or not _draws(func, args, kwargs):
                return func(*args, **kwargs)
            self.drawn[func._schema.name.partition("::")[2]] = None
            return self._outcome(func, args, kwargs)

    def _outcome(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.partition("::")[2].rstrip("_")
        given = _arguments(func, args, kwargs)
        if name == "native_dropout":
            return self._dropout(given["input"], given["p"])
        out = _shaped(func, name, args, kwargs)
        uniform = UNIFORM[self.level]
        if name in ("rand", "rand_like"):
            return out.fill_(uniform)
        if name == "uniform":
            low, high = given.get("from", 0.0), given.get("to", 1.0)
            return out.fill_(low + (high - low) * uniform)
        if name in ("randn", "randn_like", "normal", "normal_functional"):
            mean, std = given.get("mean", 0.0), given.get("std", 1.0)
            return out.copy_(mean + std * _NORMAL[self.level] + torch.zeros_like(out))
        if name == "bernoulli":
            p = given.get("p", given["self"])
            p = given["self"] if p is None else p
            # At least an even chance is kept in the middle: dropout draws what stays.
            return out.copy_((torch.zeros_like(out, dtype=torch.float64) + p) >= 1 - uniform)
        if name in ("randint", "randint_like", "random"):
            low, high = given.get("low", given.get("from", 0)) or 0, given.get("high", given.get("to", 2)) or 2
            return out.fill_(low + int((high - 1 - low) * uniform))
        if name == "exponential":
            return out.fill_(-math.log1p(-uniform) / given.get("lambd", 1.0))
        if name == "randperm":
            return out.copy_(torch.arange(len(out), device=out.device).flip(0 if self.level == "high" else ()))
        # Anything else draws, each time from the same seed and never from a generator of the model's own.
        _seed(list(UNIFORM).index(self.level))
        return func(*args, **{**kwargs, "generator": None} if "generator" in kwargs else kwargs)

    def _dropout(self, x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        keeps = self.level != "low" and 1 - p >= 1 - UNIFORM[self.level]
        mask = torch.full_like(x, keeps, dtype=torch.bool)
        return x * mask / (1 - p) if p < 1 else x * 0, mask


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Fused attention and dropout are random operations only at a rate above zero."""
    given = _arguments(func, args, kwargs)
    rate = given.get("dropout_p", given.get("p") if "dropout" in func._schema.name else None)
    return given.get("train", True) is not False and (rate is None or rate > 0)


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    schema = func._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    return found | {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs


def _shaped(func: Any, name: str, args: Any, kwargs: Any) -> torch.Tensor:
    """Return a tensor for the outcome: that which the operation writes to, or a new one."""
    if func._schema.name.endswith("_"):
        return args[0]
    options = {key: value for key, value in kwargs.items() if key in ("dtype", "device", "layout", "pin_memory")}
    if name in ("rand", "randn"):
        return torch.empty(args[0], **options)
    if name == "randint":
        size = next(a for a in args if isinstance(a, (list, tuple)))
        return torch.empty(size, **{"dtype": torch.int64, **options})
    if name == "randperm":
        return torch.empty(args[0], **{"dtype": torch.int64, **options})
    like = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if like is not None:
        return torch.empty_like(like, **options)
    return func(*args, **kwargs)


def _seed(seed: int) -> None:
    """
    Seed torch's generators that are in use.

    `torch.manual_seed` would also leave a seed for those of an accelerator that has not been used yet, which nobody
    restores.
    """
    torch.default_generator.manual_seed(seed)
    if devices := accelerator_generators():
        devices.manual_seed_all(seed)
