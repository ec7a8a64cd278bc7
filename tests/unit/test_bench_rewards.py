"""The bench of rewards runs on a tiny size, and its figures follow from its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import rewards
from hf_effi.functional.rewards import sentence_bleu


def one_by_one(references: list[list[int]], candidate: list[int], smoothing: str) -> float:
    """In place of NLTK, which need not be installed."""
    ids, others = torch.tensor([candidate], dtype=torch.long), rewards.padded(references).unsqueeze(0)
    return float(sentence_bleu(ids, others, 0, smoothing=smoothing))


def test_the_quick_run_writes_a_whole_result(tmp_path: Path):
    result = json.loads(rewards.main(["--quick", "--seeds", "2"], tmp_path, one_by_one).read_text())
    values = {figure["name"]: figure for figure in result["headline"]}
    assert {"bleu_speedup_over_nltk", "bleu_max_error_vs_nltk", "bleu_speedup_over_nltk_batch_2_length_8"} <= set(
        values
    )
    assert values["bleu_max_error_vs_nltk"]["met"] and values["bleu_max_error_vs_nltk"]["value"] < 1e-12
    assert [row["seed"] for row in result["rows"] if row["part"] == "bleu"] == [0, 1, 0, 1]


def test_the_headline_is_the_slowest_length_of_the_largest_batch():
    rows = [
        {"part": "bleu", "batch": batch, "length": length, "speedup": speedup}
        for batch, length, speedups in ((32, 64, (1, 1, 1)), (256, 64, (30, 12, 14)), (256, 256, (9, 11, 99)))
        for speedup in speedups
    ]
    slow = [{"part": "hostile", "milliseconds": taken} for taken in (3.0, 60.0)]
    values = {f["name"]: f for f in rewards.figures([*rows, {"part": "error", "largest_error": 2e-6}, *slow])}
    assert values["bleu_speedup_over_nltk"]["value"] == 11 and values["bleu_speedup_over_nltk"]["met"]
    assert values["json_hostile_milliseconds"]["value"] == 60.0 and not values["json_hostile_milliseconds"]["met"]
    assert not values["bleu_max_error_vs_nltk"]["met"]


def test_without_nltk_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install nltk"):
        rewards.nltk_scorer()
