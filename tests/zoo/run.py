"""What of the zoo is run, and its results as rows."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .builders import KINDS, CannotBuild, Family, build, families
from .cases import Case, describe
from .design import Row, axes_of, compatible, covering_design
from .features import FEATURES, Feature, Outcome, run

#: rows of the design that each class is tried with, the plain one among them
ROWS_PER_CLASS = 6


@dataclass(frozen=True)
class Result:
    """
    One feature on one class with one row of the design.

    Args:
        family ([`Family`]): The class.
        feature (`str`): Key of the feature; empty where the class could not be built.
        row (`dict[str, str]`): What was not plain is in it.
        outcome ([`Outcome`]): What came out.
        seconds (`float`): How long it took.
    """

    family: Family
    feature: str
    row: Row
    outcome: Outcome
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "class": self.family.name,
            "model_type": self.family.model_type,
            "kind": self.family.kind,
            "feature": self.feature,
            "settings": describe(self.row),
            "status": self.outcome.status,
            "note": self.outcome.note,
            "difference": self.outcome.difference,
        }


def number(text: str) -> int:
    """Return the same number for a text on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def rows_of(family: Family, count: int = ROWS_PER_CLASS) -> list[Row]:
    """
    Return the plain row and `count - 1` further ones of the class's design.

    Classes with the same axes take turns, so that all of them together see every row with every feature.

    Raises:
        CannotBuild: the class.
    """
    config = build(family).model.config
    design = covering_design(axes_of(config, family.kind), allowed=compatible)
    others = design[1:]
    start = number(f"{family.name}/{family.model_type}") % max(len(others), 1)
    return [design[0], *(others[(start + index * _STRIDE) % len(others)] for index in range(min(count - 1, len(others))))]


_STRIDE = 1


def run_family(family: Family, rows: Sequence[Row] | None = None, keys: Sequence[str] | None = None) -> Iterator[Result]:
    """Yield the results of one class: each feature with each row."""
    start = time.perf_counter()
    try:
        rows = rows_of(family) if rows is None else rows
    except CannotBuild as error:
        yield Result(family, "", {}, Outcome("not built", str(error)), time.perf_counter() - start)
        return
    for row in rows:
        cases: dict[Any, Case] = {}
        for feature in FEATURES:
            if family.kind not in feature.kinds or (keys is not None and feature.key not in keys):
                continue
            mine = {name: level for name, level in row.items() if name not in feature.without}
            place = feature.layers, feature.dtype, tuple(mine.items())
            if place in cases and row != rows[0] and mine == {n: rows[0][n] for n in mine}:
                continue
            case = cases.setdefault(place, Case(family, mine, feature.layers, feature.dtype))
            start = time.perf_counter()
            outcome = run(feature, case)
            yield Result(family, feature.key, mine, outcome, time.perf_counter() - start)


def shard(items: Sequence[Family], text: str | None = None) -> list[Family]:
    """
    Return the families of a shard.

    Args:
        items (`Sequence[Family]`): All.
        text (`str`, *optional*): `"all"`, or `"i/n"` with `i` from 0; by default the variable `HF_EFFI_ZOO`, or `DEFAULT`.
    """
    text = text or os.environ.get("HF_EFFI_ZOO") or DEFAULT
    if text == "all":
        return list(items)
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"HF_EFFI_ZOO={text!r} must be 'all' or 'i/n' with i from 0 to n - 1.")
    return [item for item in items if number(f"{item.name}/{item.model_type}") % int(count) == int(index)]


DEFAULT = "0/16"


def everything() -> list[Family]:
    """Return all classes of all kinds."""
    return [family for kind in KINDS for family in families(kind)]


def is_known(feature: Feature) -> bool:
    return feature in FEATURES
