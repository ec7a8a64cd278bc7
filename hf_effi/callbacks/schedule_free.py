"""`ScheduleFreeCallback`: what a schedule-free optimizer leaves in checkpoints and in the model is its average."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional.kept_arguments import keeps_arguments
from ..optim.report import innermost
from ..optim.schedule_free import holds_average, is_schedule_free
from .owners import OwningCallback, Role


class ScheduleFreeCallback(OwningCallback):
    """
    Let each checkpoint, and the model at the end, hold the average `x` of a schedule-free optimizer.

    Such an optimizer takes gradients at `y = (1 - beta) z + beta x` and is judged at `x`. A Trainer moves to `x` for
    an evaluation and back for the next update, and saves whatever is there: `x` where it has just evaluated, `y`
    otherwise, and `y` at the end. This callback moves to `x` before a save and at the end. A run goes on from such a
    checkpoint as without it, since the optimizer's state says where it stands; the moves there and back cost one
    rounding.
    Paper: Defazio et al., The Road Less Scheduled (2405.15682).

    Raises:
        RefusedError: the optimizer of the run is not schedule-free.

    Example:
    ```python
    args = TrainingArguments("out", optim="schedule_free_adamw", lr_scheduler_type="constant")
    Trainer(model, args, train_dataset=rows, callbacks=[ScheduleFreeCallback()]).train()
    ```
    """

    role: ClassVar[Role] = Role(
        "schedule-free point", "Two callbacks say which point is saved", "Pass ScheduleFreeCallback once."
    )

    @keeps_arguments
    def __init__(self) -> None:
        super().__init__()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        optimizer = innermost(kwargs.get("optimizer"))
        if not is_schedule_free(optimizer):
            raise RefusedError(
                f"ScheduleFreeCallback is for an optimizer that keeps an average of its own, and "
                f"{type(optimizer).__name__} keeps none: what it saves is what it trains. Drop the callback, or set "
                "optim='schedule_free_adamw' or 'pytorch_optimizer:schedulefreeadamw'."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            _to_average(kwargs.get("optimizer"))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            _to_average(kwargs.get("optimizer"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The best model was loaded already, and is an average: the optimizer does not know, and would move it.
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            _to_average(kwargs.get("optimizer"))


def _to_average(optimizer: Any) -> None:
    if not holds_average(optimizer):
        innermost(optimizer).eval()
