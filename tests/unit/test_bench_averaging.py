"""The bench of averages along the run: every part in its smallest size, and figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from bench import averaging
from bench.averaging import SMOKE, Averages, Size, figures, loss_with


def test_smoke_runs_every_part_and_writes_nothing(capsys):
    rows = averaging.main(["--smoke"])
    arms = [row["arm"] for row in rows if row["part"] == "average"]
    assert arms == ["last", *averaging.ARMS, "1-sqrt decay"]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert [len(row["curve"]) for row in rows if row["part"] == "average"] == [3] * (len(arms) - 1) + [1]
    assert len({row["loss"] for row in rows}) == len(rows) - 1, "12 snapshots are the same for trend 40 and trend 60"
    walked = [row for row in rows if row["part"] == "fast forward"]
    assert [row["rate"] for row in walked] == list(SMOKE.adapter_rates)
    assert [step for step, _ in walked[0]["walks"]] == [2, 4, 6]
    assert "lawa_minus_last" in capsys.readouterr().out


def test_the_averages_are_of_the_updates_they_say():
    model = torch.nn.Linear(1, 1, bias=False)
    averages = Averages(every=2)
    for value in range(1, 13):
        torch.nn.init.constant_(model.weight, float(value))
        averages.note(model)
    means = {arm: average.mean["weight"].item() for arm, average in averages.of.items()}
    assert means["uniform 5"] == pytest.approx((4 + 6 + 8 + 10 + 12) / 5)
    assert means["trend 10"] == pytest.approx(12), "a line is followed without lag"
    assert means["ema 0.9"] == pytest.approx(
        sum(0.1 * 0.9 ** (12 - v) * v for v in range(1, 13)) / (1 - 0.9**12), rel=1e-5
    )


def test_the_weights_of_the_model_come_back():
    model = torch.nn.Linear(1, 1)
    own = model.weight.item()

    class Loss:
        def loss(self, model):
            return model.weight.item()

    assert loss_with(Loss(), model, {"weight": torch.tensor([[7.0]])}) == 7
    assert model.weight.item() == own


def test_figures_by_hand():
    losses = {"last": 2.0, "1-sqrt decay": 1.8, **dict.fromkeys(averaging.ARMS, 1.9), "uniform 60": 2.2}
    reached = {"uniform 10": 50, "trend 40": 100, "ema 0.98": None}
    size = Size(updates=100, adapter_rates=(1e-4, 1e-2))
    rows = [
        {
            "part": "average", "arm": arm, "rate": 1e-3, "seed": 0, "loss": loss,
            "updates_to_the_live_loss": reached.get(arm),
        }
        for arm, loss in losses.items()
    ]  # fmt: skip
    rows += [
        {"part": "fast forward", "rate": rate, "seed": 0, "loss": loss, "said_at": said}
        for rate, loss, said in ((1e-4, 3.0, 20), (1e-2, 2.5, None))
    ]
    found = {figure["name"]: (figure["value"], figure.get("met")) for figure in figures(rows, size)}
    assert found["lawa_minus_last"] == (-0.1, True) and found["lawa_minus_decay"][0] == 0.1
    assert found["lawa_updates_share_to_live_loss"] == (0.5, True)
    assert found["ema_updates_share_to_live_loss"] == (None, False)  # never reached is no share
    assert found["too_long_uniform_minus_too_long_trend"] == (0.3, True)
    assert found["fast_forward_names_the_low_rate"] == (1, True)
    assert found["fast_forward_names_the_good_rate"] == (0, True)
    assert found["low_rate_minus_good_rate"] == (0.5, True)
