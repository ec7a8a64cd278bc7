"""The bench of `plan grpo` runs in all its parts, and its figure is the largest of the errors that count."""

from bench import plan_grpo


def test_every_part_runs(monkeypatch):
    few = dict(list(plan_grpo.SETTINGS.items())[:1])
    monkeypatch.setattr(plan_grpo, "SETTINGS", few)
    rows = plan_grpo.main(["--smoke"])
    (judged,) = [row for row in rows if row["part"] == "setting"]
    assert set(judged["measured"]) == {"step", "gen", "reward", "logp", "train", "update"}
    assert judged["measured"]["gen"] > 0 and judged["predicted"]["train"] > 0
    found = {figure["name"]: figure["value"] for figure in plan_grpo.figures(rows)}
    assert found["plan_grpo_max_relative_error"] == max(judged["relative_error"].values())


def test_lengths_that_end_by_chance():
    lengths = plan_grpo.ends_by_chance(3)
    stay = 1 - 1 / plan_grpo.VOCABULARY
    assert lengths.values == (1, 2, 3) and abs(lengths.shares[2] - stay**2) < 1e-12
