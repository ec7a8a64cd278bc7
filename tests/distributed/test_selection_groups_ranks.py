"""Two gloo ranks make the same choices, and those of one: pruners, tokens, filters, allocators, in one launch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_effi.selection import (
    D3S,
    VIP,
    EmbeddingRates,
    Knapsack,
    LengthBand,
    MaxVariancePruner,
    RandomPruner,
    ReinforceAdvantages,
    SourceBands,
    ZeroVariance,
)
from tests.helpers import run_distributed
from tests.training import test_selection_seams as seams


def embeddings(context: Any) -> list[list[float]]:
    return [[float(level), 1.0] for level in context.column("level")]


METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "pods": lambda: {"rollout_pruner": MaxVariancePruner(2)},
    "random": lambda: {"rollout_pruner": RandomPruner(keep_fraction=0.5, scope="global")},
    "d3s": lambda: {"rollout_pruner": D3S((0.5, 1.0), 0.3, "global")},
    "filters": lambda: {
        "group_filters": [ZeroVariance(), SourceBands("level", {0: (0.1, 0.3)}, default=(0, 1)), LengthBand()],
        "difficulty_max_rounds": 3,
    },
    "reinforce": lambda: {"advantage_transform": ReinforceAdvantages(), "group_filters": [ZeroVariance()]},
    "vip": lambda: {
        "rollout_allocator": VIP(rates=EmbeddingRates(embeddings)),
        "rollout_pruner": MaxVariancePruner(2),
    },
    "knapsack": lambda: {"rollout_allocator": Knapsack(warmup_passes=0)},
}


def everything(rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in METHODS.items():
        listener = seams.Listener()
        over = {"per_device_train_batch_size": rows, "max_steps": 2, "callbacks": [listener], **make()}
        trainer = seams.train(Path(tempfile.mkdtemp()), **over)
        found[name] = {
            "rows": [told for told, _ in listener.told],
            "sizes": [groups.sizes.tolist() for _, groups in listener.told],
            "trained": [batch["advantages"].tolist() for batch in trainer.batches],
            "weights": [float(p.detach().double().sum()) for p in trainer.model.parameters()],
            "dropped": [
                {key: value for key, value in entry.items() if key.startswith("effi/dropped/")}
                for entry in trainer.state.log_history
            ],
            "shares": seams.metric(trainer, "effi/prune/token_share"),
        }
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(everything, 2, 4)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return everything(8)


@pytest.mark.parametrize("name", METHODS)
def test_ranks_agree(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    for what in ("rows", "sizes", "weights", "shares"):
        assert first[what] == second[what], what
    assert [len(a) for a in first["trained"]] == [len(a) for a in second["trained"]]


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_do_what_one_does(ranks: list[dict[str, Any]], one: dict[str, Any], name: str) -> None:
    """Rewards come from a table; lengths do not, so that only the first generation of a filter by length is alike."""
    both = [rank[name] for rank in ranks]
    steps = 0 if name == "filters" else 2
    for step in range(steps):
        assert both[0]["rows"][step] == one[name]["rows"][step] and both[0]["sizes"][step] == one[name]["sizes"][step]
        parts = [value for rank in both for value in rank["trained"][step]]
        assert sorted(parts) == pytest.approx(sorted(one[name]["trained"][step]), abs=1e-6)
    if steps:
        assert both[0]["dropped"][:2] == one[name]["dropped"][:2]
