"""
How a spec names a schedule: ours by an explicit table, a user's own by its import path. A spec never imports a module.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..class_paths import class_path, same_class_path

if TYPE_CHECKING:
    from .base import Schedule

#: name in specs, configs and cards -> module of this folder; no class of a user can take one of these names
BUILT_IN = {
    "constant": "closed_forms",
    "cosine": "closed_forms",
    "cosine_power": "closed_forms",
    "damped_cosine": "closed_forms",
    "infinite": "continual",
    "inverse_sqrt": "closed_forms",
    "join": "compose",
    "linear": "closed_forms",
    "one_cycle": "cyclic",
    "power": "continual",
    "rewarm_redecay": "continual",
    "rex": "closed_forms",
    "scale": "compose",
    "slow_start_fast_decay": "cyclic",
    "table": "cyclic",
    "token_indexed": "compose",
    "triangular": "cyclic",
    "uba": "closed_forms",
    "wsd": "stable_decay",
    "wsd_s": "stable_decay",
    "wsdc": "stable_decay",
}


def built_in(name: str) -> type[Schedule] | None:
    """Return the schedule of this package with that name, or `None`."""
    if name not in BUILT_IN:
        return None
    return getattr(importlib.import_module(f".{BUILT_IN[name]}", __package__), name)


def kind_of(cls: type[Schedule]) -> str:
    """Return what a spec calls the class: `"cosine"` for ours, `"my_module:MySchedule"` for a user's own."""
    return cls.__name__ if built_in(cls.__name__) is cls else class_path(cls)


def class_of(kind: object, base: type[Schedule], prefer: Sequence[type[Schedule]], own: bool) -> type[Schedule]:
    """
    Return the class that a spec names.

    Args:
        kind: What the spec says.
        base (`type`): `Schedule`, whose subclasses are searched for a user's own class.
        prefer (`Sequence[type]`): Classes to look at first, where several have one path.
        own (`bool`): Whether the spec may name a user's own class. It has to exist already; nothing is imported.

    Raises:
        ValueError: nothing, or more than one class, has that name; or it is a user's own and `own` is `False`.
    """
    name = str(kind)
    if found := built_in(name):
        return found
    # The preferred classes first. The bare name is how checkpoints of earlier versions call a user's class.
    for classes in (prefer, tuple(_subclasses(base))) if own else ():
        matching = {cls for cls in classes if name == cls.__name__ or same_class_path(name, class_path(cls))}
        if len(matching) > 1:
            paths = ", ".join(sorted(class_path(cls) for cls in matching))
            raise ValueError(
                f"kind={kind!r} is the name of {len(matching)} schedule classes of yours: {paths}. Give each a name "
                "of its own, or train with the one that is meant."
            )
        if matching:
            return matching.pop()
    near = difflib.get_close_matches(name[:80], BUILT_IN, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    fix = (
        "If it is a class of your own, import its module before training: a checkpoint never does."
        if own
        else "A schedule of your own goes as an object into LRScheduleCallback: a config or card names only these."
    )
    raise ValueError(f"kind={repr(kind)[:80]} is not a schedule. Known: {', '.join(sorted(BUILT_IN))}.{hint} {fix}")


def _subclasses(base: type[Schedule]) -> Iterator[type[Schedule]]:
    """Yield the classes of users that are defined now, in the order of their definition."""
    for cls in base.__subclasses__():
        if not cls.__module__.startswith(f"{__package__}."):
            yield cls
        yield from _subclasses(cls)
