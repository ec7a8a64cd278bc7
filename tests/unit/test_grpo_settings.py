"""`GRPOSettings`: the own fields of a config, read once and for good."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from hf_effi import EffiGRPOConfig
from hf_effi.trainers.grpo.selection_objects import SelectionObjects
from hf_effi.trainers.grpo.settings import GRPOSettings
from tests.helpers import grpo_args


def settings(folder: Path, cls: type = EffiGRPOConfig, **over: Any) -> GRPOSettings:
    return GRPOSettings.of(grpo_args(folder, cls, **over))


def test_every_own_field_of_the_config_is_a_setting() -> None:
    inherited = {field.name for base in EffiGRPOConfig.__bases__ for field in dataclasses.fields(base)}
    own = {field.name for field in dataclasses.fields(EffiGRPOConfig)} - inherited
    assert {field.name for field in dataclasses.fields(GRPOSettings)} == own


def test_a_plain_config_has_the_defaults(tmp_path: Path) -> None:
    assert settings(tmp_path, GRPOConfig) == settings(tmp_path)


def test_settings_are_those_of_the_config_and_stay(tmp_path: Path) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, difficulty_range=(0, 1), difficulty_max_rounds=2)
    found = GRPOSettings.of(args)
    args.difficulty_max_rounds = 5
    assert found.difficulty_max_rounds == 2 and found.difficulty_range == (0.0, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.difficulty_max_rounds = 5


@pytest.mark.parametrize(("text", "names"), [("auto", None), ("off", ()), ("trim, skip", ("trim", "skip"))])
def test_the_savings_that_are_named(tmp_path: Path, text: str, names: Any) -> None:
    assert settings(tmp_path, exact_savings=text).wanted_savings == names


@pytest.mark.parametrize(
    ("over", "objects", "message"),
    [
        ({"difficulty_range": (0, 1)}, {"group_filter": object()}, "either `group_filter=` or `difficulty_range`"),
        ({"prune_rate": 0.5}, {"rollout_pruner": object()}, "either `rollout_pruner=` or `prune_rate`"),
        ({}, {"prompt_selector": object(), "train_sampler": object()}, "Drop one of the two"),
        ({"difficulty_max_rounds": 2}, {}, "difficulty_max_rounds=2 acts only where groups are filtered"),
        ({"difficulty_reward": "right"}, {}, "difficulty_reward='right' acts only where groups are filtered"),
        ({"prune_normalizer": "original"}, {}, "prune_normalizer='original' acts only where completions are pruned"),
    ],
)
def test_what_cannot_act_together_is_refused(tmp_path: Path, over: Any, objects: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler = objects.pop("train_sampler", None)
        SelectionObjects(**objects).check(settings(tmp_path, **over), sampler)


def test_a_selector_lets_the_reward_act_that_says_right_or_wrong(tmp_path: Path) -> None:
    SelectionObjects(prompt_selector=object()).check(settings(tmp_path, difficulty_reward="right"))
