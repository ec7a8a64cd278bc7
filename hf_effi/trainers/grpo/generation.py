"""What stands around TRL's generation of one turn: each wraps the next, the first stands outermost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: TRL's `_generate_single_turn`: prompts as token ids, and more, to completions as token ids and their log-probs, or
#: `None` where the engine gives none.
Turn = Callable[..., tuple[list[list[int]], Any]]
#: Called with the next turn and with TRL's arguments.
Around = Callable[..., tuple[list[list[int]], Any]]


class TurnChain:
    """
    Calls what generates, from the outermost to TRL's own.

    Attributes:
        around (`list[Around]`): Each is called as `step(turn, prompt_ids, *args, **kwargs)`, with `turn` the rest of
            the chain, and returns what TRL's `_generate_single_turn` returns. One that lets completions be drawn from
            other weights than those that are trained says so with an attribute `changes_weights = True`.
    """

    def __init__(self) -> None:
        self.around: list[Around] = []

    def __call__(self, stock: Turn, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        turn = stock
        for step in reversed(self.around):
            turn = functools.partial(step, turn)
        return turn(prompt_ids, *args, **kwargs)
