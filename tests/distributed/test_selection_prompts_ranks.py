"""Two gloo ranks draw the same rows, learn the same, and do what one rank does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from hf_effi.selection import Screening
from tests.helpers import TableReward, run_distributed
from tests.training import test_selection_prompts as prompts

STEPS = 3
METHODS = [*prompts.MAKE, "screened"]


def rewards() -> TableReward:
    """Of one row of the dataset, whichever rank scores it."""
    return prompts.table(lambda row: (prompts.WRONG, prompts.HARD, prompts.HALF, prompts.RIGHT)[row % 4])


def plain(value: Any) -> Any:
    """Return a state as numbers and lists, which can be compared."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else getattr(value, "tolist", lambda: value)()


def everything(rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in METHODS:
        selector = prompts.MAKE.get(name, prompts.MAKE["MoPPS"])(explore=0.25)
        over: dict[str, Any] = {"per_device_train_batch_size": rows, "max_steps": STEPS}
        if name == "screened":
            over["screening"] = Screening(2)
        trainer, generations = prompts.train(Path(tempfile.mkdtemp()), selector, rewards(), **over)
        found[name] = {
            "rows": generations,
            "state": plain(selector.state_dict()),
            "metrics": selector.metrics(),
            "weights": [float(p.detach().double().sum()) for p in trainer.model.parameters()],
        }
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(everything, 2, 4)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return everything(8)


@pytest.mark.parametrize("name", METHODS)
def test_ranks_are_equal(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first == second and len(first["rows"]) == STEPS


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_choose_and_learn_what_one_does(ranks: list[dict[str, Any]], one: dict[str, Any], name: str) -> None:
    """Rewards come from a table, so that they do not depend on what is generated."""
    assert ranks[0][name]["rows"] == one[name]["rows"]
    assert ranks[0][name]["metrics"] == pytest.approx(one[name]["metrics"])
    assert ranks[0][name]["state"] == one[name]["state"]
