"""The bench of RL without labels runs on a tiny policy; its controls and figures are what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import label_free
from hf_effi.demo.task import held_out_problems
from tests.helpers.grpo import _measured_once


def test_the_quick_run_writes_a_whole_result(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with _measured_once():
        path = label_free.main(["--quick", "--cache", str(tmp_path)])
    torch.set_num_threads(threads)
    assert path == tmp_path / "results" / "label_free.json"
    result = json.loads(path.read_text())
    arms = {(row["part"], row["arm"]): row for row in result["rows"]}
    for arm in (label_free.LABELS, label_free.VOTE, label_free.RANDOM_VOTE, label_free.OTHER):
        row = arms["vote", arm]
        assert len(row["entropy"]) == 4 and 0 <= row["held_out_sampled"] <= 1 and row["cpu_seconds"]["generation"] > 0
    assert len(arms["vote", label_free.VOTE]["votes"]["majority_ratio"]) == 4
    for k in label_free.FEW:  # an untrained policy: too few prompts moved, which is said
        row = arms["few", f"{k} of high variance"]
        assert "accuracy of" in row["missing"] if "missing" in row else len(row["rows"]) == k
    assert len(arms["few", "1 at random"]["rows"]) == 1
    assert len(arms["best", label_free.ENTROPIC]["best_curve"]) == 2
    assert {"majority_vote_minus_labels", "entropic_best_minus_mean_baseline_best"} <= {
        figure["name"] for figure in result["headline"]
    }


def test_no_prompt_of_the_control_has_its_own_label_by_design() -> None:
    rows = label_free.training_rows(0, label_free.Size(prompts=16), held_out_problems(1))
    assert rows["other"] == rows["answer"][1:] + rows["answer"][:1] and len(set(rows["prompt"])) == 16
    assert label_free.other_label_reward(["=3", "=4"], [3, 3], answer=[4, 4]) == [1.0, 0.0]


def test_a_random_vote_is_the_answer_of_one_of_the_group() -> None:
    vote = label_free.RandomVote(0)
    found = vote(None, ["=1", "=1", "=2", "", "", ""], group_size=3)
    assert found in ([1.0, 1.0, 0.0, None, None, None], [0.0, 0.0, 1.0, None, None, None])
    labels = {tuple(vote(None, ["=1", "=2"], group_size=2)) for _ in range(20)}
    assert labels == {(1.0, 0.0), (0.0, 1.0)}


def test_matches_remember_the_best() -> None:
    matches = label_free.Matches("12+3")
    assert matches(["1", "12+3", "12+39", "x2"]) == [0.25, 1.0, 0.8, 0.25]
    assert matches([""]) == [0.0] and matches.curve == [1.0, 1.0]


def test_figures_are_means_over_the_seeds() -> None:
    def row(part: str, arm: str, **values: float) -> dict:
        return {"part": part, "arm": arm, **values}

    rows = [row("vote", label_free.LABELS, held_out_sampled=value) for value in (0.6, 0.8)]
    rows += [row("vote", label_free.VOTE, held_out_sampled=0.6), row("few", "4 of high variance", missing=1.0)]
    rows += [row("best", arm, best=value) for arm, value in ((label_free.MEAN, 0.5), (label_free.ENTROPIC, 0.4))]
    found = {figure["name"]: figure for figure in label_free.figures(0.4, rows)}
    assert found["labelled_accuracy_gain"]["value"] == pytest.approx(0.3)
    assert found["majority_vote_minus_labels"]["value"] == pytest.approx(-0.1)
    assert found["majority_vote_accuracy_gain"]["met"] and "4_prompts_accuracy_gain" not in found
    assert found["entropic_best_minus_mean_baseline_best"]["met"] is False


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        label_free.main(["--parts", "vote,all"])
    assert "unknown part all. Known: vote, few, best" in capsys.readouterr().err
