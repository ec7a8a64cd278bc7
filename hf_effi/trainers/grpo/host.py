"""What the objects of this room need of the trainer that they work for: nothing that TRL's own does not have."""

from __future__ import annotations

from typing import Any, Protocol


class Host(Protocol):
    """
    The attributes of [`~trl.GRPOTrainer`] that an object may read or, where a comment says so, write.

    A contract test compares them with those of a stock trainer, and with what the objects use.
    """

    #: written for the time of one call
    reward_funcs: list[Any]
    reward_func_names: list[str]
