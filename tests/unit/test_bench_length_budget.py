"""The bench of length budgets trains its arms on tiny sizes, and its figures follow from its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import length_budget as bench


def test_an_arm_is_trained_and_the_result_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One arm really, with all that an arm can have; `--quick` runs the others too."""
    rows: dict[str, dict[str, Any]] = {}
    run = bench.run

    def once(name: str, seed: int, *rest: Any) -> dict[str, Any]:
        if not rows:
            rows[""] = run(bench.CAPPED, seed, *rest)
        return {**rows[""], "arm": name}

    monkeypatch.setattr(bench, "run", once)
    result = json.loads(bench.main(["--quick"], tmp_path).read_text())
    assert {row["arm"] for row in result["rows"]} == {"before", *bench.arms(bench.Settings())}
    assert 0 < rows[""]["generation_cpu_seconds"] <= rows[""]["cpu_seconds"]


def test_the_penalty_that_is_compared_is_the_one_of_the_same_length() -> None:
    tokens = {"penalty 0.1": 20.0, "penalty 0.3": 11.0, "penalty 1.0": 3.0}
    same = {"greedy_accuracy": 0.5, "generation_cpu_seconds": 1.0}
    rows = [
        {"arm": arm, "seed": seed, "tokens": tokens.get(arm, 10.0), **same}
        for arm in bench.arms(bench.Settings())
        for seed in (0, 1)
    ]
    found = {figure["name"]: figure["value"] for figure in bench.figures(rows)}
    assert found["accuracy_gain: triangular gated over the nearest penalty (0.3)"] == 0.0
    assert found["generation_seconds_ratio: triangular gated, cap over triangular gated"] == 1.0
    assert bench.Settings().budget().at(10, 40) == 16 and bench.Settings().budget().at(39, 40) == 8
