"""A Trainer's own save, led into a folder in progress: what it writes is what a stock Trainer writes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft.peft_model
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import transformers.modeling_utils
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from .._files import later
from .run_folder import saving_into
from .staging import Kind


@contextmanager
def replaced(instance: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own for a while."""
    missing = object()
    before = vars(instance).get(name, missing)
    setattr(instance, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(instance, name)
        else:
            setattr(instance, name, before)


@contextmanager
def led_aside(trainer: Trainer, aside: Path) -> Iterator[list[str]]:
    """
    Let a Trainer write its next checkpoint into `aside`, and give the folders that it would have pushed.

    The rotation of a Trainer looks into the same folder and finds one checkpoint there, so it deletes nothing.
    """
    pushes: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(saving_into(trainer.state, aside))
        stack.enter_context(replaced(trainer, "_get_output_dir", lambda trial=None: str(aside)))
        stack.enter_context(replaced(trainer, "_push_from_checkpoint", pushes.append))
        yield pushes


@contextmanager
def deferring(
    folder: Path,
    take: Callable[[Path, Kind, Any, dict[str, str] | None], bool],
    take_shards: Callable[[Path, dict[str, Any], Any], bool],
) -> Iterator[None]:
    """
    Offer each state that this thread writes into `folder` to `take`, which returns whether it will write it.

    A sharded one, which all processes write together by `torch.distributed.checkpoint`, is offered to `take_shards`.
    What other threads write, and what goes elsewhere, is written as always.
    """
    thread, folder = threading.get_ident(), folder.resolve()

    def ours(path: Any) -> bool:
        if threading.get_ident() != thread or not isinstance(path, (str, os.PathLike)):
            return False
        target = Path(path).resolve()
        # A name that begins with `_` is renamed by whoever writes it.
        return folder in target.parents and not target.name.startswith("_")

    def torch_save(content: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if args or kwargs or not ours(f) or not take(Path(f), "torch", content, None):
            original_torch_save(content, f, *args, **kwargs)

    def save_file(tensors: Any, filename: Any, metadata: dict[str, str] | None = None) -> None:
        if not ours(filename) or not take(Path(filename), "safetensors", tensors, metadata):
            original_save_file(tensors, filename, metadata=metadata)

    def save_shards(state_dict: Any, *, storage_writer: Any = None, planner: Any = None, **kwargs: Any) -> Any:
        plain = type(storage_writer) is dcp.FileSystemWriter and type(planner) is dcp.DefaultSavePlanner
        if kwargs or not plain or not ours(path := Path(storage_writer.checkpoint_id) / "file"):
            return original_save(state_dict, storage_writer=storage_writer, planner=planner, **kwargs)
        if not take_shards(path.parent, state_dict, planner):
            return original_save(state_dict, storage_writer=storage_writer, planner=planner)

    original_torch_save, original_save_file = torch.save, safetensors.torch.save_file
    original_save = dcp.save
    names: list[tuple[Any, str, Any]] = [(torch, "save", torch_save), (safetensors.torch, "save_file", save_file)]
    names += [(dcp, "save", save_shards)]
    names += [(module, "safe_save_file", save_file) for module in (transformers.modeling_utils, peft.peft_model)]
    token = later.set(lambda path, state: take(path, "torch", state, None))
    try:
        with ExitStack() as stack:
            for module, name, value in names:
                stack.enter_context(replaced(module, name, value))
            yield
    finally:
        later.reset(token)


def write_checkpoint(
    trainer: Trainer, save: Callable[[], None], aside: Path, made: Path, final: Path, leader: bool
) -> list[str]:
    """
    Let a Trainer and its callbacks write a checkpoint into a folder in progress.

    Args:
        save (`Callable[[], None]`): The Trainer's own `_save_checkpoint` with its arguments.
        aside, made, final (`Path`): The folder in progress, the checkpoint in it, and where it will be found.
        leader (`bool`): Whether this process writes `trainer_state.json`.

    Returns:
        `list[str]`: The folders that the Trainer would have pushed.
    """
    state, before = trainer.state, trainer.state.best_model_checkpoint
    try:
        with led_aside(trainer, aside) as pushes:
            save()
            for callback in trainer.callback_handler.callbacks:
                if (write_side_file := getattr(callback, "write_side_file", None)) is not None:
                    write_side_file(trainer.args, state)
    finally:
        # A Trainer looks for the best checkpoint where it saves, and finds it there if it is this one.
        state.best_model_checkpoint = _best_of(state, before, made, final)
    if leader:
        state.save_to_json(str(made / TRAINER_STATE_NAME))
    return pushes


def _best_of(state: Any, before: str | None, made: Path, final: Path) -> str | None:
    if not state.best_global_step:
        return before
    best = final.with_name(f"checkpoint-{state.best_global_step}")
    there = best.exists() or (best == final and made.exists())
    return str(best) if there else before
