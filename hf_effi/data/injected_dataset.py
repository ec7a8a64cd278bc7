"""A dataset in which a plan has put rows of its own in the place of others."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset

from .._files import save_json
from ..errors import RefusedError
from ..functional.data import check_count, find_rows
from .injection import InjectionPlan

#: columns of one value for each token, and what an injected token has there; `None` is its id
_COLUMNS = {"input_ids": None, "labels": None, "attention_mask": 1, "completion_mask": 1, "assistant_masks": 1}
#: file of the manifest
MANIFEST_FILE = "injection.json"


@dataclass(frozen=True)
class Place:
    """One injected row: of which experiment, which of its rows, and where it begins (`None`: it is the whole row)."""

    name: str
    row: int
    offset: int | None


class InjectedDataset(TorchDataset):
    """
    A dataset with some rows replaced by those of an [`InjectionPlan`]. Its length and all other rows are the same.

    A row has the number that it has in the dataset, whatever the order in which a sampler reads it, the number of
    processes and of workers. In each epoch each place is seen once.

    Args:
        base (`datasets.Dataset` or `Sequence`): Tokenized rows: dicts with `input_ids`, and of the columns `labels`,
            `attention_mask`, `completion_mask` and `assistant_masks` any.
        plan ([`InjectionPlan`]): The experiments.
        base_tokens (`int`, *optional*): Tokens of `base`, for the share of injected ones. Without, `base` is read once
            at the start, which also finds rows of the plan that stand in it already.

    Attributes:
        places (`dict[int, Place]`): Number of a replaced row -> what stands there.
        share (`float`): Injected tokens over those of `base`.

    Raises:
        RefusedError: a stream, which has no row numbers; a column whose value at an injected token is not known; a row
            of the plan, injected or twin, that `base` has by itself.
        ValueError: more tokens than `max_share` of the plan, two experiments in one place, or a row that is too short
            to be written over.

    Example:
    ```python
    rows = InjectedDataset(tokenized, plan)
    Trainer(model, args, train_dataset=rows, callbacks=[InjectionCallback(rows)]).train()
    SFTTrainer(model, args, train_dataset=rows.as_dataset(), callbacks=[InjectionCallback(rows)]).train()
    ```
    """

    def __init__(self, base: Any, plan: InjectionPlan, base_tokens: int | None = None) -> None:
        if not hasattr(base, "__len__") or not hasattr(base, "__getitem__"):
            raise RefusedError(
                f"{type(base).__name__} is a stream: its rows have no numbers, so that nobody could say where "
                "something was injected. Make a dataset of the part that is trained on, as by "
                "datasets.Dataset.from_generator(...)."
            )
        self.base, self.plan = base, plan
        if base_tokens is not None:
            check_count("base_tokens", base_tokens)
        self.places = {
            place: Place(name, turn % len(plan.injected(name)), self._offset(name, place, turn))
            for name, places in plan.places(len(base)).items()
            for turn, place in enumerate(places)
        }
        injected = sum(len(self.injected_row(place)) for place in self.places.values())
        tokens = self._read_base() if base_tokens is None else base_tokens
        self.share = injected / tokens if tokens else math.inf
        if self.share > plan.max_share:
            raise ValueError(
                f"the plan injects {injected} of {tokens} tokens, {self.share:.2%}, and max_share={plan.max_share} "
                f"allows {plan.max_share:.2%}. Inject fewer copies, or raise max_share."
            )

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not isinstance(index, int):
            raise TypeError(f"index={index!r} must be one row number. For columns and slices use as_dataset().")
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}.")
        index %= len(self)
        row = self.base[index]
        return row if index not in self.places else self._replaced(row, self.places[index])

    def injected_row(self, place: Place) -> tuple[int, ...]:
        """Return the token ids that are injected at a place."""
        return self.plan.injected(place.name)[place.row]

    def as_dataset(self) -> Any:
        """
        Return the same rows as a `datasets.Dataset`, for a trainer that maps or filters columns, such as `SFTTrainer`.

        Raises:
            RefusedError: `base` is none.
        """
        from datasets import Dataset, concatenate_datasets

        if not isinstance(self.base, Dataset):
            raise RefusedError(f"as_dataset() needs a datasets.Dataset as base, not {type(self.base).__name__}.")
        if not self.places:
            return self.base
        plain, order, numbers = self.base.with_format(None), list(range(len(self))), sorted(self.places)
        rows = [self._replaced(plain[number], self.places[number]) for number in numbers]
        for turn, number in enumerate(numbers):
            order[number] = len(self) + turn
        extra = Dataset.from_list(rows, features=self.base.features)
        return concatenate_datasets([plain, extra]).select(order)

    def manifest(self) -> dict[str, Any]:
        """Return all that is needed to say what was injected where, as JSON takes it."""
        return {
            "schema": 1,
            "seed": self.plan.seed,
            "rows": len(self),
            "share": self.share,
            "max_share": self.plan.max_share,
            "experiments": {
                name: {
                    "positions": self.plan.injections[name].positions,
                    "injected": [list(row) for row in self.plan.injected(name)],
                    "twins": [list(row) for row in self.plan.twins(name)],
                    "places": [
                        {"index": index, "row": place.row, "offset": place.offset}
                        for index, place in sorted(self.places.items())
                        if place.name == name
                    ],
                }
                for name in self.plan.active
            },
        }

    def save_manifest(self, folder: str | Path) -> Path:
        """Write [`manifest`] to `injection.json` in a folder, aside and renamed, and return where it is."""
        file = Path(folder) / MANIFEST_FILE
        save_json(file, self.manifest())
        return file

    # ---- helpers ----

    def _offset(self, name: str, index: int, turn: int) -> int | None:
        injection = self.plan.injections[name]
        if injection.positions == "row":
            return None
        injected = self.plan.injected(name)
        row, length = injected[turn % len(injected)], len(self.base[index]["input_ids"])
        if len(row) > length:
            raise ValueError(
                f"{name!r} writes {len(row)} tokens over row {index}, which has {length}. Choose other rows by at=, "
                'or pass positions="row".'
            )
        if injection.positions == "start":
            return 0
        return random.Random(f"{self.plan.seed} {name} {index} position").randrange(length - len(row) + 1)

    def _replaced(self, row: Mapping[str, Any], place: Place) -> dict[str, Any]:
        ids, changed = self.injected_row(place), {}
        for column, value in row.items():
            if column not in _COLUMNS:
                raise RefusedError(
                    f"column {column!r}: what it has to be at an injected token is not known. Keep these columns: "
                    f"{', '.join(_COLUMNS)}."
                )
            fill = _COLUMNS[column]
            new = list(ids) if fill is None else [fill] * len(ids)
            old = list(value.tolist() if isinstance(value, torch.Tensor) else value)
            if place.offset is not None:
                old[place.offset : place.offset + len(ids)] = new
                new = old
            changed[column] = torch.tensor(new, dtype=value.dtype) if isinstance(value, torch.Tensor) else new
        return changed

    def _read_base(self) -> int:
        names = [(name, row) for name, one in self.plan.injections.items() for row in one.rows]
        rows, tokens = [row for _, row in names], 0
        for index in range(len(self.base)):
            ids = torch.as_tensor(self.base[index]["input_ids"])
            tokens += ids.numel()
            for number, _, _ in find_rows(ids, rows):
                raise RefusedError(
                    f"row {index} of the dataset has a row of {names[number][0]!r} already: {rows[number]}. Make the "
                    "experiment of rows that no data has, or its counts and twins say nothing."
                )
        return tokens
