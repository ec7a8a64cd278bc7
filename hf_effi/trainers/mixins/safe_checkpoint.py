"""`SafeCheckpointMixin`: crash-safe checkpoints by a field of the config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from ...checkpoint.safe import Mode, SafeCheckpointer, attached_to
from ...errors import RefusedError


@dataclass
class SafeCheckpointArguments:
    """
    Field that a config class gains.

    Args:
        safe_checkpoints (`str`, *optional*): `mode` of a [`SafeCheckpointer`]: `"sync"`, `"thread"` or `"process"`.
            Without it checkpoints are written as a stock Trainer writes them.

    Raises:
        ValueError: another value.
    """

    safe_checkpoints: str | None = field(
        default=None,
        metadata={
            "help": "Crash-safe checkpoints: 'sync' returns once a checkpoint is in place; 'thread' and 'process' "
            "write it while the training goes on. Without it checkpoints are those of a stock Trainer."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # of TrainingArguments
        if self.safe_checkpoints is not None and self.safe_checkpoints not in get_args(Mode):
            raise ValueError(
                f"safe_checkpoints={self.safe_checkpoints!r} is not one of {', '.join(map(repr, get_args(Mode)))}. "
                "Leave it out for the checkpoints of a stock Trainer."
            )


class SafeCheckpointMixin:
    """Attaches a [`SafeCheckpointer`] where `args.safe_checkpoints` is set. Put it before the Trainer class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mode = getattr(self.args, "safe_checkpoints", None)
        if mode is None:
            return
        if attached_to(self) is not None:
            raise RefusedError(
                f"safe_checkpoints={mode!r} and SafeCheckpointCallback want to save the checkpoints. Keep one."
            )
        SafeCheckpointer(mode).attach(self)
