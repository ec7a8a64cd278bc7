"""HIVE: what a selector chose from history is checked with the model as it is now."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import MismatchError
from ..functional.data import check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import nearest_to, token_entropy

if TYPE_CHECKING:
    from ..protocols import PromptSelector, RolloutGroups, SelectionContext


class HIVE:
    """
    Let a selector choose more prompts than are wanted, and keep those of which the policy is least sure how to begin.

    Of `ceil(count / keep)` rows of the selector, the `count` with the largest entropy of the token after the prompt
    are generated for ([2603.25184](https://huggingface.co/papers/2603.25184)): the history of a prompt is as old as
    its last rollouts, and one forward of the prompt is not.

    Args:
        selector ([`~hf_effi.protocols.PromptSelector`]): Chooses from history, e.g. `MoPPS` or `GRESO`.
        keep (`float`, *optional*, defaults to 0.5): Share of its choice that is generated for, in [0.01, 1]. The
            paper: 0.5.

    Raises:
        TypeError: no selector.
        ValueError: `keep` out of range.

    Example:
    ```python
    >>> from hf_effi.selection import ShuffledPrompts
    >>> HIVE(ShuffledPrompts(100)).keep
    0.5
    ```
    """

    @keeps_arguments
    def __init__(self, selector: PromptSelector, keep: float = 0.5) -> None:
        missing = [
            name
            for name in ("select", "observe", "state_dict", "load_state_dict")
            if not callable(getattr(selector, name, None))
        ]
        if missing:
            raise TypeError(
                f"selector={selector!r} has no {', '.join(missing)}: pass a prompt selector, e.g. MoPPS()."
            )
        self.selector, self.keep = selector, check_number("keep", keep, 0.01, 1)
        self._excludes = "exclude" in inspect.signature(selector.select).parameters
        self._context: SelectionContext | None = None
        self._metrics: dict[str, float] = {}

    def attach(self, context: SelectionContext) -> None:
        """Take the model, and give it to the selector, too."""
        self._context = context
        if callable(getattr(self.selector, "attach", None)):
            self.selector.attach(context)  # type: ignore[attr-defined]

    def select(self, count: int, exclude: Collection[int] = frozenset()) -> list[int]:
        """Return `count` row numbers in the selector's order. Every rank must call it."""
        if self._context is None:
            raise ValueError(
                "HIVE has no model to read prompts with: pass it to EffiGRPOTrainer(prompt_selector=...), or call "
                "attach(context) first."
            )
        wanted = max(count, min(math.ceil(count / self.keep), self._context.size - len(set(exclude))))
        if self._excludes:
            rows = self.selector.select(wanted, exclude=frozenset(exclude))  # type: ignore[call-arg]
        else:
            rows = self.selector.select(wanted)

        def read(logits: Tensor, ids: Tensor) -> Tensor:
            return token_entropy(logits)

        distinct = list(dict.fromkeys(rows))
        entropies = dict(
            zip(distinct, self._context.read_prompts(distinct, read, layer="next").flatten(), strict=True)
        )
        of_rows = [float(entropies[row]) for row in rows]
        # The largest are the nearest to what no entropy exceeds; ties go to the selector's own order.
        best = max((value for value in of_rows if math.isfinite(value)), default=0.0)
        kept = nearest_to(Tensor(of_rows), best, count).tolist()
        self._metrics = {
            "entropy_offered": sum(of_rows) / len(of_rows),
            "entropy_kept": sum(of_rows[place] for place in kept) / max(1, count),
        }
        return [rows[place] for place in kept]

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """Tell the selector what came of the rows that were kept."""
        self.selector.observe(rows, groups)

    def metrics(self) -> dict[str, float]:
        """Return the selector's, and the mean entropies of what it offered and of what was kept, in nats."""
        own = self.selector.metrics() if callable(getattr(self.selector, "metrics", None)) else {}  # type: ignore[attr-defined]
        return {**own, **self._metrics}

    def state_dict(self) -> dict[str, Any]:
        return {"selector": type(self.selector).__name__, "state": self.selector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: the state is of another selector.
        """
        if state.get("selector") != type(self.selector).__name__:
            raise MismatchError(
                f"the checkpoint's HIVE checks a {state.get('selector')}, this one a {type(self.selector).__name__}. "
                "Build it as in the run that is resumed, or start a new run from the checkpoint's weights."
            )
        self.selector.load_state_dict(state["state"])
