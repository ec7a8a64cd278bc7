"""Prompt Curriculum Learning: generate for the prompts whose predicted success rate is nearest to a target."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import torch

from ..errors import MismatchError
from ..functional.data import check_count, check_number, seeded
from ..functional.kept_arguments import keeps_arguments
from ..functional.options import refuse_idle
from ..functional.rollouts import (
    ShuffledPrompts,
    check_success_at,
    explained_variance,
    nearest_to,
    round_at_random,
    successes_of,
)
from ._values import HeadValue, ModelValue, Value

if TYPE_CHECKING:
    from ..protocols import RolloutGroups, SelectionContext

VALUES = ("head", "model")
#: bounds of what a card may ask for
_MOST_CANDIDATES, _MOST_STEPS = 64, 100


class PCL:
    """
    Of `candidates * count` prompts drawn uniformly, take the `count` whose predicted success rate is nearest to a
    target: `argmin_{|S| = m} sum_{x in S} |V(x) - target|`
    ([2510.01135](https://huggingface.co/papers/2510.01135)).

    `V` learns from what was generated, `sum_i (V(x_i) - p_i)^2` over the selected prompts, so that it is one
    generation behind the policy. Candidates come from passes over the dataset in random order, so that each row is one
    of them once in a pass. With `candidates=1` and `explore=0` the choice is that of
    [`~hf_effi.selection.ShuffledPrompts`].

    Args:
        size (`int`, *optional*): Rows of the training dataset. By default what the trainer says.
        target (`float`, *optional*, defaults to 0.5): Success rate wanted, in [0, 1]. The paper: 0.5.
        candidates (`int`, *optional*, defaults to 4): Prompts looked at for each that is wanted, in [1, 64]. The
            paper: 4.
        explore (`float`, *optional*, defaults to 0.1): Share of the prompts that is drawn uniformly, in [0, 1]; not in
            the paper.
        value (`str`, *optional*, defaults to `"head"`): `"head"` is a logistic head on the policy's last hidden state
            at the last prompt token, for one forward of the candidates' prompts without a gradient; `"model"` is a
            language model of its own.
        value_model (`nn.Module`, *optional*): For `value="model"`: a model of transformers, such as
            `AutoModel.from_pretrained(...)`, on the device where it shall work. It is trained.
        value_tokenizer (*optional*): Its tokenizer; without one it reads the policy's tokens.
        learning_rate (`float`, *optional*): Of AdamW on `V`, positive; defaults to 1e-3 for the head and 1e-5 for a
            model.
        value_steps (`int`, *optional*, defaults to 1): Steps of AdamW for each generation, in [1, 100].
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be 0
            or 1.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the candidates, at least 0.

    Raises:
        ValueError: an argument out of range, or one that another one leaves without use.

    Example:
    ```python
    >>> selector = PCL(target=0.5, candidates=4)
    >>> selector.value, selector.learning_rate
    ('head', 0.001)
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        size: int | None = None,
        *,
        target: float = 0.5,
        candidates: int = 4,
        explore: float = 0.1,
        value: str = "head",
        value_model: Any = None,
        value_tokenizer: Any = None,
        learning_rate: float | None = None,
        value_steps: int = 1,
        success_at: float | None = None,
        seed: int = 0,
    ) -> None:
        self._asked_size = self.size = None if size is None else check_count("size", size)
        self.target = check_number("target", target, 0, 1)
        self.candidates = check_count("candidates", candidates)
        self.explore = check_number("explore", explore, 0, 1)
        self.value_steps = check_count("value_steps", value_steps)
        for name, count, most in (
            ("candidates", candidates, _MOST_CANDIDATES),
            ("value_steps", value_steps, _MOST_STEPS),
        ):
            if count > most:
                raise ValueError(f"{name}={count} is above {most}, the most that is allowed.")
        if value not in VALUES:
            raise ValueError(f"value={value!r} is not known. Use one of {', '.join(map(repr, VALUES))}.")
        refuse_idle("value_model", value_model, None, value == "model", "with value='model'")
        refuse_idle("value_tokenizer", value_tokenizer, None, value == "model", "with value='model'")
        if value == "model" and not isinstance(value_model, torch.nn.Module):
            raise ValueError(
                f"value='model' needs value_model=, a language model of transformers, got {value_model!r}. Pass e.g. "
                "AutoModel.from_pretrained('Qwen/Qwen2.5-0.5B'), or use value='head'."
            )
        rate = {"head": 1e-3, "model": 1e-5}[value] if learning_rate is None else learning_rate
        self.learning_rate = check_number("learning_rate", rate, 0, open_low=True)
        check_success_at(success_at)
        self.value, self.success_at, self.seed = value, success_at, check_count("seed", seed, 0)
        self._value_model, self._value_tokenizer = value_model, value_tokenizer
        self._stream: ShuffledPrompts | None = None
        self._drawn = 0
        self._value: Value | None = None
        #: predictions of rows that were selected and not yet observed
        self._predicted: dict[int, float] = {}
        self._seconds = 0.0
        #: prompts that were drawn uniformly, and all, since the last generation
        self._uniform, self._all = 0, 0
        self._metrics: dict[str, float] = {}

    def attach(self, context: SelectionContext) -> None:
        """
        Take the model and the dataset of the run, and forget those of an earlier one.

        Raises:
            ValueError: the dataset has another size.
        """
        if self._asked_size not in (None, context.size):
            raise ValueError(
                f"PCL was made for {self._asked_size} rows, the training dataset has {context.size}. Leave out `size`."
            )
        self.size = context.size
        self._drawn = self._uniform = self._all = 0
        self._predicted.clear()
        self._stream = ShuffledPrompts(self.size, seed=self.seed)
        if self.value == "head":
            self._value = HeadValue(context, self.learning_rate, self.value_steps)
        else:
            self._value = ModelValue(
                context, self._value_model, self._value_tokenizer, self.learning_rate, self.value_steps
            )

    @property
    def _attached(self) -> Value:
        if self._value is None:
            raise ValueError(
                "PCL has no model to read prompts with: pass it to EffiGRPOTrainer(prompt_selector=...), or call "
                "attach(context) first."
            )
        return self._value

    def _candidates(self, count: int, exclude: Collection[int]) -> list[int]:
        """Draw up to `candidates * count` distinct rows; repeat some only where the dataset has too few."""
        stream = cast(ShuffledPrompts, self._stream)  # made with the value, which `select` asks for first
        wanted = min(self.candidates * count, stream.size - len(set(exclude)))
        known, found = set(exclude), list[int]()
        for _ in range(2 * stream.size):  # two passes hold every row, wherever the stream stands
            if len(found) >= wanted:
                break
            (row,) = stream.select(1)
            if row not in known:
                known.add(row)
                found.append(row)
        return found + stream.select(max(0, count - len(found)))

    def select(self, count: int, exclude: Collection[int] = frozenset()) -> list[int]:
        """Return `count` row numbers, in the order in which they were drawn. Every rank must call it."""
        began, value = time.perf_counter(), self._attached
        rows = self._candidates(count, exclude)
        predicted = value.predict(list(dict.fromkeys(rows)))
        by_row = dict(zip(dict.fromkeys(rows), predicted.tolist(), strict=True))
        generator = seeded(self.seed, self._drawn)
        uniform = round_at_random(self.explore * count, generator)
        # Candidates are uniform draws themselves. Those that are explored stand anywhere, so that what is cut off the
        # end of a selection, as surplus is, is not always of one kind.
        explored = torch.randperm(len(rows), generator=generator)[:uniform].tolist()
        others = sorted(set(range(len(rows))) - set(explored))
        rest = nearest_to(torch.tensor([by_row[rows[place]] for place in others]), self.target, count - uniform)
        chosen = [rows[place] for place in sorted(explored + [others[place] for place in rest.tolist()])]
        self._drawn += count
        self._uniform, self._all = self._uniform + uniform, self._all + count
        self._predicted |= {row: by_row[row] for row in chosen}
        self._seconds += time.perf_counter() - began
        return chosen

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """Teach `V` the success rates of these rows; groups that no reward function could score are left out."""
        successes, counts = successes_of(groups, self.success_at)
        rates = (successes / counts).tolist()  # NaN where nothing could be scored
        known = [
            (row, rate)
            for row, rate in zip(rows, rates, strict=True)
            if not math.isnan(rate) and row in self._predicted
        ]
        self._metrics = {"filter_seconds": self._seconds, "explored": self._uniform / max(1, self._all)}
        if known:
            observed = torch.tensor([rate for _, rate in known], dtype=torch.float64)
            predicted = torch.tensor([self._predicted[row] for row, _ in known], dtype=torch.float64)
            self._metrics["value_selected"] = float(predicted.mean())
            self._metrics["explained_variance"] = explained_variance(predicted, observed)
            self._attached.fit([row for row, _ in known], observed)
        self._attached.forget()
        self._predicted.clear()
        self._seconds, self._uniform, self._all = 0.0, 0, 0

    def forget_rows(self, rows: Collection[int]) -> None:
        """Take it that these rows are other prompts from now on; `V` judges prompts by what they say."""
        self._attached.reread()

    def metrics(self) -> dict[str, float]:
        """
        Return what was seen at the last generation: the mean prediction of the selected prompts, the share of the
        variance of their success rates that it explained, the share of prompts that was drawn uniformly, and the
        seconds spent choosing.
        """
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        weights = self._attached.state_dict()
        stream = cast(ShuffledPrompts, self._stream).state_dict()
        return {
            "size": self.size,
            "value": self.value,
            "stream": stream,
            "drawn": self._drawn,
            "weights": weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: the state is of another dataset or kind of value.
        """
        value = self._attached
        for name in ("size", "value"):
            if state.get(name) != getattr(self, name):
                raise MismatchError(
                    f"the checkpoint's PCL has {name}={state.get(name)!r}, this one {name}={getattr(self, name)!r}. "
                    "Build it as in the run that is resumed, or start a new run from the checkpoint's weights."
                )
        cast(ShuffledPrompts, self._stream).load_state_dict(state["stream"])
        self._drawn = state["drawn"]
        value.load_state_dict(state["weights"])
        self._predicted.clear()
