"""The order in which callbacks of this package act on one event, whatever their order in the Trainer's list."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .owners import OwningCallback

#: turns: who reads what the optimizer did, who writes weights (or a log entry), who reads the result, who comes last
MEASURE, WRITE, READ, LAST = range(4)
_ATTRIBUTE = "_hf_effi_turns"


class _Turns:
    """Who is present in one `train()`, and who has had the current event."""

    def __init__(self) -> None:
        self.present: dict[int, tuple[TrainerCallback, int]] = {}
        self.running: set[tuple[int, str]] = set()
        self._tick: dict[str, tuple[Any, set[int]]] = {}

    def served(self, event: str, state: TrainerState) -> set[int]:
        """Return who has had this event; one log entry after the other counts as another event."""
        now = (state.global_step, len(state.log_history))
        if self._tick.get(event, (None,))[0] != now:
            self._tick[event] = (now, set())
        return self._tick[event][1]


def _turns_of(state: TrainerState) -> _Turns:
    # An attribute of the state of one `train()`: it is saved by fields, which leaves this out.
    if not hasattr(state, _ATTRIBUTE):
        setattr(state, _ATTRIBUTE, _Turns())
    return getattr(state, _ATTRIBUTE)


class TurnCallback(OwningCallback):
    """Says in each update that it is there; a callback that was taken out of the list no longer takes its turn."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        _turns_of(state).present[id(self)] = (self, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _turns_of(state).present[id(self)] = (self, state.global_step + 1)


def in_turn(turn: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """
    Decorate an event of a [`TurnCallback`]: whoever has an earlier turn has the event first.

    The Trainer calls its callbacks in the order of its list. The first of ours that is called calls those with an
    earlier turn, and their own call then does nothing.
    """

    def decorate(event: Callable[..., Any]) -> Callable[..., Any]:
        name = event.__name__
        ahead = int(name == "on_optimizer_step")

        @functools.wraps(event)
        def after_the_others(
            self: Any, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> Any:
            turns = _turns_of(state)
            if (id(self), name) in turns.running:  # `super()` of a subclass
                return event(self, args, state, control, **kwargs)
            served = turns.served(name, state)
            if id(self) in served:
                return None
            served.add(id(self))
            others = [
                other
                for other, seen in turns.present.values()
                if seen >= state.global_step + ahead and getattr(getattr(other, name), "turn", turn) < turn
            ]
            for other in sorted(others, key=lambda one: getattr(one, name).turn):
                getattr(other, name)(args, state, control, **kwargs)
            turns.running.add((id(self), name))
            try:
                return event(self, args, state, control, **kwargs)
            finally:
                turns.running.discard((id(self), name))

        after_the_others.turn = turn
        return after_the_others

    return decorate
