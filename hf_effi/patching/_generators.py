"""The random generators of a run that are not torch's operators: kept, put back, held at one value, and watched."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn

from ._walk import ATOMS, GENERATORS, holding, parts, plain_objects, shared_spaces

Level = Literal["low", "middle", "high"]
#: a uniform number at each level; never 0 itself, so that `draw <= 0.0` does not hold for a rate of zero
UNIFORM = {"low": 1e-6, "middle": 0.5, "high": 1 - 1e-6}
#: what the functions of the two modules draw from: they are methods of it, which their type stubs do not say
_PYTHONS, _NUMPYS = cast(Any, random.random).__self__, cast(Any, np.random.random).__self__


def accelerator_generators() -> Any:
    """Return the module of the accelerator's generators, where one is in use."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = getattr(torch, found.type, None) if found is not None else None
    if module is None or not getattr(module, "is_initialized", lambda: False)():
        return None
    return module if hasattr(module, "get_rng_state_all") else None


def global_states() -> tuple[Any, ...]:
    """Return the states of Python's, numpy's and torch's own generators, for [`restore_global_states`]."""
    devices = accelerator_generators()
    on_device = devices.get_rng_state_all() if devices else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices, on_device


def restore_global_states(states: tuple[Any, ...]) -> None:
    """Put back what [`global_states`] returned."""
    python, numpy, cpu, devices, on_device = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if devices:
        devices.set_rng_state_all(on_device)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave a block of code with Python's, numpy's and torch's own generators as they were before it."""
    states = global_states()
    try:
        yield
    finally:
        restore_global_states(states)


class OtherStates:
    """
    The states of Python's and numpy's own generators, which torch knows nothing of, at the moment this is made.

    Checkpointing puts torch's generators back before it computes a layer again, and leaves these two where they are.
    """

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OtherStates):
            return NotImplemented
        same = all(np.array_equal(a, b) for a, b in zip(self._numpy, other._numpy, strict=True))
        return same and self._python == other._python

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def owned_generators(model: nn.Module) -> dict[str, Any]:
    """
    Return the generators that modules hold, plain objects in them, their classes and the files of these, by name.
    """
    modules = dict(model.named_modules())
    spaces = {name: vars(module) for name, module in modules.items()}
    spaces |= {type(o).__name__: vars(o) for o in plain_objects(modules.values())} | shared_spaces(modules.values())
    found: dict[int, tuple[str, Any]] = {}
    for name, space in spaces.items():
        for key, value in holding(space):
            for part in parts(value) if not key.startswith("__") else ():
                if type(part) not in ATOMS and isinstance(part, GENERATORS):
                    found.setdefault(
                        id(part), (f"the generator {name}.{key}" if name else f"the generator {key}", part)
                    )
    return {name: part for name, part in found.values() if part not in (torch.default_generator, _PYTHONS, _NUMPYS)}


class KeptGenerator:
    """One generator that a module owns, with its state at the moment this is made."""

    def __init__(self, generator: Any) -> None:
        self.generator, self.state = generator, _state_of(generator)

    def restore(self) -> None:
        """Put the state back."""
        _set_state(self.generator, self.state)


def _state_of(generator: Any) -> Any:
    """Return the state: a tensor of torch's, a tuple of Python's, a dictionary of numpy's."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if hasattr(generator, "getstate"):
        return generator.getstate()
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.get_state(legacy=False)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        (getattr(generator, "setstate", None) or generator.set_state)(state)


class HeldGenerators:
    """
    Python's and numpy's generators, the global ones and those of a model's own, put where their next numbers are at a
    level.

    A Mersenne twister's state is its next 624 outputs in disguise, so that its next 300 numbers can be chosen. numpy's
    other bit generators can only be put at one state for each level. The caller restores them all.

    Args:
        model (`nn.Module`): What may hold generators ([`owned_generators`]). torch's are not touched here: its
            operators are pinned.
    """

    def __init__(self, model: nn.Module) -> None:
        own = owned_generators(model)
        self._generators = {"Python's random": random, "numpy.random": np.random}
        self._generators |= {name: g for name, g in own.items() if not isinstance(g, torch.Generator)}
        self._states: dict[str, Any] = {}

    def hold(self, level: Level) -> None:
        """Put all of them at a level."""
        for name, generator in self._generators.items():
            _set_state(generator, _held_state(_state_of(generator), level))
            self._states[name] = _state_of(generator)

    def moved(self) -> list[str]:
        """Return the names of those that were drawn from since they were held."""
        return [name for name, before in self._states.items() if not _same(before, _state_of(self._generators[name]))]

    def ran_out(self) -> list[str]:
        """Return the names of those that gave other numbers than those of the level: too many, or of another kind."""
        return [name for name in self.moved() if _are_new(_state_of(self._generators[name]), self._states[name])]


def _held_state(state: Any, level: Level) -> Any:
    """Return a state of the same kind at a level."""
    word = _disguised(int(UNIFORM[level] * 2**32))
    if isinstance(state, tuple):
        return 3, (*([word] * 624), 0), None
    if state["bit_generator"] == "MT19937":
        words = {"key": np.full(624, word, dtype=np.uint32), "pos": 0}
        return {**state, "state": words, **({"has_gauss": 0, "gauss": 0.0} if "gauss" in state else {})}
    return {**state, **getattr(np.random, state["bit_generator"])(list(UNIFORM).index(level)).state}


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        return all(_same(value, after[key]) for key, value in before.items())
    return bool(np.array_equal(before, after)) if isinstance(before, np.ndarray) else before == after


def _are_new(state: Any, held: Any) -> bool:
    """A twister that has used up its words has made new ones."""
    if isinstance(state, tuple):
        return state[1][:624] != held[1][:624]
    return state["bit_generator"] != "MT19937" or not _same(held["state"]["key"], state["state"]["key"])


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
