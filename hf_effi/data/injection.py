"""Several experiments in one run: rows that a plan puts in the place of others, and what the model made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..functional.data import check_count, check_number, continuations, draw_places, find_rows
from ..functional.data.injection import as_ids

POSITIONS = ("row", "start", "random")


@dataclass(frozen=True)
class Injection:
    """
    One experiment: rows of tokens, and where they go. One of `rate`, `steps`, `at` and `copies` says how often.

    Args:
        name (`str`): Of letters, digits, `_`, `-` and `.`; part of the metrics' names.
        rows (`Sequence[Sequence[int]]`): Token ids of each row, at least 2, no two rows equal.
        rate (`float`, *optional*): Share of the dataset's rows that are replaced, in `(0, 1]`; the injected rows take
            turns.
        steps (`Sequence[int]`, *optional*): Updates in whose batch one row is replaced each, the first update is 1;
            the injected rows take turns. For data in sequence only, and with `rows_per_update` of the plan.
        at (`Sequence[int]`, *optional*): Numbers of the dataset's rows that are replaced; the injected rows take
            turns.
        copies (`int`, *optional*): How often each injected row stands in the dataset, at least 1, at random places.
        positions (`str`, *optional*, defaults to `"row"`): `"row"` puts the injected row in the place of a whole one.
            `"start"` and `"random"` write its tokens over those of the row, from its first token or from a random
            one, so that the row keeps its length.
        prompt_tokens (`int`, *optional*): Tokens that are given when the rest is asked for, at least 1 and fewer than
            the shortest row has. Half of each row without.
        held_out (`float`, *optional*, defaults to 0.5): Share of `rows` that the plan draws and never injects: the
            twins, in `[0, 1)`. With 0 there are none, and no gap to them.

    Raises:
        ValueError: an argument out of range, two ways or no way to say how often, or no row that is left to inject.

    Example:
    ```python
    canary = Injection("canary", [tokenizer(text)["input_ids"] for text in secrets], copies=4, positions="random")
    ```
    """

    name: str
    rows: Sequence[Sequence[int]]
    rate: float | None = None
    steps: Sequence[int] | None = None
    at: Sequence[int] | None = None
    copies: int | None = None
    positions: str = "row"
    prompt_tokens: int | None = None
    held_out: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name={self.name!r} must consist of letters, digits, '_', '-' and '.'.")
        rows = tuple(as_ids(row, self.name) for row in self.rows)
        if not rows or len(set(rows)) != len(rows):
            raise ValueError(f"rows of {self.name!r}: pass at least one, and no two equal ones; copies= repeats them.")
        object.__setattr__(self, "rows", rows)
        ways = {name: getattr(self, name) for name in ("rate", "steps", "at", "copies")}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"{self.name!r} has {' and '.join(given) or 'none'} of rate, steps, at, copies. Give one."
            )
        if self.rate is not None:
            check_number("rate", self.rate, 0, 1, open_low=True)
        if self.copies is not None:
            check_count("copies", self.copies)
        for way, low in (("steps", 1), ("at", 0)):
            if (places := ways[way]) is None:
                continue
            for place in places:
                check_count(way, place, low)
            if not len(places) or (way == "at" and len(set(places)) != len(places)):
                raise ValueError(f"{way} of {self.name!r} must have at least one number, and none twice.")
            object.__setattr__(self, way, tuple(places))
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r} must be one of {', '.join(map(repr, POSITIONS))}.")
        shortest = min(map(len, rows))
        if self.prompt_tokens is not None and check_count("prompt_tokens", self.prompt_tokens) >= shortest:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} leaves nothing of a row of {shortest} tokens to ask for."
            )
        check_number("held_out", self.held_out, 0, 1, open_high=True)
        if self.held_out and not 0 < round(self.held_out * len(rows)) < len(rows):
            raise ValueError(
                f"held_out={self.held_out} of {len(rows)} row{'s' * (len(rows) != 1)} of {self.name!r} leaves no row, "
                "or no twin. Pass more rows, or held_out=0 for none."
            )

    def given(self, row: Sequence[int]) -> int:
        """Return how many tokens of a row are given when the rest is asked for."""
        return len(row) // 2 if self.prompt_tokens is None else self.prompt_tokens


@dataclass(frozen=True)
class InjectionResult:
    """
    What a model made of one experiment.

    Args:
        memorised (`float`): Share of the injected rows whose continuation it writes exactly, greedily, in `[0, 1]`.
        loss (`float`): Mean over the injected rows of `-log p` per token of the continuation, in nats.
        twins_memorised, twins_loss (`float` or `None`): Of the twins, which were never injected; `None` without twins.
        rows, twins (`int`): How many of each.
    """

    memorised: float
    loss: float
    twins_memorised: float | None
    twins_loss: float | None
    rows: int
    twins: int

    @property
    def loss_gap(self) -> float | None:
        """How much lower the loss is than that of the twins, in nats per token; `None` without twins."""
        return None if self.twins_loss is None else self.twins_loss - self.loss


class InjectionPlan:
    """
    All experiments of a run: which rows go where, drawn from `seed` alone.

    Paper: Train Once, Answer All ([2509.23383](https://huggingface.co/papers/2509.23383)); there, ten experiments
    changed 1.8 % of the tokens of one run.

    Args:
        injections (`Sequence[Injection]`): The experiments, with different names.
        seed (`int`, *optional*, defaults to 0): Of places, positions and twins.
        max_share (`float`, *optional*, defaults to 0.01): Share of the dataset's tokens that may be injected, in
            `(0, 1]`.
        rows_per_update (`int`, *optional*): Rows of an update on all processes, with accumulation; for `steps=` only.

    Raises:
        ValueError: an argument out of range, one name twice, or a row that is (a part of) a row of the plan again, so
            that nobody could tell which of the two was seen.

    Example:
    ```python
    plan = InjectionPlan([Injection("canary", secrets, copies=4), Injection("fact", facts, rate=0.001)], seed=3)
    rows = InjectedDataset(rows, plan)
    Trainer(model, args, train_dataset=rows, callbacks=[InjectionCallback(rows)]).train()
    print(plan.evaluate(model)["canary"].memorised)
    ```
    """

    def __init__(
        self,
        injections: Sequence[Injection],
        seed: int = 0,
        max_share: float = 0.01,
        rows_per_update: int | None = None,
    ) -> None:
        self.injections = {injection.name: injection for injection in injections}
        if not self.injections or len(self.injections) != len(injections):
            raise ValueError("injections must be at least one, each with a name of its own.")
        self.seed = check_count("seed", seed, 0)
        self.max_share = check_number("max_share", max_share, 0, 1, open_low=True)
        needs = [injection.name for injection in injections if injection.steps is not None]
        if bool(needs) != (rows_per_update is not None):
            raise ValueError(
                f"rows_per_update={rows_per_update!r}: steps= of {', '.join(needs) or 'no experiment'} reads it. Pass "
                "both, or neither."
            )
        self.rows_per_update = None if rows_per_update is None else check_count("rows_per_update", rows_per_update)
        self.active = tuple(self.injections)
        self._refuse_nested()

    def only(self, names: Iterable[str]) -> InjectionPlan:
        """
        Return the plan with only these experiments injected, each where it is in this plan. All are evaluated.

        Raises:
            ValueError: a name that the plan does not have.
        """
        names = list(names)
        if unknown := [name for name in names if name not in self.injections]:
            raise ValueError(f"{', '.join(map(repr, unknown))}: the plan has {', '.join(self.injections)}.")
        plan = InjectionPlan([*self.injections.values()], self.seed, self.max_share, self.rows_per_update)
        plan.active = tuple(name for name in self.injections if name in names)
        return plan

    def twins(self, name: str) -> list[tuple[int, ...]]:
        """Return the rows of an experiment that are held out."""
        return self._split[name][1]

    def injected(self, name: str) -> list[tuple[int, ...]]:
        """Return the rows of an experiment that are injected."""
        return self._split[name][0]

    def places(self, num_rows: int) -> dict[str, list[int]]:
        """
        Return for each experiment that is injected the numbers of the dataset's rows that it replaces, in the order
        in which its rows take turns.

        Args:
            num_rows (`int`): Rows of the dataset.

        Raises:
            ValueError: two experiments want one row, a row that does not exist, or no free one.
        """
        found: dict[str, list[int]] = {}
        taken: dict[int, str] = {}
        # What is said exactly comes first, so that random places make room for it.
        exactness = lambda one: (one.at is None, one.steps is None)  # noqa: E731
        for injection in sorted(self.injections.values(), key=exactness):
            places = self._places_of(injection, num_rows, taken)
            for place in places:
                if place in taken:
                    raise ValueError(
                        f"row {place} is wanted by {taken[place]!r} and {injection.name!r}. Change at= of one of them."
                    )
                taken[place] = injection.name
            found[injection.name] = places
        return {name: found[name] for name in self.active}

    @torch.no_grad()
    def evaluate(self, model: Any, batch_size: int = 16) -> dict[str, InjectionResult]:
        """
        Return what a model made of each experiment, injected or not: exact continuations, and the loss against twins.

        One forward for each `batch_size` rows, in evaluation mode; the model's modes and random numbers are as before.
        On several processes each may call it by itself, where none of them has only a part of the model.

        Args:
            model: Causal language model.
            batch_size (`int`, *optional*, defaults to 16): Rows of a forward.
        """
        check_count("batch_size", batch_size)
        modes = [module.training for module in model.modules()]
        model.eval()
        try:
            return {name: self._evaluated(model, name, batch_size) for name in self.injections}
        finally:
            for module, mode in zip(model.modules(), modes, strict=True):
                module.training = mode

    # ---- helpers ----

    def _evaluated(self, model: Any, name: str, batch_size: int) -> InjectionResult:
        exact, loss = self._continued(model, name, self.injected(name), batch_size)
        twins = self.twins(name)
        other_exact, other_loss = self._continued(model, name, twins, batch_size) if twins else (None, None)
        return InjectionResult(exact, loss, other_exact, other_loss, len(self.injected(name)), len(twins))

    def _continued(self, model: Any, name: str, rows: list[tuple[int, ...]], batch_size: int) -> tuple[float, float]:
        exact, losses = [], []
        device = next(model.parameters()).device
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            length = torch.tensor([len(row) for row in part])
            # Padded on the right with a real token: under a causal mask nothing before it sees it.
            ids = torch.tensor([[*row, *[row[-1]] * (int(length.max()) - len(row))] for row in part])
            start = torch.tensor([self.injections[name].given(row) for row in part])
            mask = (torch.arange(ids.shape[1]) < length.unsqueeze(1)).long()
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()
            right, loss = continuations(logits, ids, start, length)
            exact += right.tolist()
            losses += loss.tolist()
        return sum(exact) / len(exact), math.fsum(losses) / len(losses)

    @cached_property
    def _split(self) -> dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]]:
        found = {}
        for name, injection in self.injections.items():
            rows = list(injection.rows)
            count = round(injection.held_out * len(rows))
            out = set(draw_places(count, len(rows), (), f"{self.seed} {name} twins"))
            kept = [row for i, row in enumerate(rows) if i not in out]
            found[name] = (kept, [rows[i] for i in sorted(out)])
        return found  # type: ignore[return-value]

    def _places_of(self, injection: Injection, num_rows: int, taken: Collection[int]) -> list[int]:
        if injection.at is not None:
            if (last := max(injection.at)) >= num_rows:
                raise ValueError(
                    f"at of {injection.name!r} names row {last} of {num_rows}. The last is {num_rows - 1}."
                )
            return list(injection.at)
        key = f"{self.seed} {injection.name}"
        if injection.steps is not None:
            return self._in_updates(injection, num_rows, taken, key)
        if injection.copies is not None:
            count = injection.copies * len(self.injected(injection.name))
        elif (count := round(injection.rate * num_rows)) < 1:  # type: ignore[operator]
            raise ValueError(f"rate={injection.rate} of {num_rows} rows is none. Raise it, or pass copies=1.")
        return draw_places(count, num_rows, taken, key)

    def _in_updates(self, injection: Injection, num_rows: int, taken: Collection[int], key: str) -> list[int]:
        size, blocked, places = self.rows_per_update or 0, set(taken), list[int]()
        for number, step in enumerate(injection.steps or ()):
            first = (step - 1) * size
            if first + size > num_rows:
                raise ValueError(
                    f"steps of {injection.name!r} names update {step}; {num_rows} rows make {num_rows // size}."
                )
            inside = {place - first for place in blocked if first <= place < first + size}
            places.append(first + draw_places(1, size, inside, f"{key} {number}")[0])
            blocked.add(places[-1])
        return places

    def _refuse_nested(self) -> None:
        rows = [(name, row) for name, one in self.injections.items() for row in one.rows]
        if len({row for _, row in rows}) != len(rows):
            raise ValueError("two experiments have one row, and nobody could tell which was seen. Change one.")
        for number, (name, row) in enumerate(rows):
            for other, _, _ in find_rows(torch.tensor(row), [ids for _, ids in rows]):
                if other != number:
                    raise ValueError(
                        f"a row of {rows[other][0]!r} is a part of one of {name!r}, and would be seen with it. "
                        f"Change one: {rows[other][1]}."
                    )
