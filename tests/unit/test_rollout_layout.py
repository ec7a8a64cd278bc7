"""`GenerationLayout` by hand-computed values, and against a run that is played through row by row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from hf_effi.functional.rollouts import GenerationLayout

SIZES = "trained_rows generated_rows loader_rows prompts micro_batches block updates_per_generation"


@pytest.mark.parametrize(
    ("counts", "sizes", "window"),
    [
        # rows_per_step, G, steps, iterations, accumulation, ranks, R
        ((4, 2, 1, 1, 1, 1, 1), (4, 4, 4, 2, 1, 1, 1), 1),
        ((8, 4, 2, 1, 2, 1, 2), (16, 32, 32, 8, 2, 2, 1), 2),  # streaming once served 4 of these 8 prompts
        ((8, 4, 2, 2, 2, 1, 1), (16, 16, 16, 4, 2, 4, 2), 2),
        ((8, 4, 4, 1, 2, 2, 4), (64, 256, 128, 64, 8, 4, 2), 2),
        ((8, 16, 1, 1, 1, 2, 1), (16, 16, 8, 1, 2, 1, 1), 1),  # one group over both ranks
        ((4, 2, 1, 1, 4, 1, 1), (4, 4, 4, 2, 1, 1, 0.25), 1),  # an update accumulates four generations
        ((2, 2, 3, 1, 2, 1, 1), (6, 6, 6, 3, 3, 3, 1.5), None),  # updates straddle generations
    ],
)
def test_sizes(counts: tuple[int, ...], sizes: tuple[Any, ...], window: int | None) -> None:
    layout = GenerationLayout(*counts)
    assert tuple(getattr(layout, name) for name in SIZES.split()) == sizes
    assert layout.micro_batches_per_update == window


def test_place_of_each_micro_step() -> None:
    layout = GenerationLayout(2, 2, steps_per_generation=3, num_iterations=2)
    steps = range(8)
    assert [layout.starts_generation(step) for step in steps] == [True, *[False] * 5, True, False]
    assert [layout.micro_batch(step) for step in steps] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [layout.iteration(step) for step in steps] == [0, 0, 0, 1, 1, 1, 0, 0]
    assert [layout.generations(steps) for steps in (0, 1, 6, 7, 12, 13)] == [0, 1, 1, 2, 2, 3]


def test_rows_of_a_rank() -> None:
    layout = GenerationLayout(4, 2, world_size=2, oversample=2)
    assert [list(layout.rows_of(rank)) for rank in (0, 1)] == [list(range(8)), list(range(8, 16))]
    assert [list(layout.rows_of(rank, 4)) for rank in (0, 1)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("group", "world", "even"), [(2, 1, [1, 2, 3]), (4, 8, [2, 2, 4]), (3, 2, [2, 2, 4]), (8, 2, [1, 2, 3])]
)
def test_groups_that_can_be_dealt_evenly(group: int, world: int, even: list[int]) -> None:
    layout = GenerationLayout(group, group, world_size=world)
    assert [layout.even_groups(count) for count in (1, 2, 3)] == even


def test_passes() -> None:
    layout = GenerationLayout(8, 4, 2, num_iterations=2, accumulation_steps=3, oversample=2)  # 8 prompts, blocks of 4
    assert [layout.generations_per_pass(n) for n in (0, 7, 8, 20)] == [0, 0, 1, 2]
    assert (layout.steps_per_pass(20), layout.updates_per_pass(20), layout.rows_per_pass(20)) == (8, 3, 256)
    assert layout.order(torch.arange(7)).tolist() == []


def test_updates_at_the_end_of_a_pass_accumulate_what_is_left() -> None:
    layout = GenerationLayout(2, 2, accumulation_steps=2)  # each micro-step generates
    assert [layout.steps_of(updates) for updates in range(5)] == [0, 2, 4, 6, 8]
    assert [layout.steps_of(updates, steps_per_pass=3) for updates in range(5)] == [0, 2, 3, 5, 6]
    assert layout.generations_of(0, 4) == [2, 2, 2, 2]
    assert layout.generations_of(0, 4, steps_per_pass=3) == [2, 1, 2, 1]
    assert GenerationLayout(2, 2, 4).generations_of(0, 5) == [1, 0, 0, 0, 1]
    assert GenerationLayout(2, 2, 4, accumulation_steps=4).generations_of(1, 3) == [1, 1]
    assert layout.generations_of(3, 3) == []


@pytest.mark.parametrize(
    "name", ["rows_per_step", "num_generations", "steps_per_generation", "world_size", "oversample"]
)
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None])
def test_counts_are_whole_and_positive(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value!r}"):
        GenerationLayout(**{"rows_per_step": 4, "num_generations": 2, name: value})


def test_groups_are_whole() -> None:
    with pytest.raises(ValueError, match="12 rows .* num_generations=8. Choose a divisor of 12"):
        GenerationLayout(4, 8, 3)


def test_of_a_config() -> None:
    args = SimpleNamespace(
        per_device_train_batch_size=4, num_generations=2, steps_per_generation=3, num_iterations=2,
        gradient_accumulation_steps=5, world_size=2,
    )  # fmt: skip
    assert GenerationLayout.of(args) == GenerationLayout(4, 2, 3, 2, 5, 2)
    args.prune_oversample = 4
    assert GenerationLayout.of(args).oversample == 4


@st.composite
def layouts(draw: Any) -> GenerationLayout:
    steps, iterations, accumulation, world, factor = (draw(st.integers(1, high)) for high in (4, 3, 5, 3, 3))
    rows = draw(st.integers(1, 6))
    group = draw(st.sampled_from([size for size in range(1, 73) if rows * steps * world % size == 0]))
    return GenerationLayout(rows, group, steps, iterations, accumulation, world, factor)


@settings(deadline=None, max_examples=150)
@given(layout=layouts(), passes=st.integers(1, 3), extra=st.integers(0, 9), generations=st.integers(1, 3))
def test_a_run_played_through(layout: GenerationLayout, passes: int, extra: int, generations: int) -> None:
    num_prompts = layout.prompts * generations + min(extra, layout.prompts - 1)
    order = layout.order(torch.arange(num_prompts))
    stock = RepeatSampler(range(num_prompts), layout.num_generations, layout.prompts, layout.block, shuffle=False)
    assert order.tolist() == list(stock) and len(order) == len(stock) == layout.rows_per_pass(num_prompts)
    # The loader cuts the rows into batches, and gives one to each rank in turn.
    batches = order.split(layout.loader_rows)
    assert all(len(batch) == layout.loader_rows for batch in batches) and len(batches) % layout.world_size == 0
    per_pass = len(batches) // layout.world_size
    assert per_pass == layout.steps_per_pass(num_prompts)

    step, served, made, updates_of, window = 0, [], [], [], 0
    for number in range(passes):
        for position in range(per_pass):
            if step % layout.block == 0:
                shares = batches[position * layout.world_size : (position + 1) * layout.world_size]
                gathered = torch.cat(shares)
                groups = gathered.view(-1, layout.num_generations)
                assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) == layout.prompts
                for rank, share in enumerate(shares):
                    rows = layout.rows_of(rank)
                    assert share.tolist() == gathered[rows.start : rows.stop].tolist()
                served += groups[:, 0].tolist()
                made.append(len(updates_of))
            assert layout.starts_generation(step) == (step % layout.block == 0)
            within = step - (len(made) - 1) * layout.block
            assert (layout.iteration(step), layout.micro_batch(step)) == divmod(within, layout.steps_per_generation)
            step, window = step + 1, window + 1
            if window == layout.accumulation_steps or position == per_pass - 1:
                updates_of.append(step)
                window = 0
        assert served == list(range(layout.prompts * generations)) * (number + 1)
        assert len(updates_of) == layout.updates_per_pass(num_prompts) * (number + 1)
    assert layout.generations(step) == len(made)
    assert [layout.steps_of(update + 1, per_pass) for update in range(len(updates_of))] == updates_of
    counts = [made.count(update) for update in range(len(updates_of))]
    assert layout.generations_of(0, len(updates_of), per_pass) == counts


@settings(deadline=None, max_examples=100)
@given(layout=layouts())
def test_updates_and_blocks(layout: GenerationLayout) -> None:
    block, accumulation = layout.block, layout.accumulation_steps
    steps = range(block * accumulation)  # after so many the pattern repeats
    size = layout.micro_batches_per_update
    if size is not None:
        for first in range(0, len(steps), size):
            part = range(first, first + size)
            assert len({step // accumulation for step in part}) == 1, "rows may change places within one update only"
            assert len({step // layout.steps_per_generation for step in part}) == 1
    assert layout.updates_per_generation * accumulation == block
