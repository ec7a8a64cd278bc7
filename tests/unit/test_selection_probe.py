"""A probe shares no prompt with the part that is trained on."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_effi.selection import split_probe
from tests.helpers import prompt_dataset


@pytest.mark.parametrize("conversational", [False, True])
def test_no_prompt_is_in_both_parts_and_none_is_lost(conversational: bool) -> None:
    data = prompt_dataset(20, conversational=conversational)
    doubled = Dataset.from_list([*data, *data, *data])
    train, probe = split_probe(doubled, rows=5, seed=1)
    shown = [[str(prompt) for prompt in part["prompt"]] for part in (train, probe)]
    assert len(probe) == len(set(shown[1])) == 5
    assert not set(shown[0]) & set(shown[1])
    assert len(train) == 45 and set(shown[0]) | set(shown[1]) == {str(prompt) for prompt in data["prompt"]}
    # Each in the order of the dataset.
    assert shown[0] == [text for text in map(str, doubled["prompt"]) if text not in shown[1]]
    assert shown[1] == [text for text in map(str, data["prompt"]) if text in shown[1]]


def test_the_draw_is_that_of_the_seed_and_uniform() -> None:
    data = prompt_dataset(20)
    parts = [split_probe(data, rows=5, seed=seed)[1]["prompt"] for seed in (3, 3, 4)]
    assert list(parts[0]) == list(parts[1]) != list(parts[2])
    counts = dict.fromkeys(data["prompt"], 0)
    for seed in range(200):
        for prompt in split_probe(data, rows=5, seed=seed)[1]["prompt"]:
            counts[prompt] += 1
    assert sum(counts.values()) == 1000 and min(counts.values()) > 25 and max(counts.values()) < 80


def test_a_fraction_is_of_the_distinct_prompts() -> None:
    data = prompt_dataset(10)
    assert len(split_probe(data, fraction=0.3)[1]) == 3
    assert len(split_probe(data, fraction=0.001)[1]) == 1
    assert len(split_probe(Dataset.from_list([*data, *data]), fraction=0.3)[1]) == 3


def test_another_column_can_say_what_is_the_same() -> None:
    train, probe = split_probe(prompt_dataset(16), rows=1, column_for_duplicates="level")
    assert len(probe) == 1 and len(train) == 12 and set(train["level"]).isdisjoint(probe["level"])


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({}, "give exactly one"),
        ({"rows": 2, "fraction": 0.5}, "rows=2 and fraction=0.5: give exactly one"),
        ({"rows": 0}, "rows=0 must be an integer of at least 1"),
        ({"rows": True}, "rows=True must be"),
        ({"rows": 8}, "a probe of 8 prompts leaves none of 8 distinct ones"),
        ({"fraction": 1.0}, r"fraction=1.0 is outside \(0, 1\)"),
        ({"fraction": 0.99}, "leaves none of 8"),
        ({"rows": 1, "seed": -1}, "seed=-1"),
        ({"rows": 1, "column_for_duplicates": "text"}, "'text' is no column of the dataset, which has prompt, answer"),
    ],
)
def test_wrong_arguments_are_named(over: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_probe(prompt_dataset(8), **over)


def test_a_stream_has_no_probe() -> None:
    with pytest.raises(ValueError, match=r"stream.take\(256\).*train on stream.skip\(256\)"):
        split_probe(prompt_dataset(8).to_iterable_dataset(), rows=1)


def test_what_is_no_dataset_is_named() -> None:
    data = prompt_dataset(8)
    for wrong, name in ((data.to_list(), "list"), (DatasetDict(train=data), "DatasetDict"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"dataset is {name}, and a probe is drawn from one datasets.Dataset"):
            split_probe(wrong, rows=1)
