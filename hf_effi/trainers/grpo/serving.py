"""Which rows of the dataset are generated for, and where they come from."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from ...functional.rollouts import GenerationLayout, ShuffledPrompts
from ...protocols import PromptSelector
from .host import Host
from .step_prompts import StepPrompts

#: the hidden column that carries the number of a row from the loader to the generation
NUMBER = "_effi_idx"


class NumberedRows(Dataset[dict[str, Any]]):
    """
    A map-style dataset whose rows say which they are.

    The number is that of the row, never a hash of its text: two rows may hold the same prompt.

    Args:
        dataset: Rows are mappings.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], NUMBER: int(index)}


def without_numbers(inputs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """
    Return rows without the hidden column, and what stood in it; -1 where there was none.

    Example:
    ```python
    >>> without_numbers([{"prompt": "1+1=", "_effi_idx": 7}, {"prompt": "1+2="}])
    ([{'prompt': '1+1='}, {'prompt': '1+2='}], [7, -1])
    ```
    """
    rows = [{name: value for name, value in row.items() if name != NUMBER} for row in inputs]
    return rows, [row.get(NUMBER, -1) for row in inputs]


class PromptServing:
    """
    Serves rows of the dataset to generate for, the same on every rank.

    Args:
        host ([`Host`]): The trainer, with its dataset.
        selector ([`~hf_effi.protocols.PromptSelector`], *optional*): Chooses them in place of the data loader.

    Attributes:
        prompts ([`~hf_effi.protocols.PromptSelector`], *optional*): Where further prompts come from: the selector, or
            the stream of refills once there was one.
    """

    def __init__(self, host: Host, selector: PromptSelector | None = None) -> None:
        self._host = host
        self.prompts = selector
        self._selector: Any = selector
        self._step_prompts: StepPrompts | None = None
        self._columns: dict[str, Any] = {}

    @functools.cached_property
    def rows(self) -> Any:
        """Rows by number: the training dataset, or the buffer of a stream."""
        dataset, opens = self._host.train_dataset, hasattr(self._selector, "open_stream")
        return self._selector.open_stream(dataset) if opens else dataset

    def begin_run(self) -> None:
        """Serve by number from now on."""
        self._step_prompts = StepPrompts(self.rows)

    def begin_step(self, inputs: Iterable[Mapping[str, Any]]) -> None:
        """Remember what the loader has served to this rank; forget the prompts of another optimizer step."""
        if self._step_prompts is not None:
            self._step_prompts.begin(self._host.state.global_step)
            self._step_prompts.note(inputs)

    def make_prompts(self) -> PromptSelector:
        """Return where further prompts come from; the stream of refills is made when it is first needed."""
        if self.prompts is None:
            self.prompts = ShuffledPrompts(len(self.rows), seed=self._host.args.seed + 1)
        return self.prompts

    def draw(self, count: int) -> list[int]:
        """Draw rows of the dataset whose prompts the step does not have yet."""
        step_prompts = cast(StepPrompts, self._step_prompts)  # whoever draws has begun with `begin_run`
        return step_prompts.draw(self.make_prompts(), count, gather_object)

    def of_loader(self, numbers: Sequence[int]) -> list[int]:
        """Return the rows of the groups that the loader serves to all ranks, from those of this rank's rows."""
        accelerator = self._host.accelerator
        everybodys = accelerator.gather(torch.tensor(numbers, dtype=torch.int64, device=accelerator.device))
        found: list[int] = everybodys.tolist()[:: self._host.num_generations]
        return found

    def rows_of_this_rank(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """
        Return this rank's slice of rows of the dataset.

        Args:
            numbers (`Sequence[int]`): Of all ranks, one for each completion.
        """
        layout = GenerationLayout.of(self._host.args)
        mine = layout.rows_of(self._host.accelerator.process_index, len(numbers))
        return [dict(self.rows[numbers[position]]) for position in mine]

    def values(self, column: str, rows: Sequence[int]) -> list[Any]:
        """
        Return the values of a column of the dataset.

        Raises:
            ValueError: there is no such column.
        """
        dataset = self.rows
        names = getattr(dataset, "column_names", None)
        if names is not None and column not in names:
            raise ValueError(f"train_dataset has no column {column!r}; its columns are {', '.join(map(str, names))}.")
        return [dataset[int(row)][column] for row in rows]
