"""What a row of the table says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["experimental", "stable", "rejected"]
Kind = Literal[
    "schedule", "callback", "rollout", "exact saving", "sampler", "recipe", "kernel", "parallel", "checkpoint"
]


@dataclass(frozen=True)
class Method:
    """
    One row of the table.

    Args:
        key (`str`): Short name, also the file name of the card `docs/methods/<key>.md` and the argument of
            `hf-effi describe <key>`.
        title (`str`): What people call it.
        kind (`str`): Where it acts.
        summary (`str`): One sentence: what it changes.
        entry_points (`tuple[str, ...]`): Dotted paths of the public objects, `module:attribute`.
        paper (`str`): Title of the source.
        paper_id (`str`): arXiv id, or `""` where there is no paper.
        status (`str`): `experimental`, then `stable` once our own bench confirms it; `rejected` has a card, a bench and
            its figures, and no entry point.
        tests (`tuple[str, ...]`): Test files that prove it: the pure function and the run through `trainer.train()`.
        bench (`str`): The script in `bench/` whose committed JSON carries its figures.
    """

    key: str
    title: str
    kind: Kind
    summary: str
    entry_points: tuple[str, ...]
    paper: str
    paper_id: str
    status: Status
    tests: tuple[str, ...]
    bench: str

    @property
    def card(self) -> str:
        """Path of the card, relative to the repository root."""
        return f"docs/methods/{self.key}.md"
