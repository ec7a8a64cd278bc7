"""
A GRPO run that goes on with another number of processes: the same prompts in the same update, or a refusal by name;
and the rollouts of an unfinished generation, dealt to the processes that are there now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import BrokenFileError, MismatchError
from ...functional.rollouts import GenerationLayout, deal_again, first_difference
from .rows import LOSS_SCALE, ROW_KEYS, Rows

#: entry of the state file
LAYOUT = "layout"


def layout_entry(layout: GenerationLayout) -> dict[str, int]:
    """Return what a checkpoint stores of a layout."""
    return asdict(layout)


def stored_layout(path: Path, state: dict[str, Any]) -> GenerationLayout | None:
    """
    Return the layout of a checkpoint; `None` for one that was written before layouts were stored.

    Raises:
        BrokenFileError: the entry is no layout.
    """
    if (entry := state.get(LAYOUT)) is None:
        return None
    try:
        return GenerationLayout(**entry)
    except (TypeError, ValueError) as error:
        raise BrokenFileError(
            f"{path} holds no layout of a GRPO run in {LAYOUT!r} ({error}). Resume from another checkpoint."
        ) from error


def check_same_updates(checkpoint: Path, before: GenerationLayout, now: GenerationLayout, rollouts: Any) -> None:
    """
    Refuse a run whose updates would train on other samples than those of the run that it continues.

    Args:
        checkpoint (`Path`): For the message.
        before, now ([`GenerationLayout`]): Of the checkpoint, and of this run.
        rollouts: What makes the rollouts, with its `group_filter` and `rollout_pruner` where it has them.

    Raises:
        MismatchError: names what differs and a setting with which it is equal, or the method that chooses otherwise on
            another number of processes.
    """
    if (difference := first_difference(before, now)) is not None:
        raise MismatchError(
            f"{checkpoint.name} was trained with another layout. {difference}. Other samples would enter the updates. "
            f"{_way_out(before, now)}, or ignore_data_skip=True to begin the pass anew."
        )
    if getattr(rollouts, "selects", False):
        _check_choices(checkpoint, before, now, rollouts)


def _way_out(before: GenerationLayout, now: GenerationLayout) -> str:
    rows = now.rows_per_step * now.world_size
    steps, chunks = divmod(before.rows_per_update, rows), divmod(before.trained_rows, rows)
    if steps[1] or chunks[1] or not steps[0] or not chunks[0]:
        return f"Resume on {before.world_size} processes with per_device_train_batch_size={before.rows_per_step}"
    wanted = {"gradient_accumulation_steps": steps[0], "steps_per_generation": chunks[0]}
    wanted |= {name: getattr(before, name) for name in ("num_generations", "num_iterations")}
    have = now.accumulation_steps, now.steps_per_generation, now.num_generations, now.num_iterations
    changes = [f"{name}={value}" for (name, value), own in zip(wanted.items(), have, strict=True) if value != own]
    if before.oversample != now.oversample:
        changes.append("prune_rate and prune_allocation as they were")
    return f"Set {', '.join(changes)}"


def _check_choices(checkpoint: Path, before: GenerationLayout, now: GenerationLayout, rollouts: Any) -> None:
    """Refuse a method whose choice is a function of the number of processes, or of the rows of a micro-batch."""
    pruner, filters = rollouts.objects.rollout_pruner, rollouts.objects.group_filter
    stay = f"Resume on {before.world_size} processes with per_device_train_batch_size={before.rows_per_step}"
    if (pruner is not None or filters is not None) and before.micro_batches != now.micro_batches:
        raise MismatchError(
            f"{checkpoint.name} dealt the rows that filters and pruning leave to {before.micro_batches} micro-batches "
            f"of a generation, this run deals them to {now.micro_batches}, and would leave out other ones. Keep "
            f"per_device_train_batch_size={before.rows_per_step} and change gradient_accumulation_steps. {stay}."
        )
    if before.world_size == now.world_size:
        return
    # A pruner that does not say where rows compete is given the pools of the processes.
    if pruner is not None and getattr(pruner, "scope", "rank") == "rank":
        raise MismatchError(
            f"{checkpoint.name} pruned among the completions of each of {before.world_size} processes, and this run "
            f"would among those of {now.world_size}. {stay}. Runs with prune_scope='global' or 'group' may change "
            "their number of processes."
        )
    if filters is not None and before.even_groups(1) != now.even_groups(1):
        raise MismatchError(
            f"{checkpoint.name} refilled generations by multiples of {before.even_groups(1)} prompts, which "
            f"{before.world_size} processes share evenly, and this run would by {now.even_groups(1)}. {stay}, or on a "
            f"number that divides num_generations={now.num_generations}."
        )


def dealt_again(
    buffers: Sequence[Sequence[dict[str, Any]]],
    before: GenerationLayout,
    now: GenerationLayout,
    rank: int,
    pad_token_id: int,
    ratio_padding: float | None,
) -> list[dict[str, Any]] | None:
    """
    Return the micro-batches of a rank, of the rows that other ranks had; `None` where they cannot be dealt.

    Args:
        buffers (`Sequence[Sequence[dict]]`): The micro-batches of each rank under `before`.
        before, now ([`GenerationLayout`]): Of the checkpoint, and of this run.
        rank (`int`): Of this run.
        pad_token_id, ratio_padding: As in [`Rows.joined`].
    """
    if any(set(chunk) - ROW_KEYS - {LOSS_SCALE} for chunks in buffers for chunk in chunks):
        return None  # images, whose entries are no rows
    if [len(chunks) for chunks in buffers] != [before.steps_per_generation] * before.world_size:
        return None
    counts = [[len(chunk["advantages"]) for chunk in chunks] for chunks in buffers]
    hands = deal_again(counts, before, now)
    if hands is None:
        return None
    return [
        Rows.joined([Rows(buffers[r][c]).take([row]) for r, c, row in hand], pad_token_id, ratio_padding)
        .trimmed()
        .batch
        for hand in hands[rank]
    ]
