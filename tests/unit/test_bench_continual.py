"""The bench of tasks in sequence runs, and its figures follow from its rows."""

from __future__ import annotations

import json
from pathlib import Path

from bench import continual


def test_the_quick_run_writes_a_whole_result(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(continual, "ARMS", {name: continual.ARMS[name] for name in ("plain", "MIGU hard")})
    monkeypatch.setattr(continual, "RATES", {"full": (1e-3,), "lora": (3e-3,)})
    monkeypatch.setattr(continual, "HELD", 2)
    monkeypatch.setattr(continual, "figures", lambda rows: [])
    result = json.loads(continual.main(["--quick"], tmp_path).read_text())
    assert [row["part"] for row in result["rows"]].count("run") == 4
    assert {row["arm"] for row in result["rows"]} == {"plain", "MIGU hard"}


def test_each_arm_has_as_many_learning_rates() -> None:
    assert {len(continual.rates_of(arm, tuning)) for arm in continual.ARMS for tuning in continual.RATES} == {3}


def test_the_papers_mode_is_compared_with_each_control() -> None:
    losses = {"plain": 2.0, "small LR": 1.9, "MIGU gradient": 1.75, "MIGU hard": 1.0, "random mask": 1.5}
    rows = [
        {
            "part": "run",
            "arm": arm,
            "tuning": tuning,
            "average_final_loss": loss,
            "forgetting": loss - 1,
            "cpu_seconds_per_update": 0.1,
        }
        for tuning in continual.RATES
        for arm, loss in losses.items()
    ]
    found = {figure["name"]: (figure["value"], figure["met"]) for figure in continual.figures(rows)}
    assert found["full_migu_minus_plain_average_loss"] == (-0.25, True)
    assert found["full_migu_minus_small_lr_average_loss"] == (-0.15, True)
    assert found["lora_migu_minus_random_mask_average_loss"] == (0.25, False)
    assert found["lora_migu_over_plain_forgetting"] == (0.75, True)
    assert found["full_migu_over_plain_cpu_seconds"] == (1.0, True)
