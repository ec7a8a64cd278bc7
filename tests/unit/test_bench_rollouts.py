"""The bench of cheaper rollouts: lengths are those that were drawn, and each arm generates the same tokens."""

from __future__ import annotations

import pytest

from bench import render, rollouts


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "ROWS", 4)
    monkeypatch.setattr(rollouts, "LONGEST", 12)
    monkeypatch.setattr(rollouts, "MEDIAN", 5)


@pytest.mark.parametrize("prompts", rollouts.PROMPTS)
def test_arms_differ_in_what_they_forward_and_in_nothing_else(small: None, prompts: str) -> None:
    model = rollouts.build_model(0)
    texts, lengths = rollouts.draw(1, 2, prompts)
    assert texts[0] == texts[1] != texts[2] == texts[3] and len(set(lengths)) > 1
    made = {arm: rollouts.by_generate(model, texts, lengths, saved)[0] for arm, saved in rollouts.ARMS.items()}
    assert all(rows == made["stock"] for rows in made.values())
    assert [row[-1] for row in made["stock"]] == [rollouts.END] * 4
    assert not any(rollouts.END in row[:-1] for row in made["stock"])
    if prompts != "short":
        return  # continuous batching takes long for these on a CPU
    attention = model.config._attn_implementation
    continuous = rollouts.by_continuous_batching(model, texts, lengths)
    assert [row[:-1] for row in continuous] == [row[:-1] for row in made["stock"]]
    assert model.config._attn_implementation == attention


def test_the_headline_is_of_the_worst_case() -> None:
    arms, rows = (*rollouts.ARMS, rollouts.CONTINUOUS), []
    for group, ratios in ((8, (1.0, 0.9, 0.5, 0.4, 0.7)), (16, (1.0, 1.0, 0.5, 0.5, 0.7))):
        case = {"prompts": "short", "group": group, "tokens_equal_stock": True, "generation_cpu_seconds": 2.0}
        rows += [{**case, "arm": arm, "ratio_to_stock": ratio} for arm, ratio in zip(arms, ratios, strict=True)]
    figures = {figure["name"]: figure for figure in rollouts.headlines(rows)}
    assert figures["generation_seconds_ratio_to_stock"]["value"] == 0.5
    assert figures["generation_seconds_ratio_to_stock"]["met"] and figures["cases_with_other_tokens"]["met"]
    result = {"rows": rows, "machine": {}, "versions": {}, "seeds": [0], "date": "", "commit": "", "command": ""}
    table = render.cases_table(result).splitlines()
    assert table[2] == "| short, groups of 8 | 2.00 | 0.90 | 0.50 | 0.40 | 0.70 |"
