"""
A resume on another number of processes: the same samples enter the same update, or it is refused by name.

A Trainer counts finished updates and skips as many batches. So the place in the data is right as long as an update
takes as many rows as before: processes x rows per process x accumulation steps. Otherwise samples are repeated or left
out, and a stock Trainer says nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.utils import logging

from .._files import missing_file
from ..errors import MismatchError
from ..functional.rollouts import GenerationLayout, first_difference
from ..samplers import EffiSampler
from ..samplers.trainer_checks import rows_per_update
from .log_window import processes_of
from .manifest import read_manifest
from .structure import TRAINER_STATE_NAME

logger = logging.get_logger(__name__)


def layout_of(trainer: Trainer, loader: Any) -> dict[str, Any]:
    """
    Return what a manifest keeps of how a run was spread: rows per update, and what they are the product of.

    Of a run that generates its rows (GRPO, RLOO) also how many of them make a generation.
    """
    args = trainer.args
    batches = getattr(loader, "batch_sampler", None)
    facts = {
        "rows_per_update": None if batches is None else rows_per_update(loader, args),
        "world_size": args.world_size,
        "rows_per_process": trainer._train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }
    if generates(args):
        facts |= {name: getattr(GenerationLayout.of(args), field) for name, field in _OF_GENERATIONS.items()}
    return facts


#: what a manifest of a run that generates its rows has besides -> the argument of its `GenerationLayout`
_OF_GENERATIONS = {
    "generation_rows_per_process": "rows_per_step",
    "num_generations": "num_generations",
    "steps_per_generation": "steps_per_generation",
    "num_iterations": "num_iterations",
    "prune_oversample": "oversample",
}


def generates(args: Any) -> bool:
    """Return whether a run with these arguments generates its rows, so that its loader gives them several times."""
    return all(hasattr(args, name) for name in ("num_generations", "steps_per_generation", "num_iterations"))


def check_place_in_data(trainer: Trainer, loader: Any, checkpoint: str | Path) -> None:
    """
    Refuse a resume that would go on at another place in the data than the checkpoint had reached.

    A checkpoint with a manifest says how many rows its updates had. Of another one the number of updates per epoch is
    known, from `epoch` and `global_step` in its state: it is compared where the two differ by more than rounding can.
    Nothing is checked with `ignore_data_skip=True`.

    Args:
        trainer (`Trainer`): Of the run that is resumed.
        loader: Its prepared training loader.
        checkpoint (`str` or `Path`): The `checkpoint-N`.

    Raises:
        MismatchError: names the rows per update of both, and a setting with which they are equal.
    """
    args, folder = trainer.args, Path(checkpoint)
    if args.ignore_data_skip:
        return
    now = layout_of(trainer, loader)
    try:
        manifest = read_manifest(folder) or {}
    except ValueError:  # told by whoever checks the files
        manifest = {}
    # Of a manifest that may be a stranger's: what is no count is not known.
    before = {key: value if type(value := manifest.get(key)) is int and value > 0 else None for key in now}
    if before["world_size"] not in (None, now["world_size"]):
        _check_order_of_lengths(args, before, now)
        if now["rows_per_update"] is None or _length(loader.dataset) is None:
            raise MismatchError(
                f"{folder.name} was trained on {before['world_size']} processes and its data is a stream, which each "
                f"number of processes divides otherwise. Resume on {before['world_size']} processes, or set "
                "ignore_data_skip=True to begin the stream anew."
            )
    if (layouts := _layouts(before, now)) is not None:
        if (difference := first_difference(*layouts)) is not None:
            raise MismatchError(
                f"{folder.name} was trained with another layout. {difference}. Other samples would enter the updates. "
                "Set per_device_train_batch_size, gradient_accumulation_steps and steps_per_generation such that "
                "these are equal, or ignore_data_skip=True to begin the pass anew."
            )
    elif before["rows_per_update"] is not None and now["rows_per_update"] is not None:
        if before["rows_per_update"] != now["rows_per_update"]:
            raise MismatchError(_of_rows(folder, before, now))
    elif not manifest and not _ordered_by_us(loader):
        _check_updates_per_epoch(folder, loader, args)


def place_in_stream(trainer: Trainer, checkpoint: str | Path, place: tuple[int, int]) -> tuple[int, int]:
    """
    Return the pass over a stream that a checkpoint was in, and the batches of it that were trained on.

    A Trainer does not know how long a stream is and takes it that the run is in its first pass: it skips as many
    batches as were ever trained on, comes to the end of the stream, and goes on with the begin of the second pass.
    What it stored of the epoch has both: `epoch = pass + batches / (max_steps x accumulation steps)`.

    Args:
        trainer (`Trainer`): Of the run that is resumed, with its state.
        checkpoint (`str` or `Path`): The `checkpoint-N`.
        place (`tuple[int, int]`): What the Trainer itself would do, which is kept for data with a length.
    """
    args, path = trainer.args, Path(checkpoint) / TRAINER_STATE_NAME
    if _length(trainer.train_dataset) is not None or args.ignore_data_skip or not path.is_file():
        return place
    stored = json.loads(path.read_text(encoding="utf-8"))
    epoch, updates = stored.get("epoch"), stored.get("max_steps")
    if type(epoch) not in (int, float) or type(updates) is not int or not (0 <= epoch < float("inf")) or updates < 1:
        return place
    passes = int(epoch + 1e-9)
    return passes, round((epoch - passes) * updates * args.gradient_accumulation_steps)


def continue_prompts(trainer: Trainer, loader: Any) -> None:
    """
    Let TRL's own trainer that generates its rows go on where a checkpoint had stopped. Nothing for any other Trainer.

    TRL's `RepeatSampler` draws the order of the first pass in each process that it starts in, and its count of
    micro-steps begins at 0, so that generations begin at other steps. Order and count are brought to the place of the
    checkpoint. Rollouts of a generation that is not finished are not part of a stock checkpoint: the rest of it is
    made anew, which is said.

    Args:
        trainer (`Trainer`): Of the run that is resumed, with its state.
        loader: Its prepared training loader.
    """
    batches = getattr(loader, "batch_sampler", None)
    inner = getattr(batches, "batch_sampler", batches)
    sampler: Any = getattr(inner, "sampler", None)
    # A sampler with `next_pass` keeps its pass itself, and its trainer the rollouts.
    if not (generates(trainer.args) and hasattr(sampler, "mini_repeat_count")) or hasattr(sampler, "next_pass"):
        return
    if trainer.args.ignore_data_skip:
        return
    layout, prompts = GenerationLayout.of(trainer.args), sampler.num_samples
    updates = layout.updates_per_pass(prompts)
    if sampler.shuffle and sampler.seed is not None:
        for _ in range(trainer.state.global_step // updates):
            torch.randperm(prompts, generator=sampler.generator)
    step = layout.steps_of(trainer.state.global_step, layout.steps_per_pass(prompts))
    host: Any = trainer  # one that counts micro-steps
    host._step = step
    if not layout.starts_generation(step) and trainer.is_world_process_zero():
        logger.warning(
            f"The checkpoint of update {trainer.state.global_step} lies inside of a generation, whose rollouts this "
            "trainer does not save: they are made anew, by the weights of now. hf_effi.EffiGRPOTrainer saves them."
        )


def seed_new_process(trainer: Trainer, checkpoint: str | Path) -> bool:
    """
    Seed the random numbers of a process for which a checkpoint has no state, and return whether it did.

    The seed is a function of `args.seed`, the update and the number of the process; a stock Trainer leaves the numbers
    as they are, which differ from start to start.

    Raises:
        BrokenFileError: the checkpoint is of as many processes as there are now, and has lost the file of this one.
    """
    args, folder = trainer.args, Path(checkpoint)
    name = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    missing = not (folder / name).is_file() and any(folder.glob("rng_state*.pth"))
    if args.world_size > 1 and processes_of(trainer.state) == args.world_size:
        # Together: a process that raised alone would leave the others waiting.
        if lost := [found for found in gather_object([name if missing else None]) if found is not None]:
            raise missing_file(folder / lost[0])
    if not missing:
        return False
    text = f"{args.seed}/{trainer.state.global_step}/{args.process_index}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    if args.process_index == 0:
        logger.warning(
            f"{folder.name} was trained on another number of processes. Samples and updates go on as they would have; "
            "random numbers, of dropout for one, go on from new seeds."
        )
    return True


def _layouts(before: dict[str, Any], now: dict[str, Any]) -> tuple[GenerationLayout, GenerationLayout] | None:
    """Return the layouts of two runs that generate their rows; `None` where one does not say its own."""

    def layout(facts: dict[str, Any]) -> GenerationLayout | None:
        fields: dict[str, Any] = {field: facts.get(name) for name, field in _OF_GENERATIONS.items()}
        fields |= {"accumulation_steps": facts["gradient_accumulation_steps"], "world_size": facts["world_size"]}
        if any(value is None for value in fields.values()):
            return None
        try:
            return GenerationLayout(**fields)
        except ValueError:  # counts that no run had
            return None

    one, other = layout(before), layout(now)
    return None if one is None or other is None else (one, other)


def _ordered_by_us(loader: Any) -> bool:
    """Return whether a sampler of ours is in a loader: it keeps its own place, and epochs may differ in length."""
    batches = getattr(loader, "batch_sampler", None)
    inner = getattr(batches, "batch_sampler", batches)  # of accelerate's, which deals batches to processes
    samplers = (getattr(loader, "sampler", None), inner, getattr(inner, "sampler", None))
    return any(isinstance(sampler, EffiSampler) for sampler in samplers)


def _check_order_of_lengths(args: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    if args.train_sampling_strategy == "random":
        return
    per_process = [layout["rows_per_process"] * layout["gradient_accumulation_steps"] for layout in (before, now)]
    if per_process[0] != per_process[1]:
        raise MismatchError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} orders the rows by what one process takes in "
            f"an update: {per_process[0]} before, {per_process[1]} now. Resume on {before['world_size']} processes."
        )


def _check_updates_per_epoch(folder: Path, loader: Any, args: Any) -> None:
    before, batches = _updates_per_epoch(folder), _length(loader)
    if before is None or batches is None:
        return
    now = batches / args.gradient_accumulation_steps
    # Both are rounded to whole batches of one process.
    if abs(before - now) > 1.01 and abs(before - now) > 0.1 * now:
        raise MismatchError(
            f"{folder.name} was trained with {before:.1f} updates per epoch, this run has {now:.1f}: it has another "
            "number of rows per update (processes x per_device_train_batch_size x gradient_accumulation_steps), or "
            "another dataset. The Trainer counts finished updates and would go on at another place in the data. Set "
            "what it was trained with, or ignore_data_skip=True to begin the epoch anew."
        )


def _of_rows(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    rows, world = before["rows_per_update"], now["world_size"]
    steps = now["gradient_accumulation_steps"]
    fits = [
        f"{name}={value}"
        for name, value in (
            ("gradient_accumulation_steps", rows * steps / now["rows_per_update"]),
            ("per_device_train_batch_size", rows * now["rows_per_process"] / now["rows_per_update"]),
        )
        if value == int(value) and value >= 1
        for value in [int(value)]
    ]
    way = f"Set {' or '.join(fits)}" if fits else f"Resume on {before['world_size']} processes"
    return (
        f"{folder.name} was trained with {rows} rows per update ({before['world_size']} processes x "
        f"{before['rows_per_process']} x {before['gradient_accumulation_steps']} accumulation steps), this run has "
        f"{now['rows_per_update']} ({world} x {now['rows_per_process']} x {steps}): the Trainer counts finished "
        f"updates, and other samples would enter them. {way}, or ignore_data_skip=True to begin the epoch anew."
    )


def _length(sized: Any) -> int | None:
    """Return the length of a loader or a dataset; `None` for a stream, which has the method and raises in it."""
    try:
        return len(sized)
    except TypeError:
        return None


def _updates_per_epoch(folder: Path) -> float | None:
    """Return global_step / epoch of a checkpoint; `None` where it does not say."""
    path = folder / TRAINER_STATE_NAME
    if not os.path.isfile(path):
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    step, epoch = state.get("global_step"), state.get("epoch")
    known = type(step) is int and type(epoch) in (int, float) and epoch > 0
    return step / epoch if known and step else None
