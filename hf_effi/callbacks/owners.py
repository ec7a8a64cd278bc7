"""
Who decides: for what only one part of a run may decide, the first one claims it and the second one is refused by name.

A callback does not see the others. What all of one run do share is the `TrainerState` that every event hands over: one
object from the building of a Trainer on, and a new one for each `train()`. Claims belong to it, and go with it:
nothing has to be released, after a run that failed either, and an object may be used in another trainer or train
again.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError


@dataclass(frozen=True)
class Role:
    """
    Something that one part of a run decides.

    Args:
        key (`Hashable`): What tells it from other roles.
        problem (`str`): What two of them would do, such as `"Two schedules want to set the LR"`.
        fix (`str`): What to do about it.
    """

    key: Hashable
    problem: str
    fix: str


Moment = Literal["built", "train"]
#: attribute of a TrainerState: (moment, key of a role) -> (owner, its name). It is no field, so no checkpoint has it.
_CLAIMS = "_hf_effi_claims"


def claim(state: TrainerState, role: Role, owner: Any, name: str | None = None, at: Moment = "train") -> None:
    """
    Take a role for the run that `state` belongs to.

    Args:
        state (`TrainerState`): The run's.
        role ([`Role`]): What is claimed.
        owner: The object that decides.
        name (`str`, *optional*): What a message calls it; its class without.
        at (`str`, *optional*, defaults to `"train"`): `"built"` when the Trainer is built, so that a conflict is known
            before any work; `"train"` when training begins, which also sees what was added in between. Once each.

    Raises:
        RefusedError: the run has an owner of this role already.
        ValueError: it is the same one, twice in the list.
    """
    name, claims = name or type(owner).__name__, _claims(state)
    held, by = claims.get((at, role.key), (None, ""))
    if held is owner:
        raise ValueError(f"{name} is in the list of callbacks twice, and would act twice. Pass it once.")
    if held is not None:
        raise RefusedError(f"{role.problem}: {by} and {name}. {role.fix}")
    claims[at, role.key] = (owner, name)


def owner_of(state: TrainerState, role: Role) -> Any | None:
    """Return the object that has claimed the role for the training that runs, or `None`."""
    return _claims(state).get(("train", role.key), (None, ""))[0]


def _claims(state: TrainerState) -> dict[Hashable, tuple[Any, str]]:
    return state.__dict__.setdefault(_CLAIMS, {})


class OwningCallback(TrainerCallback):
    """
    A callback of which a run can have one. It claims its role when the Trainer is built and when training begins;
    whoever overrides these events calls `super()` first.
    """

    role: ClassVar[Role]
    #: what a message calls it; its class without
    name: ClassVar[str | None] = None
    #: whether a recipe names it: not what only observes or publishes, nor what an argument of the config made
    in_recipe: ClassVar[bool] = True

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        claim(state, self.role, self, self.name, at="built")
        super().on_init_end(args, state, control, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        claim(state, self.role, self, self.name)
        super().on_train_begin(args, state, control, **kwargs)
