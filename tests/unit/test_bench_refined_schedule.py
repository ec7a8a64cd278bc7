"""The bench of the refined schedule: each part runs, at a size that says nothing."""

from bench import refined_schedule


def test_every_part_runs():
    figures = {figure["name"]: figure for figure in refined_schedule.main(["--quick"])}
    assert {"refined_minus_linear_6", "refined_minus_cosine_6", "share_of_seeds_better_than_linear_6"} < figures.keys()
    assert sum(name.startswith("recorder_update_ratio_") for name in figures) == 1
