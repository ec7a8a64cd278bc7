"""Random draws of a forward under control: pinned to one value, or pushed to either end of their range."""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Level = Literal["low", "middle", "high"]
#: a uniform number at each level; never 0 itself, so that `draw <= 0.0` does not hold for a rate of zero
_UNIFORM = {"low": 1e-6, "middle": 0.5, "high": 1 - 1e-6}
_NORMAL = {"low": -1.0, "middle": 0.0, "high": 1.0}


class PinnedDraws(TorchDispatchMode):
    """
    Give every random operation of torch the same outcome each time; nothing is drawn from any generator.

    In the middle, dropout of any kind keeps everything, a layer that is skipped at random runs, noise is zero: a forward in
    training mode is a function of its input. At the two ends, whatever depends on a draw comes out differently. An
    operation is random where torch says so (`torch.Tag.nondeterministic_seeded`).

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
        uniform = _UNIFORM[self.level]
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
            return out.fill_(-float(np.log1p(-uniform)) / given.get("lambd", 1.0))
        if name == "randperm":
            return out.copy_(torch.arange(len(out), device=out.device).flip(0 if self.level == "high" else ()))
        # Anything else draws, each time from the same seed.
        torch.manual_seed(list(_UNIFORM).index(self.level))
        return func(*args, **kwargs)

    def _dropout(self, x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        keeps = self.level != "low" and 1 - p >= 1 - _UNIFORM[self.level]
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


def pin_other_generators(level: Level) -> None:
    """
    Put Python's and numpy's global generators where their next 300 numbers are at `level`.

    Both are Mersenne twisters, whose state is its next 624 outputs in disguise. The caller restores them.
    """
    word = _disguised(int(_UNIFORM[level] * 2**32))
    random.setstate((3, (*([word] * 624), 0), None))
    np.random.set_state(("MT19937", np.full(624, word, dtype=np.uint32), 0))


def _disguised(output: int) -> int:
    """Return the word of the state that the twister's tempering turns into `output`."""
    word = output
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    state = word
    for _ in range(5):
        state = word ^ ((state << 7) & 0x9D2C5680)
    word = state
    for _ in range(3):
        state = word ^ (state >> 11)
    return state & 0xFFFFFFFF
