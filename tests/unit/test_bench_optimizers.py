"""The bench of optimizers runs in all its parts, and its share of tokens is what it says."""

import pytest

from bench import _optimizers_tables, optimizers
from hf_effi.optim import optimizer_names


def test_every_optimizer_has_an_arm_with_as_many_learning_rates():
    assert set(optimizers.ARMS) == {"adamw", *(name for name in optimizer_names() if ":" not in name)}
    assert {len(arm.rates) for arm in optimizers.ARMS.values()} == {5}


def test_every_part_runs():
    rows = optimizers.main(["--smoke"])
    found = [row for row in rows if row["part"] == "summary"]
    assert [row["arm"] for row in found] == list(optimizers.ARMS)
    base = found[0]
    assert (base["tokens_share"], base["state_bytes_ratio"], base["loss_minus_adamw_by_seed"]) == (1.0, 1.0, [0.0])
    figures = {figure["name"] for figure in optimizers.figures(found)}
    assert "nadamw_tokens_ratio_to_adamw_loss" in figures and "soap_state_bytes_ratio" in figures
    assert not any("nan" in str(row["loss"]) for row in rows)
    result = {"rows": rows, "commit": "0" * 40, "command": "", "seeds": [0], "date": "", "machine": {}, "versions": {}}
    table = _optimizers_tables.table(("nadamw",), result)
    assert table.count("\n| ") >= 2


@pytest.mark.parametrize(
    ("own", "share"),
    [
        ({50: 2.0, 100: 1.0}, (0.5, "=")),  # as good at half the budget
        ({50: 1.5, 100: 1.0}, (0.5, "<")),  # better already at the smallest one
        ({50: 3.0, 100: 2.0}, (1.0, "=")),
        ({50: 3.5, 100: 3.0}, (2.0, "=")),
        ({50: 5.0, 100: 4.0}, (2.0, ">")),
        ({50: 4.0, 100: 1.0}, (0.707, "=")),  # half-way in the logarithm of the loss is half-way in that of the budget
        ({50: 3.0, 100: float("inf")}, (2.0, ">")),
    ],
)
def test_share_of_tokens_by_hand(own, share):
    assert optimizers.share_of_tokens(own, {50: 3.0, 100: 2.0}) == share


def test_the_decay_ends_at_zero():
    whole = [optimizers.multiplier(step, 40) for step in range(40)]
    assert whole[:4] == [0.25, 0.5, 0.75, 1.0] and whole[4] == 1.0 and whole[-1] == pytest.approx(1 / 36)
