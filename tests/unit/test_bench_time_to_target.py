"""The one rule by which `bench.grpo_selection` says when an arm has the baseline's accuracy, by hand values."""

from __future__ import annotations

import pytest

from bench._selection_figures import mean_curve, reached, resampled, rising, time_to_target, verdict


@pytest.mark.parametrize(
    ("values", "fit"),
    [
        ([0.2], [0.2]),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ([0.3, 0.2, 0.1], [0.2, 0.2, 0.2]),
        ([0.1, 0.5, 0.3, 0.6], [0.1, 0.4, 0.4, 0.6]),
        # the 0.2 pulls the lucky 0.8 down, and both pull the 0.6 before them
        ([0.1, 0.6, 0.8, 0.2, 0.7], [0.1, 1.6 / 3, 1.6 / 3, 1.6 / 3, 0.7]),
    ],
)
def test_the_rising_fit(values: list[float], fit: list[float]) -> None:
    assert rising(values) == pytest.approx(fit)


def test_the_rising_fit_is_the_nearest_one() -> None:
    """Beside every rising curve on a grid of 11 values."""
    values = [0.4, 0.1, 0.6, 0.3, 0.9]
    grid = [i / 10 for i in range(11)]
    curves = [[value] for value in grid]
    for _ in values[1:]:
        curves = [[*curve, value] for curve in curves for value in grid if value >= curve[-1]]

    def distance(curve: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(curve, values, strict=True))

    assert distance(rising(values)) <= min(map(distance, curves)) + 1e-12


@pytest.mark.parametrize(
    ("values", "target", "place"),
    [
        ([0.2, 0.4, 0.6, 0.8], 0.5, 15.0),
        ([0.2, 0.4, 0.6, 0.8], 0.6, 20.0),
        ([0.2, 0.4, 0.6, 0.8], 0.8, 30.0),
        ([0.2, 0.4, 0.6, 0.8], 0.81, None),
        ([0.2, 0.4, 0.6, 0.8], 0.2, 0.0),
        ([0.2, 0.4, 0.6, 0.8], 0.1, 0.0),
        # one lucky evaluation of 0.9 does not reach 0.7: the fit is 0.2, 0.6, 0.6, 0.8
        ([0.2, 0.9, 0.3, 0.8], 0.7, 25.0),
        # one unlucky evaluation of 0.3 does not undo it: the fit is 0.2, 0.7, 0.7, 0.9
        ([0.2, 1.1, 0.3, 0.9], 0.6, 8.0),
        # what falls for good has not been reached
        ([0.2, 0.9, 0.3, 0.3], 0.7, None),
    ],
)
def test_where_a_target_is_reached(values: list[float], target: float, place: float | None) -> None:
    assert time_to_target([0, 10, 20, 30], values, target) == (None if place is None else pytest.approx(place))


def test_one_evaluation_and_none() -> None:
    assert time_to_target([3.0], [0.5], 0.5) == 3.0
    assert time_to_target([3.0], [0.5], 0.6) is None
    with pytest.raises(ValueError, match="2 places and 1 values"):
        time_to_target([0, 1], [0.5], 0.5)
    with pytest.raises(ValueError, match="at least one"):
        time_to_target([], [], 0.5)


def test_the_end_of_a_curve_reaches_the_mean_of_its_last_points() -> None:
    """So that the baseline always reaches its own target."""
    values = [0.3, 0.5, 0.7, 0.65, 0.66]
    assert time_to_target(range(5), values, sum(values[-3:]) / 3) == pytest.approx(2.0)


def test_curves_at_the_same_seconds() -> None:
    curve = [
        {"cpu_seconds": 1.0, "rollouts": 0, "accuracy": 0.2},
        {"cpu_seconds": 3.0, "rollouts": 40, "accuracy": 0.6},
        {"cpu_seconds": 6.0, "rollouts": 70, "accuracy": 0.3},
    ]
    points = resampled(curve, [0.0, 2.0, 3.0, 4.0, 9.0])
    assert [point["cpu_seconds"] for point in points] == [0.0, 2.0, 3.0, 4.0, 9.0]
    assert [point["rollouts"] for point in points] == pytest.approx([0, 20, 40, 50, 70])
    assert [point["accuracy"] for point in points] == pytest.approx([0.2, 0.4, 0.6, 0.5, 0.3])
    other = [{**point, "accuracy": 0.0} for point in curve]
    assert [p["accuracy"] for p in mean_curve([curve, other], [1.0, 3.0])] == pytest.approx([0.1, 0.3])
    assert reached(points, "rollouts", 0.4) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.02, 0.021, 0.019], "better (interval)"),  # mean 0.02, half-width 4.303 * 0.001 / sqrt(3)
        ([0.001, 0.05, 0.01], "better (all seeds)"),
        ([-0.02, -0.021, -0.019], "worse (interval)"),
        ([-0.001, -0.05, -0.01], "worse (all seeds)"),
        ([-0.01, 0.02, 0.03], "not shown"),
        ([0.0, 0.0, 0.0], "not shown"),
        ([0.4], "not shown"),
        ([], "not shown"),
    ],
)
def test_what_paired_differences_say(differences: list[float], said: str) -> None:
    assert verdict(differences) == said
