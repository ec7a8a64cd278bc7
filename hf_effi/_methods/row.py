"""What a row of the table says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: what our own bench says about a method, see [`Method`]
Status = Literal["experimental", "stable", "rejected"]
#: where a method acts
Kind = Literal[
    "schedule",
    "optimizer",
    "callback",
    "rollout",
    "reward",
    "exact saving",
    "sampler",
    "recipe",
    "kernel",
    "parallel",
    "checkpoint",
]
#: what a user wants, see `GOALS`
Goal = Literal[
    "cheaper RL",
    "rewards",
    "faster steps",
    "less memory",
    "longer sequences",
    "adapters",
    "schedule",
    "optimizer",
    "data order",
    "data choice",
    "objective",
    "continual",
    "safety",
    "insight",
]

#: goal of a user -> how the docs say it, in the order of their menu
GOALS: dict[Goal, str] = {
    "cheaper RL": "I want RL to cost less",
    "rewards": "Write a reward that holds, or learn without labels",
    "faster steps": "Make every step cheaper",
    "less memory": "Train with less memory",
    "longer sequences": "Fit longer sequences",
    "adapters": "Train adapters for less",
    "schedule": "A better learning-rate schedule",
    "optimizer": "An optimizer that fits, on the right parameters",
    "data order": "A better order of the data",
    "data choice": "Score, choose or make the data",
    "objective": "Learn more from the same text",
    "continual": "Continue pre-training without forgetting",
    "safety": "Lose nothing to a crash",
    "insight": "Know what happened in my run",
}


@dataclass(frozen=True)
class Method:
    """
    One row of the table.

    Args:
        key (`str`): Short name, also the file name of the card `docs/methods/<key>.md` and the argument of
            `hf-effi describe <key>`.
        title (`str`): What people call it.
        kind (`str`): Where it acts.
        goals (`tuple[str, ...]`): What a user wants who needs it, keys of `GOALS`. The menu of the docs has the card
            under the first; the page of all cards has it under each.
        summary (`str`): One sentence: what it changes.
        entry_points (`tuple[str, ...]`): Dotted paths of the public objects, `module:attribute`, that are this method:
            a run that was given one of them used it.
        doors (`tuple[str, ...]`): Public objects through which this method is reached, and others too.
        arguments (`tuple[str, ...]`): Fields of an Effi config that belong to it. The first one switches it on.
        off (`tuple`): Values of that field with which it is off.
        paper (`str`): Title of the source.
        paper_id (`str`): arXiv id, or `""` where there is no paper.
        status (`str`): `stable` when it is exact by contract and passes the zoo, or when a bench of ours confirms its
            claim on at least two tasks; both with three seeds. `rejected` has a card, a bench and its figures, and no
            entry point. `experimental` otherwise.
        tests (`tuple[str, ...]`): Test files that prove it: the pure function and the run through `trainer.train()`.
        bench (`str`): The script in `bench/` whose committed JSON carries its figures.
        authors (`str`): Of the paper, as BibTeX writes them: `"Hu, Shengding and others"`.
        exact (`str`): The test that holds loss and gradients against the untouched model's, `"file::function"`; `""`
            where there is none, or where they are meant to differ.
        zoo (`tuple[str, ...]`): Features of the model zoo that are this method (`tests/zoo/features.py`).
        tasks (`tuple[str, ...]`): Headline figures of the bench that confirm the claim, each on a task of its own.
    """

    key: str
    title: str
    kind: Kind
    goals: tuple[Goal, ...]
    summary: str
    entry_points: tuple[str, ...]
    paper: str
    paper_id: str
    status: Status
    tests: tuple[str, ...]
    bench: str
    authors: str = ""
    exact: str = ""
    zoo: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    doors: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    off: tuple[Any, ...] = (None,)

    @property
    def code(self) -> tuple[str, ...]:
        """Paths of everything that a user may type: entry points, then doors."""
        return self.entry_points + self.doors

    def is_on(self, args: Any) -> bool:
        """Return whether the arguments of a trainer switch the method on."""
        return bool(self.arguments) and getattr(args, self.arguments[0], None) not in self.off

    @property
    def card(self) -> str:
        """Path of the card, relative to the repository root."""
        return f"docs/methods/{self.key}.md"
