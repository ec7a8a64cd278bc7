"""TTT-Discover: prompts that ask to improve earlier attempts at one problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RefusedError, RewardError
from ..functional.data import check_count
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards.texts import texts_of
from ..functional.rollouts import PUCTArchive

if TYPE_CHECKING:
    from ..protocols import RolloutGroups, SelectionContext

#: columns of a row beside its prompt
STATE, NUMBER = "state", "state_number"


class _StateRows:
    """The states of an archive as rows by number, which is what the trainer generates for."""

    def __init__(self, owner: DiscoverPrompts) -> None:
        self._owner = owner

    def __len__(self) -> int:
        """Return a bound of the row numbers that the next choice can give."""
        return self._owner.archive.next_id

    def __getitem__(self, number: int) -> dict[str, Any]:
        state = self._owner.state_of(number)
        return {"prompt": self._owner.render(state), STATE: state, NUMBER: number}


class DiscoverReward:
    """
    The reward function of [`DiscoverPrompts`]: the value of the state that a completion leads to.

    Args:
        owner ([`DiscoverPrompts`]): Takes the attempts.
    """

    def __init__(self, owner: DiscoverPrompts) -> None:
        self._owner = owner
        self.__name__ = "discover_reward"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """
        Return the value of each attempt, `None` where there is none.

        Raises:
            RewardError: rows that are no states, as those of an evaluation.
        """
        if STATE not in columns or NUMBER not in columns:
            raise RewardError(
                f"{self.__name__} scores attempts to improve a state, and these prompts come from no archive. Pass "
                "the DiscoverPrompts as prompt_selector=, and evaluate with another reward function."
            )
        rows = zip(columns[NUMBER], columns[STATE], texts_of(completions, self.__name__), strict=True)
        return [self._owner.attempt(number, state, text) for number, state, text in rows]


class DiscoverPrompts:
    """
    Search for the best solution of one problem: choose earlier attempts by PUCT and ask to improve them.

    A state is a text, such as a program. `render(state)` makes the prompt that asks for a better one, and
    `step(state, text)` what a completion leads to: `(new state, value)`. The value is the reward. What is good goes
    into a [`~hf_effi.functional.rollouts.PUCTArchive`], from which the prompts of the next generation come. Ranks
    score their own completions and share what came of them, so that all hold one archive; it is in each checkpoint.

    With [`EntropicAdvantages`] this is the recipe of
    [TTT-Discover](https://huggingface.co/papers/2601.16175): what counts is the best solution of the run, which is
    logged as `effi/select/best`, and not the mean. The trainer's own dataset is not read, but counts the steps: pass
    [`~DiscoverPrompts.placeholder`].

    Args:
        initial (`Mapping[str, float]`): States to begin with, and their values. While there are fewer states than a
            generation has prompts, prompts repeat.
        render (`Callable`): `render(state)` returns the prompt, a text or a list of messages.
        step (`Callable`): `step(state, text)`, with the text of a completion, returns the new state and its value,
            greater is better; `(None, value)` for an attempt that leads nowhere and is rewarded all the same, e.g.
            `(None, 0.0)`, and `(None, None)` for one without a reward. It must not depend on the process.
        c, children, capacity (*optional*): See [`~hf_effi.functional.rollouts.PUCTArchive`].

    Raises:
        TypeError, ValueError: a function that cannot be called, or an argument out of range.

    Example:
    ```python
    >>> discover = DiscoverPrompts({"": 0.0}, lambda state: f"Longer than {state!r}:", lambda s, t: (s + t, len(t)))
    >>> discover.reward(["?"] * 2, ["ab", "c"], state=["", ""], state_number=[0, 0])
    [2.0, 1.0]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        initial: Mapping[str, float],
        render: Callable[[str], Any],
        step: Callable[[str, str], tuple[str | None, float | None]],
        *,
        c: float = 1.0,
        children: int = 2,
        capacity: int = 1000,
    ) -> None:
        for name, value in (("render", render), ("step", step)):
            if not callable(value):
                raise TypeError(f"{name}={value!r} must be a function.")
        self.render, self.step = render, step
        self._arguments = {"c": c, "children": children, "capacity": capacity}
        self._initial = dict(initial) if isinstance(initial, Mapping) else initial
        #: reward function to pass to the trainer
        self.reward = DiscoverReward(self)
        self._begin()

    def _begin(self) -> None:
        self.archive = PUCTArchive(self._initial, **self._arguments)  # type: ignore[arg-type]
        self._attempts: list[tuple[int, str | None, float | None]] = []
        self._problem: str | None = None
        self._recent: dict[int, str] = {}
        self._generation: int | None = None
        self._metrics: dict[str, float] = {}

    # --- rows and rewards -------------------------------------------------------------------------------------------

    def placeholder(self, rows: int = 4096) -> Any:
        """
        Return a stream to pass as `train_dataset=`, whose rows nobody reads.

        Args:
            rows (`int`, *optional*, defaults to 4096): At least the prompts of one generation.
        """
        from datasets import Dataset

        prompt = self.render(next(iter(self._initial)))
        return Dataset.from_list([{"prompt": prompt}] * check_count("rows", rows)).to_iterable_dataset()

    def open_stream(self, dataset: Any) -> _StateRows:
        """
        Return the rows by number; the trainer reads what it generates for from here.

        Raises:
            RefusedError: a dataset of prompts, which would be taken for what is trained on.
        """
        if hasattr(dataset, "__len__"):
            raise RefusedError(
                f"DiscoverPrompts makes all prompts itself, and this dataset has {len(dataset)} rows that would never "
                "be read. Pass train_dataset=discover.placeholder()."
            )
        return _StateRows(self)

    def state_of(self, number: int) -> str:
        """
        Return a state by its number.

        Raises:
            IndexError: it has left the archive.
        """
        node = self.archive.nodes.get(number)
        if node is None and number not in self._recent:
            raise IndexError(f"state {number} is not in the archive any more.")
        return self._recent[number] if node is None else node.state

    def attempt(self, number: int, state: str, text: str) -> float | None:
        """Return the value of an attempt of this process, and remember it until [`observe`]."""
        new, value = None, None
        try:
            new, value = self.step(state, text)
            if value is not None and not math.isfinite(float(value)):
                raise ValueError(f"the value {value!r} is not finite")
            if new is not None and (not isinstance(new, str) or value is None):
                raise ValueError(f"a new state must be a text with a value, got {new!r} and {value!r}")
        except Exception as error:  # told to all processes, which would wait for one that raised alone
            self._problem = self._problem or f"{type(error).__name__}: {error}"
            new, value = None, None
        self._attempts.append((number, new, None if value is None else float(value)))
        return None if value is None else float(value)

    # --- what a trainer calls ---------------------------------------------------------------------------------------

    def attach(self, context: SelectionContext) -> None:
        """Begin with the initial states: a second trainer gets the archive as it was made."""
        self._begin()

    def select(self, count: int, *, exclude: frozenset[int] = frozenset()) -> list[int]:
        """
        Return the numbers of `count` states to improve, none of which descends from another while there are others.

        Args:
            count (`int`): Rows wanted, at least 0.
            exclude (`frozenset[int]`, *optional*): Rows that the step already has.
        """
        chosen = self.archive.pick(count, exclude)
        ranking = self.archive.ranking()
        # Where lines are used up, their other members; where there is no other state, the best ones again.
        chosen += [row for row in ranking if row not in exclude and row not in chosen][: count - len(chosen)]
        chosen = (chosen or ranking) * (count // max(1, len(chosen or ranking)) + 1)
        self._recent |= {row: self.archive.nodes[row].state for row in chosen}
        return chosen[:count]

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """
        Take what was tried on all processes into the archive. Every process must call it.

        Raises:
            RewardError: `step` failed on a process.
            ValueError: the reward function of these prompts was not among those of the trainer.
        """
        from accelerate.utils import gather_object

        everybodys = gather_object([(self._attempts, self._problem)])
        self._attempts, self._problem = [], None
        for rank, (_, problem) in enumerate(everybodys):
            if problem is not None:
                raise RewardError(f"DiscoverPrompts: step failed on process {rank}: {problem}.")
        attempts = [attempt for part, _ in everybodys for attempt in part]
        if len(attempts) != int(groups.sizes.sum()):
            raise ValueError(
                f"DiscoverPrompts was told of {len(attempts)} attempts at {int(groups.sizes.sum())} completions. Pass "
                "discover.reward once, among the reward functions of this trainer."
            )
        if groups.generation != self._generation:
            self._generation = groups.generation
            self._recent = {row: state for row, state in self._recent.items() if row in rows}
        expansions: dict[int, list[tuple[str, float]]] = {row: [] for row in rows}
        for number, new, value in attempts:
            if new is not None and value is not None:
                expansions[number].append((new, value))
        kept = self.archive.record(expansions)
        values = [value for _, _, value in attempts if value is not None]
        self._metrics = {
            "best": self.archive.best[1],
            "states": float(len(self.archive)),
            "new_states": float(len(kept)),
            "valid": sum(map(len, expansions.values())) / max(1, len(attempts)),
            "repeated": 1 - len(set(rows)) / max(1, len(rows)),
        }
        if values:
            self._metrics["best_of_generation"] = max(values)

    def metrics(self) -> dict[str, float]:
        """Return the numbers of the last [`observe`], which are logged as `effi/select/<name>`."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return self.archive.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: the archive began with another number of states.
        """
        self._begin()
        self.archive.load_state_dict(state)
