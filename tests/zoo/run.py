"""What of the zoo is run, and its results."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .builders import KINDS, CannotBuild, Family, build, families
from .cases import Case, describe
from .design import Row, axes_of, compatible, covering_design
from .features import FEATURES, Outcome, run

#: rows of the design that each class is tried with, the plain one among them
ROWS_PER_CLASS = 3
#: parts of the zoo, of which a plain `pytest` runs the first
SHARDS = 16
VARIABLE = "HF_EFFI_ZOO"


@dataclass(frozen=True)
class Result:
    """
    One feature on one class with one row of the design.

    Args:
        family ([`Family`]): The class.
        feature (`str`): Key of the feature; empty where the class could not be built.
        row (`dict[str, str]`): The levels of the axes.
        outcome ([`Outcome`]): What came out.
        seconds (`float`): How long it took.
    """

    family: Family
    feature: str
    row: Row
    outcome: Outcome
    seconds: float = 0.0

    def __str__(self) -> str:
        outcome, where = self.outcome, f"{self.family.name} | {self.feature} | {describe(self.row)}"
        return f"{where} | {outcome.status} | {outcome.note} | {outcome.difference:.1e} | {self.seconds:.2f} s"

    @property
    def command(self) -> str:
        """What runs this alone."""
        levels = " ".join(f"'{name}={level}'" for name, level in self.row.items() if level not in ("none", "no"))
        return f"python -m tests.zoo {self.family.kind}/{self.family.model_type} '{self.feature}' {levels}"


def number(text: str) -> int:
    """Return the same number for a text on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def everything() -> list[Family]:
    """Return all classes of all kinds."""
    return [family for kind in KINDS for family in families(kind)]


def read_shard(text: str | None = None) -> tuple[int, int]:
    """
    Return `(i, n)`: part `i` of `n`; the whole zoo is `(0, 1)`.

    Args:
        text (`str`, *optional*): `"all"`, or `"i/n"` with `i` from 0; by default the variable `HF_EFFI_ZOO`, else
            `"0/16"`.
    """
    text = text or os.environ.get(VARIABLE) or f"0/{SHARDS}"
    if text == "all":
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"{VARIABLE}={text!r} must be 'all', or 'i/n' with i from 0 to n - 1.")
    return int(index), int(count)


def in_shard(family: Family, feature: str, shard: tuple[int, int]) -> bool:
    """Return whether a cell belongs to a shard; each cell belongs to one of the `n`."""
    index, count = shard
    return number(f"{family.kind}/{family.model_type}/{family.name}/{feature}") % count == index


# --- one class -----------------------------------------------------------------------------------------------------


def tiny_config(family: Family) -> PreTrainedConfig:
    """
    Return the config of a plain tiny model.

    Raises:
        CannotBuild: with the error of transformers.
    """
    try:
        return build(family).model.config
    except CannotBuild as error:
        if "does not support an attention" not in str(error):
            raise
        return build(family, attention="eager").model.config


def rows_of(family: Family, count: int = ROWS_PER_CLASS) -> list[Row]:
    """
    Return the plain row and `count - 1` further ones of the class's design.

    They are drawn by the class's name, so that all classes together see every row with every feature.
    """
    design = covering_design(axes_of(tiny_config(family), family.kind), allowed=compatible)
    others = design[1:]
    rng = random.Random(number(f"{family.kind}/{family.model_type}/{family.name}"))
    return [design[0], *rng.sample(others, min(count - 1, len(others)))]


def run_family(
    family: Family,
    rows: Sequence[Row] | None = None,
    wanted: Callable[[str], bool] = lambda key: True,
    count: int | None = None,
) -> Iterator[Result]:
    """
    Yield the results of one class: each feature with each row.

    Args:
        family ([`Family`]): The class.
        rows (`Sequence[dict]`, *optional*): Instead of those of its design.
        wanted (`Callable`, *optional*): Which features are run, by key.
        count (`int`, *optional*): Rows of its design.
    """
    features = [f for f in FEATURES if family.kind in f.kinds and wanted(f.key)]
    try:
        rows = rows_of(family, count or ROWS_PER_CLASS) if rows is None and features else rows
    except CannotBuild as error:
        yield Result(family, "", {}, Outcome("not built", str(error)))
        return
    done = set()
    for row in rows or ():
        cases: dict[Any, Case] = {}
        for feature in features:
            mine = {name: level for name, level in row.items() if name not in feature.without}
            if (feature.key, describe(mine)) in done:
                continue
            done.add((feature.key, describe(mine)))
            place = feature.layers, feature.dtype, describe(mine)
            case = cases.setdefault(place, Case(family, mine, feature.layers, feature.dtype))
            start = time.perf_counter()
            outcome = run(feature, case)
            yield Result(family, feature.key, mine, outcome, time.perf_counter() - start)


def jobs_on_ranks(items: Sequence[Family], count: int) -> list[tuple[Family, Row]]:
    """
    Return the class and row of each case of sequence parallelism: a third of the causal classes, with `count` rows
    each.
    """
    jobs = []
    for family in items:
        if family.kind == "causal" and number(family.name) % 3 == 0:
            try:
                jobs += [(family, row) for row in rows_of(family, count)]
            except CannotBuild:
                continue  # `run_family` lists it
    return jobs
