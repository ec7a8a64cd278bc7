"""
Each feature gives the untouched model's numbers on each class, or refuses by name.

A plain `pytest` runs the first sixteenth of the cells; `HF_EFFI_ZOO=i/16` runs another, `HF_EFFI_ZOO=all` all of them.
"""

from __future__ import annotations

import pytest

from tests.zoo.builders import KINDS, Family
from tests.zoo.features import FEATURES
from tests.zoo.ranks import SEQUENCE_PARALLEL, run_pair
from tests.zoo.run import everything, in_shard, jobs_on_ranks, read_shard, run_family

SHARD = read_shard()
#: rows of a class: the plain one and one more, all of them where the whole zoo is run
ROWS = 2 if SHARD[1] > 1 else None

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about settings that nobody uses like that


def _mine(kind: str) -> list[Family]:
    return [f for f in everything() if f.kind == kind and any(in_shard(f, feature.key, SHARD) for feature in FEATURES)]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_or_refused(kind):
    results = []
    for family in _mine(kind):

        def wanted(key: str, family: Family = family) -> bool:
            return in_shard(family, key, SHARD)

        results += run_family(family, wanted=wanted, count=ROWS)
    wrong = [f"{result}\n    {result.command}" for result in results if not result.outcome.ok]
    assert not wrong, f"{len(wrong)} cells are neither equal nor refused by name:\n" + "\n".join(wrong)
    assert sum(result.outcome.status == "equal" for result in results) > len(results) // 4


def test_sequence_parallelism_is_equal_or_refused():
    mine = [family for family in everything() if in_shard(family, SEQUENCE_PARALLEL.key, SHARD)]
    found = jobs_on_ranks(mine, 2)[:12]
    jobs = [(family.kind, family.name, family.model_type, row) for family, row in found]
    wrong = [f"{job}: {outcome}" for job, outcome in zip(jobs, run_pair(jobs), strict=True) if not outcome.ok]
    assert not wrong, "\n".join(wrong)
