"""The bench of scaling laws runs in all its parts; its guesses without a law are what they are called."""

import pytest

from bench import scaling


def test_every_part_runs():
    rows = scaling.main(["--smoke"])
    held = [row for row in rows if row["part"] == "held out"]
    assert len(held) == 3 and all(row["loss"] > 0 and row["relative_error"] >= 0 for row in held)
    assert {figure["name"] for figure in scaling.figures(rows)} >= {"scaling_heldout_relative_error"}


def test_a_line_in_log_size():
    assert scaling._line([(1.0, 0, 3.0), (10.0, 0, 2.0)], 100.0) == pytest.approx(1.0)
