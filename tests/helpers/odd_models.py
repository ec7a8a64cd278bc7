"""Tiny models with one odd habit each, in state, chance or results, and a picture of all that a model consists of."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCABULARY = 16, 50
#: generators that no module holds
OF_FILE = random.Random(5)


class OddModel(nn.Module):
    """Embeds tokens and scores them again; what lies between is `middle`, and each token is on its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
            self.prepare()

    def prepare(self) -> None:
        """Make what the model has besides."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"logits": self.head(self.middle(self.embed(input_ids)))}


class Plain(OddModel):
    """No habit."""


# --- other results for another layout --------------------------------------------------------------------------------


class RunsOverPadding(OddModel):
    """A state that runs along the columns, padding or not."""

    def middle(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class SeesOtherRows(OddModel):
    def middle(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=(0, 1))


class ReturnsATuple(OddModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return None, self.head(self.embed(input_ids)), [1, 2]


class ReturnsText(OddModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return "no tensor"


class GivesZero(OddModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"logits": super().forward(input_ids)["logits"].detach() * 0}


class Raises(OddModel):
    """Changes itself in every way, and then fails."""

    def prepare(self) -> None:
        self.counts, self.seen = nn.BatchNorm1d(WIDTH), {"calls": [1]}

    def middle(self, x: Tensor) -> Tensor:
        self.counts(x.flatten(0, 1))
        self.seen["calls"].append(2)
        self.left = x
        self.eval()
        self.head.weight.requires_grad_(False)
        with torch.no_grad():
            self.head.weight.mul_(2)
        random.random(), np.random.rand(), torch.rand(3)
        raise KeyError("a model that fails half-way")


# --- chance ----------------------------------------------------------------------------------------------------------


class FunctionalDropout(OddModel):
    """A rate that is a float attribute, as in SeedOss and OPT."""

    rate = 0.1

    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate, self.training)


class NoDropout(FunctionalDropout):
    rate = 0.0


class SkipsLayers(OddModel):
    """Layers that Python's generator leaves out, as OPT's and BART's layerdrop."""

    rate = 0.2

    def prepare(self) -> None:
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and random.random() < self.rate):
                x = x + layer(x)
        return x


class SkipsNone(SkipsLayers):
    rate = 0.0


class NumpyNoise(OddModel):
    def middle(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(np.random.randn(*x.shape)).to(x) if self.training else x


class OwnPython(OddModel):
    def prepare(self) -> None:
        self.chance = random.Random(3)

    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + self.chance.random())


class OwnNumpyState(OwnPython):
    def prepare(self) -> None:
        self.chance = np.random.RandomState(3)

    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + self.chance.rand())


class OwnNumpyGenerator(OwnPython):
    """PCG64, whose numbers cannot be chosen."""

    def prepare(self) -> None:
        self.chance = np.random.default_rng(3)


class OwnInAList(OwnPython):
    def prepare(self) -> None:
        self.chances = [np.random.default_rng(3)]

    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + self.chances[0].random())


class OwnTorch(OddModel):
    """An operation without an outcome at either end, from a generator of the model's own."""

    def prepare(self) -> None:
        self.chance = torch.Generator().manual_seed(3)

    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + torch.multinomial(torch.ones(50), 1, generator=self.chance))


class DrawsFromItsFile(OddModel):
    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + OF_FILE.random())


class DrawsFromItsClass(OddModel):
    chance = random.Random(7)

    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + self.chance.random())


class FreshEntropy(OddModel):
    """Another number at each call, whatever any generator's state."""

    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + np.random.default_rng().random())


# --- state -----------------------------------------------------------------------------------------------------------


class CountsInBuffers(OddModel):
    """Batch norm writes its running statistics without telling autograd."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class WritesAnAttribute(OddModel):
    def prepare(self) -> None:
        self.total, self.calls = torch.zeros(3), 0

    def middle(self, x: Tensor) -> Tensor:
        self.total += 1
        self.calls += 1
        self.last = x.detach()
        return x


class NormalisesItsWeights(OddModel):
    """`max_norm` writes to the table of embeddings in every forward."""

    def prepare(self) -> None:
        self.embed = nn.Embedding(VOCABULARY, WIDTH, max_norm=1.0)


class ClipsItsWeights(OddModel):
    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.clamp_(-0.1, 0.1)
            self.head.bias[:3] = 0.25
        return x


class FreezesItself(OddModel):
    def middle(self, x: Tensor) -> Tensor:
        self.head.bias.requires_grad_(False)
        return x


class Counter:
    def __init__(self) -> None:
        self.calls, self.total, self.names = 0, torch.zeros(3), []


class CountsInAnObject(OddModel):
    def prepare(self) -> None:
        self.counter, self.deep, self.tensors = Counter(), {"a": {"b": [1]}}, [torch.zeros(3)]

    def middle(self, x: Tensor) -> Tensor:
        self.counter.calls += 1
        self.counter.total += 1
        self.counter.names.append("x")
        self.deep["a"]["b"].append(2)
        self.tensors[0] += 1
        return x


def _cosines(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32)[:, None].cos()


class CachesPositions(OddModel):
    """Made for the longest call so far, as in GPT-NeoX."""

    def prepare(self) -> None:
        self.longest = 0

    def middle(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            self.longest, self.table = x.shape[1], _cosines(x.shape[1])
        return x * self.table[: x.shape[1]]


class CachesInADict(OddModel):
    def prepare(self) -> None:
        self.tables = {}

    def middle(self, x: Tensor) -> Tensor:
        if x.shape[1] not in self.tables:
            self.tables[x.shape[1]] = _cosines(x.shape[1])
        return x * self.tables[x.shape[1]]


class CachesInItsClass(CachesInADict):
    """By the length alone: a table of a probe would stay, in the probe's dtype."""

    tables: dict[int, Tensor] = {}

    def prepare(self) -> None:
        pass


@functools.lru_cache
def remembered_cosines(length: int) -> Tensor:
    return _cosines(length)


class CachesInAFunction(OddModel):
    def middle(self, x: Tensor) -> Tensor:
        return x * remembered_cosines(x.shape[1])


# --- a picture -------------------------------------------------------------------------------------------------------


def picture(model: nn.Module) -> dict[str, Any]:
    """Return all that can be seen of a model and of the run's generators, by path: identities, flags and bits."""
    found = dict(_seen("model", model, set()))
    found["order of hooks"] = [
        (name, kind, list(hooks))
        for name, module in model.named_modules()
        for kind, hooks in vars(module).items()
        if kind.endswith("hooks")
    ]
    return found | generators()


def generators() -> dict[str, Any]:
    """Return the states of the run's generators."""
    return {
        "random": random.getstate(),
        "numpy": str(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "of the file": OF_FILE.getstate(),
    }


def bits(tensor: Tensor) -> bytes:
    """Return the bits of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _seen(path: str, value: Any, on_the_way: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        here = () if value.is_meta else (value.data_ptr(), bits(value))
        yield path, (id(value), value.dtype, tuple(value.shape), value.requires_grad, value.device.type, *here)
        if value.is_leaf and value.grad is not None:
            yield f"{path}.grad", (id(value.grad), bits(value.grad))
    elif isinstance(value, (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)):
        state = getattr(value, "getstate", None) or getattr(value, "get_state", None)
        yield path, (id(value), str(state() if state else value.bit_generator.state))
    elif value is None or isinstance(value, (bool, int, float, str, tuple, FunctionType, MethodType, type)):
        yield path, value if not isinstance(value, tuple) else [id(part) for part in value]
    elif isinstance(value, set) and not value:
        yield path, "an empty set"  # accelerate's hooks take a new one at each call
    else:
        yield path, id(value)
    if id(value) in on_the_way:
        return
    on_the_way = on_the_way | {id(value)}
    if isinstance(value, dict):
        yield f"{path} keys", list(value)
        for key, part in value.items():
            yield from _seen(f"{path}[{key!r}]", part, on_the_way)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _seen(f"{path}[{index}]", part, on_the_way)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, FunctionType, MethodType)):
        for key, part in vars(value).items():
            yield from _seen(f"{path}.{key}", part, on_the_way)
