"""Recipes that were written when the files of the package lay elsewhere are read as they were meant."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import hf_effi
from hf_effi.callbacks import GRPOLimits, TrainLimits
from hf_effi.errors import RecipeError
from hf_effi.functional.rollouts import AdvantagePruner, PassRateBand
from hf_effi.hub import Recipe
from hf_effi.hub.objects import from_plain, to_plain
from hf_effi.hub.recipe import _readable
from hf_effi.schedules import cosine, join, scale, wsd

CARDS = Path(__file__).parent / "old_cards"


def read(name: str, tmp_path: Path) -> Recipe:
    return hf_effi.from_card(CARDS / f"{name}.json", output_dir=str(tmp_path), use_cpu=True)


def test_a_trainer_with_callbacks(tmp_path):
    recipe = read("trainer", tmp_path)
    assert recipe.trainer_class is hf_effi.EffiTrainer and type(recipe.args) is hf_effi.EffiTrainingArguments
    schedule, average, doctor, reptile = recipe.objects["callbacks"]
    assert isinstance(schedule, hf_effi.LRScheduleCallback)
    wanted = join(
        schedules=[wsd(total_steps=3, warmup_steps=1, decay_fraction=0.2), cosine(floor=0.1)], boundaries=[3]
    )
    assert schedule.built.spec() == wanted.spec()
    assert isinstance(average, hf_effi.WeightAveragingCallback) and (average.last, average.kind) == (2, "uniform")
    assert isinstance(doctor, hf_effi.TrainDoctor) and doctor.limits == TrainLimits(lr_zero_logs=7)
    assert isinstance(reptile, hf_effi.callbacks.ReptileCallback) and (reptile.every_steps, reptile.beta) == (2, 0.2)


def test_a_grpo_trainer_with_a_filter_a_pruner_and_a_schedule_of_its_config(tmp_path):
    recipe = read("grpo", tmp_path)
    assert recipe.trainer_class is hf_effi.EffiGRPOTrainer and type(recipe.args) is hf_effi.EffiGRPOConfig
    assert recipe.args.lr_schedule == "wsd" and recipe.args.lr_schedule_kwargs == {"decay_fraction": 0.3}
    band, pruner = recipe.objects["group_filter"], recipe.objects["rollout_pruner"]
    assert isinstance(band, PassRateBand) and (band.low, band.high) == (0.1, 0.9)
    assert isinstance(pruner, AdvantagePruner) and pruner.prune_rate == 0.5
    (doctor,) = recipe.objects["callbacks"]
    assert isinstance(doctor, hf_effi.GRPODoctor) and doctor.limits == GRPOLimits(truncated=0.7)


def objects_in(value: Any) -> list[dict[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) and set(value) == {"class", "arguments"} else []
    return own + [found for part in inner for found in objects_in(part)]


@pytest.mark.parametrize("name", ["trainer", "grpo"])
def test_written_again_the_same_objects_are_named_by_their_rooms(name):
    """A path names a face, never a file: files move."""
    objects = json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8"))["objects"]
    found = [entry for value in objects.values() for entry in objects_in(to_plain(from_plain(value)))]
    assert len(found) == len(objects_in(objects))
    for entry in found:
        assert re.fullmatch(r"hf_effi\.(callbacks|data|samplers|schedules|functional\.rollouts):\w+", entry["class"])


def test_what_a_card_could_not_give_back_is_not_written():
    """Schedules in schedules: reading refuses data that is nested too deeply, and the whole recipe with it."""
    schedule = cosine()
    for _ in range(8):
        schedule = scale(schedule=schedule, factor=0.9)
    with pytest.raises(RecipeError, match="too much: it is nested more than 16 deep"):
        _readable(hf_effi.LRScheduleCallback(schedule))
