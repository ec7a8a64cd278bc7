"""The bench of QK-Clip runs."""

from bench import qk_clip


def test_the_quick_run_comes_to_its_end_and_writes_nothing(capsys):
    qk_clip.main(["--quick"])
    said = capsys.readouterr().out
    assert "max_logit_without" in said and "cpu_time_ratio_every_10" in said and ".json" not in said
