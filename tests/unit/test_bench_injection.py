"""The bench of several experiments in one run, a small part of it, and what it makes of its runs."""

from __future__ import annotations

from bench import injection


def test_a_quick_run_has_every_arm_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(injection, "QUICK", (160, 4, (0, 1)))
    found = injection.main(["--quick"])
    parts = {row["part"] for row in found["rows"]}
    assert parts == {"run", "agreement", "interaction"} and ".json" not in capsys.readouterr().out
    runs = [row for row in found["rows"] if row["part"] == "run"]
    assert len(runs) == 7 * 2
    assert runs[0]["seen"] == {"canary_1": 2, "canary_4": 8, "canary_16": 32, "fact": 16, "poison": 16}
    assert runs[0]["loss_gap"]["canary_16"] > runs[6]["loss_gap"]["canary_16"]  # that of all, and of none


def test_agreement_by_hand():
    values = {"all": (1.3, 2.1), "x": (1.1, 1.9), "none": (0.1, 0.1)}
    rows = [
        {"arm": arm, "seed": seed, "loss_gap": {"x": value}}
        for arm, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    found = injection.agreement(rows, "x", "loss_gap")
    assert (found["together"], found["alone"], found["together_minus_alone_by_seed"]) == (1.6, 1.4, [0.2, 0.2])
    assert found["seed_deviation"] == 0.5657 and found["distance_over_deviation"] == 0.354
    for row in rows:
        row["loss_gap"]["x"] = 0.0
    assert injection.agreement(rows, "x", "loss_gap")["distance_over_deviation"] == 0.0
