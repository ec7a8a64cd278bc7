"""What follows a length budget beside its reward: how long completions may get, and what prompts say."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.run_folder import calling_trainer
from ..errors import RefusedError
from ..functional import metrics
from ..functional.data import check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards import check_budget
from ..functional.rewards.length import Budget
from ._grpo import Moved, grpo_trainer, refuse_own_sampling, sampling_settings
from .owners import OwningCallback, Role


class GenerationCapCallback(OwningCallback):
    """
    Generate no more than a multiple of the length budget: `min(max_completion_length, floor(ratio * B(t)))` tokens.

    Under the triangular reward and `ratio=2` a longer completion earns nothing for its length, so that its tokens are
    wasted. The cap is set before each update from `global_step`, so that a resumed run has it from its first
    generation, and taken back after it: evaluations generate up to `max_completion_length`. It reaches `generate`,
    continuous batching and vLLM, beside a server and in the process. What the loss divides by under
    `loss_type="dr_grpo"` stays `max_completion_length`. Logs `effi/length/generation_cap`.

    A completion that reaches the cap has no end. With `mask_truncated_completions=True` it is not learned from, so
    that nothing tells the policy to become shorter; without, its rewards decide.

    Args:
        budget (`int` or a budget of `hf_effi.functional.rewards`): As in [`~hf_effi.rewards.LengthBudgetReward`].
        ratio (`float`, *optional*, defaults to 2.0): Tokens that may be generated for each token of the budget, >= 1.

    Raises:
        ValueError: a value out of its range.
        RefusedError: when training begins: no GRPO trainer; a cap that is never below `max_completion_length`;
            `rollout_func`, tools, environments or `rollout_reuse`, which count tokens themselves.

    Example:
    ```python
    budget = ExponentialBudget(256, 0.7, 150)
    GRPOTrainer(
        model, LengthBudgetReward(budget), args, prompts, callbacks=[GenerationCapCallback(budget)]
    ).train()
    ```
    """

    role = Role("generation cap", "Two callbacks want to say how much is generated", "Keep one.")

    @keeps_arguments
    def __init__(self, budget: Budget | int, ratio: float = 2.0) -> None:
        self.budget = check_budget(budget)
        self.ratio = check_number("ratio", ratio, 1)
        self._moved = Moved()
        self._trainer: Any = None

    def cap(self, step: int, total_steps: int, longest: int | None) -> int:
        """
        Return the most tokens that a completion may have.

        Args:
            step, total_steps (`int`): Updates done, and of the run.
            longest (`int`, *optional*): `max_completion_length`.
        """
        found = max(1, math.floor(self.ratio * self.budget.at(step, max(1, total_steps))))
        return found if longest is None else min(found, longest)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._moved.restore()  # of a run that failed
        trainer = self._trainer = grpo_trainer(args, state, type(self).__name__)
        super().on_train_begin(args, state, control, **kwargs)
        self._check(trainer)
        longest, last = self._longest(trainer), max(0, state.max_steps - 1)
        lowest = self.budget.at(last, max(1, state.max_steps))
        if longest is not None and self.ratio * lowest >= longest:
            raise RefusedError(
                f"GenerationCapCallback never acts: ratio={self.ratio} times the lowest budget of {lowest} tokens is "
                f"not below max_completion_length={longest}. Lower the ratio or the budget, or drop the callback."
            )

    def _check(self, trainer: Any) -> None:
        refuse_own_sampling(trainer, type(self).__name__, ("max_new_tokens", "max_tokens", "max_length"))
        counting = {
            "tools": trainer.tools,
            "environment_factory": trainer.environment_factories,
            "rollout_reuse": getattr(trainer, "rollout_reuse", None),
        }
        if found := [name for name, value in counting.items() if value]:
            raise RefusedError(
                f"GenerationCapCallback does not work with {found[0]}, which counts tokens of a completion by "
                "max_completion_length itself. Drop one of the two."
            )

    @staticmethod
    def _settings(trainer: Any) -> list[tuple[Any, str]]:
        return sampling_settings(trainer, "max_new_tokens", "max_completion_length")

    def _longest(self, trainer: Any) -> int | None:
        owner, name = self._settings(trainer)[0]
        longest: int | None = getattr(owner, name)
        return longest

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._moved.restore()
        found = self.cap(state.global_step, state.max_steps, self._longest(self._trainer))
        for owner, name in self._settings(self._trainer):
            self._moved.write(owner, name, found)
        self._trainer._metrics["train"][metrics.GENERATION_CAP].append(float(found))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._moved.restore()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._moved.restore()
        self._trainer = None


class BudgetPromptCallback(OwningCallback):
    """
    Let prompts name the current budget: a placeholder in their text is filled when completions are generated for them.

    Not when the loader reads them, which it does ahead. Rewards, logs and the table of completions see what the policy
    saw. It acts in evaluation too, with the budget of the finished updates.

    Args:
        budget (`int` or a budget of `hf_effi.functional.rewards`): As in [`~hf_effi.rewards.LengthBudgetReward`].
        placeholder (`str`, *optional*, defaults to `"{budget}"`): What is replaced by the number, wherever it stands
            in a prompt: a text, or the texts of its messages.

    Raises:
        ValueError: a value out of its range; when training begins, or in the first generation from a stream: no prompt
            has the placeholder.
        RefusedError: when training begins: no GRPO trainer.

    Example:
    ```python
    rows = Dataset.from_dict({"prompt": ["What is 6 * 7? Think for exactly {budget} tokens."]})
    GRPOTrainer(
        model, LengthBudgetReward(budget), args, rows, callbacks=[BudgetPromptCallback(budget)]
    ).train()
    ```
    """

    role = Role("budget in prompts", "Two callbacks want to write the budget into prompts", "Keep one.")

    @keeps_arguments
    def __init__(self, budget: Budget | int, placeholder: str = "{budget}") -> None:
        if not isinstance(placeholder, str) or not placeholder:
            raise ValueError(f"placeholder={placeholder!r} must be a text such as '{{budget}}'.")
        self.budget, self.placeholder = check_budget(budget), placeholder
        self._filled: weakref.WeakSet[Any] = weakref.WeakSet()
        self._found = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_init_end(args, state, control, **kwargs)
        trainer = calling_trainer(state)
        if hasattr(trainer, "_generate_and_score_completions"):  # for an evaluation before any training
            self._stand_before(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = grpo_trainer(args, state, type(self).__name__)
        super().on_train_begin(args, state, control, **kwargs)
        prompts = getattr(trainer.train_dataset, "column_names", None) and hasattr(trainer.train_dataset, "__len__")
        self._found = False
        if prompts and "prompt" in trainer.train_dataset.column_names:
            self._found = any(self._has(prompt) for prompt in trainer.train_dataset["prompt"])
            if not self._found:
                raise self._nothing("train_dataset")
        self._stand_before(trainer)

    def _stand_before(self, trainer: Any) -> None:
        if trainer in self._filled:
            return
        self._filled.add(trainer)
        alive = weakref.ref(trainer)

        def write(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            return self._written(alive(), rows)

        if hasattr(trainer, "row_writers"):  # an EffiGRPOTrainer, which also generates for rows of its own choice
            trainer.row_writers.append(write)
            return
        stock: Callable[[Any], Any] = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: stock(write(inputs))

    def _written(self, trainer: Any, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if self not in trainer.callback_handler.callbacks:
            return list(rows)
        budget = str(self.budget.at(trainer.state.global_step, max(1, trainer.state.max_steps)))
        if trainer.model.training and not self._found:
            self._found = any(self._has(row.get("prompt")) for row in rows)
            if not self._found:
                raise self._nothing("the first generation")
        return [
            {**row, "prompt": _replaced(row["prompt"], self.placeholder, budget)} if "prompt" in row else row
            for row in rows
        ]

    def _has(self, prompt: Any) -> bool:
        return any(self.placeholder in text for text in _texts(prompt))

    def _nothing(self, where: str) -> ValueError:
        return ValueError(
            f"BudgetPromptCallback: no prompt of {where} contains {self.placeholder!r}. Write it where the number of "
            "tokens shall stand, name another placeholder=, or drop the callback."
        )


def _texts(part: Any) -> Iterable[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        yield from _texts(part.get("content", part.get("text")))
    elif isinstance(part, Sequence):
        for inner in part:
            yield from _texts(inner)


def _replaced(part: Any, placeholder: str, text: str) -> Any:
    """Return a prompt, its messages or their parts with the placeholder replaced; nothing is changed in place."""
    if isinstance(part, str):
        return part.replace(placeholder, text)
    if isinstance(part, Mapping):
        names = [name for name in ("content", "text") if part.get(name) is not None]
        return {**part, **{name: _replaced(part[name], placeholder, text) for name in names}}
    if isinstance(part, (list, tuple)):
        return [_replaced(inner, placeholder, text) for inner in part]
    return part
