"""`MultigridLRCallback`: the learning-rate rule of variable batch shapes."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..functional.data import Multigrid, check_number
from ..functional.kept_arguments import keeps_arguments
from ._lr_factors import LRFactorCallback
from .lr_schedule import check_scheduler
from .owners import Role, owner_of
from .probing import trained_steps, trained_total

#: who cuts the rows of a run
SEQUENCE_LENGTH = Role("sequence length", "Two objects want to set the sequence length", "Keep one.")


class MultigridLRCallback(LRFactorCallback):
    """
    Multiply the scheduled LR by `c^p` where a batch has `c` times as many rows of `L / c` tokens.

    The linear rule of the paper (`p = 1`) is for steps that see `c` times as many samples. Here a step keeps its
    tokens, so that no change (no callback) is the default for language models.

    Args:
        shapes ([`Multigrid`]): What the Trainer has as `sequence_length`.
        exponent (`float`, *optional*, defaults to 1.0): `p` in `[0, 1]`; 0.5 is the square-root rule.

    Raises:
        ValueError: another kind of object, `exponent` out of range, or a Trainer whose `sequence_length` is
            another.
        RefusedError: the scheduler is driven by a metric or owned by DeepSpeed.

    Example:
    ```python
    shapes = Multigrid(512)
    GrowingTrainer(model, args, train_dataset=rows, sequence_length=shapes, callbacks=[MultigridLRCallback(shapes)])
    ```
    """

    factor = "multigrid"

    @keeps_arguments
    def __init__(self, shapes: Multigrid, exponent: float = 1.0) -> None:
        if not isinstance(shapes, Multigrid):
            raise ValueError(f"shapes={shapes!r} must be the Multigrid that the Trainer has as sequence_length.")
        self.shapes, self.exponent = shapes, check_number("exponent", exponent, 0, 1)

    def multiplier(self, state: TrainerState, scheduler: LambdaLR) -> float:
        return self.shapes.divisor(trained_steps(state), trained_total(state)) ** self.exponent

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        check_scheduler(kwargs.get("lr_scheduler"), type(self).__name__)
        cutter = owner_of(state, SEQUENCE_LENGTH)
        if cutter != self.shapes:
            raise ValueError(
                f"MultigridLRCallback has {self.shapes!r}, but the Trainer has sequence_length={cutter!r}: the LR "
                "would follow shapes that the batches do not have. Use a Trainer with SequenceLengthMixin and pass "
                "one Multigrid to both."
            )
