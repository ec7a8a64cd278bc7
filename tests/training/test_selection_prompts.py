"""Prompt selectors through `trainer.train()`: what they are served, what they are told, and a resume anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.hub.objects import from_plain
from hf_effi.hub.recipe import recipe_of
from hf_effi.selection import DUMP, GRESO, AdaRFT, MoPPS, OfflineCurriculum, Screening, ShuffledPrompts
from tests.helpers import TableReward, assert_bitwise_equal, binary_hash_reward, grpo_args, prompt_dataset, run_grpo
from tests.training.test_selection_seams import Listener

SIZE, GROUP = 24, 4
DATA = prompt_dataset(SIZE)
WRONG, HARD, HALF, RIGHT = [0.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0] * 4
LEVELS = [float(level) for level in DATA["level"]]
RATES = [1 - level / 3 for level in LEVELS]

#: with what a run of a few steps already does something, on any dataset of this size
MAKE: dict[str, Callable[..., Any]] = {
    "GRESO": lambda **over: GRESO(SIZE, change=0.2, **over),
    "MoPPS": lambda **over: MoPPS(SIZE, forget=0.3, candidates=2.0, **over),
    "BOTS": lambda **over: MoPPS(forget=0.1, rho=0.1, weak=[0.0] * SIZE, strong=RATES, candidates=3.0, **over),
    "DUMP": lambda **over: DUMP(LEVELS, window=16, **over),
    "AdaRFT": lambda **over: AdaRFT(LEVELS, step_fraction=0.4, **over),
    "OfflineCurriculum": lambda **over: OfflineCurriculum(RATES, start=0.2, **over),
}


class Recorded:
    """Notes what a selector gives out."""

    def __init__(self, selector: Any) -> None:
        self.selector, self.calls = selector, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.selector, name)

    def select(self, count: int, *, exclude: frozenset[int]) -> list[int]:
        self.calls.append((self.selector.select(count, exclude=exclude), exclude))
        return self.calls[-1][0]

    def observe(self, rows: list[int], groups: Any) -> None:
        self.selector.observe(rows, groups)


def table(rows: Callable[[int], list[float]]) -> TableReward:
    """Give the prompt of each row of the dataset the rewards `rows(number)`."""
    return TableReward({row["prompt"]: rows(number) for number, row in enumerate(DATA)})


def train(folder: Path, selector: Any, reward: Any = binary_hash_reward, **over: Any) -> tuple[Any, list[list[int]]]:
    """Return the trainer and the rows of each generation, of 4 prompts unless told otherwise."""
    listener, resume = Listener(), over.pop("resume", None)
    kwargs = {name: over.pop(name) for name in ("screening", "group_filter") if name in over}
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "gradient_accumulation_steps": 2}
    args = grpo_args(folder, EffiGRPOConfig, **{**settings, **over})
    trainer = run_grpo(
        EffiGRPOTrainer,
        args,
        reward_funcs=reward,
        train_dataset=DATA,
        prompt_selector=selector,
        callbacks=[listener],
        resume_from_checkpoint=resume,
        **kwargs,
    )
    return trainer, [rows for rows, _ in listener.told]


def share(generations: list[list[int]], wanted: Callable[[int], bool]) -> float:
    rows = [row for rows in generations for row in rows]
    return sum(map(wanted, rows)) / len(rows)


# --- a resume anywhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_resumed_in_the_middle_of_an_epoch_and_of_a_generation_it_is_the_same_run(tmp_path: Path, name: str) -> None:
    """Each generation serves two steps; step 3 is the first of the second generation, after 8 of 24 rows."""
    over = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole, rows = train(tmp_path / "a", MAKE[name](seed=2), **over)
    for stop in (2, 3):
        selector = MAKE[name]()
        resumed, again = train(tmp_path / "b", selector, resume=str(tmp_path / "a" / f"checkpoint-{stop}"), **over)
        assert_bitwise_equal(whole.model, resumed.model, what=f"{name} resumed at {stop}")
        assert again == rows[-len(again) :] and len(again) == (2 if stop == 2 else 1)
        assert selector.draws == whole.prompt_selector.draws


@pytest.mark.parametrize("name", ["GRESO", "MoPPS"])
def test_resumed_among_rounds_of_refilling(tmp_path: Path, name: str) -> None:
    over = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "difficulty_range": (0, 1)}
    reward = lambda: table(lambda row: HALF if row % 3 else WRONG)  # noqa: E731
    whole, rows = train(tmp_path / "a", MAKE[name](), reward(), **over)
    assert any(len(of_step) > 4 for of_step in rows)  # there were rounds
    resumed, again = train(tmp_path / "b", MAKE[name](), reward(), resume=str(tmp_path / "a" / "checkpoint-2"), **over)
    assert again == rows[2:]
    assert_bitwise_equal(whole.model, resumed.model)


# --- what is served --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_no_prompt_comes_twice_in_a_step(tmp_path: Path, name: str) -> None:
    selector = Recorded(MAKE[name]())
    over = {"difficulty_range": (0.4, 0.6), "difficulty_max_rounds": 4}
    _, generations = train(tmp_path, selector, table(lambda row: HALF if row % 2 else WRONG), **over)
    assert all(len(rows) == len(set(rows)) for rows in generations)
    assert any(exclude for _, exclude in selector.calls) and all(
        not exclude & set(rows) for rows, exclude in selector.calls
    )


def test_what_reads_no_reward_before_it_has_history_is_the_shuffled_stream(tmp_path: Path) -> None:
    """Within its first pass GRESO without exploration is `ShuffledPrompts`, to the bit."""
    plain, rows = train(tmp_path / "a", ShuffledPrompts(SIZE, seed=4), max_steps=4)
    skipping, same = train(tmp_path / "b", GRESO(SIZE, explore=0.0, seed=4), max_steps=4)
    assert rows == same
    assert_bitwise_equal(plain.model, skipping.model)


def test_greso_generates_less_for_dead_prompts_once_it_has_seen_them(tmp_path: Path) -> None:
    selector = GRESO(SIZE, explore=0.0, p_hard=0.1, change=0.0)
    trainer, generations = train(tmp_path, selector, table(lambda row: WRONG if row % 2 else HALF), max_steps=18)
    dead = lambda row: row % 2 == 1  # noqa: E731
    assert share(generations[:6], dead) == 0.5  # the first pass has every prompt once
    assert share(generations[6:], dead) < 0.25
    assert all(streak < 0 for streak in selector.streaks[1::2]) and not selector.streaks[::2].any()
    assert trainer.state.global_step == 18


def test_mopps_comes_to_the_prompts_that_are_half_solved(tmp_path: Path) -> None:
    rewards = table(lambda row: (WRONG, HALF, RIGHT, RIGHT)[row % 4])
    selector = MoPPS(SIZE, explore=0.0, candidates=None)
    _, generations = train(tmp_path, selector, rewards, max_steps=20)
    assert share(generations[:3], lambda row: row % 4 == 1) < 0.7
    assert share(generations[-8:], lambda row: row % 4 == 1) > 0.7
    assert selector.metrics()["middle"] >= 0.5


def test_dump_draws_from_the_source_with_advantages(tmp_path: Path) -> None:
    sources = ["alive" if row % 3 == 0 else "dead" for row in range(SIZE)]
    selector = DUMP(sources, explore=0.0)
    _, generations = train(tmp_path, selector, table(lambda row: WRONG if row % 3 else HALF), max_steps=16)
    assert share(generations[-8:], lambda row: row % 3 == 0) > 0.7 > 1 / 3
    seen = len([row for rows in generations for row in rows])
    assert int(selector._counts.sum()) == seen * GROUP
    assert selector.means().tolist() == [pytest.approx(3**0.5 / 2, abs=1e-3), 0.0]


def test_dump_reads_the_advantages_before_a_filter(tmp_path: Path) -> None:
    selector = DUMP(["one"] * SIZE)
    over = {"difficulty_range": (0.4, 0.6), "difficulty_max_rounds": 1, "difficulty_underfill": "shrink"}
    _, generations = train(tmp_path, selector, table(lambda row: HALF if row % 2 else HARD), max_steps=2, **over)
    assert int(selector._counts[0]) == GROUP * sum(map(len, generations))


def test_adarft_goes_to_harder_prompts_while_all_is_right(tmp_path: Path) -> None:
    selector = AdaRFT(LEVELS, explore=0.0, step_fraction=0.4)
    rewards = table(lambda row: RIGHT if LEVELS[row] < 2 else WRONG)
    _, generations = train(tmp_path, selector, rewards, max_steps=12)
    levels = [sum(LEVELS[row] for row in rows) / len(rows) for rows in generations]
    assert levels[0] == 0.0 and max(levels) >= 2.0 and min(levels[6:]) >= 1.0
    assert 1.0 < selector.target < 2.5  # between what is always right and what never is


def test_a_curriculum_opens_the_dataset_as_the_run_goes_on(tmp_path: Path) -> None:
    selector = OfflineCurriculum(RATES, start=0.25, explore=0.0)
    _, generations = train(tmp_path, selector, max_steps=12)
    hardest = [max(LEVELS[row] for row in rows) for rows in generations]
    assert hardest[0] == 0.0 and hardest[1] == 0.0 and max(hardest) == 3.0
    assert selector.progress == pytest.approx(11 / 12)


def test_screening_and_a_selector_work_together(tmp_path: Path) -> None:
    selector = MoPPS(SIZE, explore=0.0, candidates=2.0)
    reward = TableReward({row["prompt"]: [1.0, 0.0] if number % 2 else [0.0] for number, row in enumerate(DATA)})
    trainer, generations = train(tmp_path, selector, reward, screening=Screening(2), max_steps=3)
    assert [len(rows) for rows in generations] == [8] * 3
    counts = (selector.alpha + selector.beta - 2).tolist()
    assert sum(counts) == 3 * (8 * 2 + 4 * 2)  # of both stages
    assert sum(entry.get("effi/dropped/screened", 0) for entry in trainer.state.log_history) == 3 * 8


@pytest.mark.parametrize("name", ["GRESO", "MoPPS", "AdaRFT"])
def test_rewards_that_are_no_answers_stop_the_run_with_the_fix(tmp_path: Path, name: str) -> None:
    reward = table(lambda row: [1.1, 0.1, -1.0, 0.1])
    with pytest.raises(ValueError, match=r"difficulty_reward=.*success_at=1\.0"):
        train(tmp_path, MAKE[name](), reward)
    train(tmp_path, MAKE[name](success_at=1.0), reward, max_steps=1)


@pytest.mark.parametrize(("name", "key"), [("GRESO", "greso"), ("MoPPS", "mopps"), ("DUMP", "dump")])
def test_a_recipe_holds_the_selector_as_it_was_made(tmp_path: Path, name: str, key: str) -> None:
    selector = MAKE[name](seed=3)
    trainer, generations = train(tmp_path, selector, max_steps=2, screening=Screening(2, candidates=1.5))
    recipe = recipe_of(trainer)
    assert not recipe["not_carried"].keys() & {"prompt_selector", "screening"}
    again = from_plain(json.loads(json.dumps(recipe["objects"]["prompt_selector"])))
    assert type(again) is type(selector) and again.seed == 3
    assert again.select(6) == generations[0]  # as at the start: what was learned is in a checkpoint
    assert from_plain(recipe["objects"]["screening"]) == Screening(2, candidates=1.5)
    assert {key, "speed"} <= {method["key"] if isinstance(method, dict) else method for method in recipe["methods"]}
