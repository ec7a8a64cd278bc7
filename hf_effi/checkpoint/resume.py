"""`resume_from_checkpoint="auto"`: the newest whole checkpoint, the same on every process, or a fresh start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..errors import BrokenFileError
from .folders import checkpoints_in, find_resumable, repair_run_dir
from .manifest import Level, verify_checkpoint
from .structure import OPTIMIZER_NAME, has_optimizer, step_of

logger = logging.get_logger(__name__)

AUTO = "auto"


def resolve_auto(trainer: Trainer, level: Level = "content") -> str | None:
    """
    Return the newest checkpoint in `args.output_dir` that is whole, and say which were skipped and why.

    The folder is put in order first ([`repair_run_dir`]). All processes return the same; where each node has a disk of
    its own (`save_on_each_node`), it is the newest one that is whole on every node.

    Args:
        trainer (`Trainer`): Of the run.
        level (`str`, *optional*, defaults to `"content"`): As in [`verify_checkpoint`].

    Returns:
        `str`, *optional*: A folder for `resume_from_checkpoint`; `None` where the run starts fresh.
    """
    run_dir, looks = Path(str(trainer.args.output_dir)), trainer.args.should_save
    repaired = repair_run_dir(run_dir) if looks else []
    there = {step_of(path) for path in checkpoints_in(run_dir)} if looks else None
    # Each process that saves has looked at a disk of its own, or is the only one.
    found = [steps for steps in _gather(trainer, there) if steps is not None]
    candidates = sorted(set.intersection(*found), reverse=True) if found else []
    skipped: list[str] = []
    chosen = None
    for step in candidates:
        folder = run_dir / f"checkpoint-{step}"
        problem = verify_checkpoint(folder, level).problem if looks else None
        problems = [text for text in _gather(trainer, problem) if text is not None]
        if not problems:
            chosen = folder
            break
        skipped.append(f"{folder.name}: {problems[0]}")
    if trainer.is_world_process_zero():
        _tell(run_dir, chosen, repaired, skipped)
    return None if chosen is None else str(chosen)


def check_given(trainer: Trainer, checkpoint: str | bool) -> None:
    """
    [`check_checkpoint`] of what `train(resume_from_checkpoint=...)` was given; `True` is the newest one.

    Raises:
        BrokenFileError: as in [`check_checkpoint`].
    """
    folder = get_last_checkpoint(str(trainer.args.output_dir)) if checkpoint is True else checkpoint
    if folder:  # else stock says that there is none
        check_checkpoint(folder, trainer.args.save_only_model)


def check_checkpoint(folder: str | Path, fresh_optimizer: bool = False) -> None:
    """
    Raise where a resume from this checkpoint would stop at a file that is not whole, or go on without one of them.

    Lengths and the structure of each file are looked at, in milliseconds.

    Args:
        folder (`str` or `Path`): A `checkpoint-N`. What is no folder is left to the Trainer.
        fresh_optimizer (`bool`, *optional*, defaults to `False`): Whether a checkpoint of weights alone is meant to be
            continued with a fresh optimizer (`args.save_only_model`); there is a warning otherwise.

    Raises:
        BrokenFileError: names the file, what is wrong with it, and the newest whole checkpoint beside this one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    problem = verify_checkpoint(folder, "size").problem
    if problem is None and not has_optimizer(folder) and not fresh_optimizer:
        logger.warning(
            f"{folder} holds weights and no {OPTIMIZER_NAME}, as save_only_model=True leaves it: optimizer, scheduler "
            "and random state begin anew. Resume from another checkpoint if that is not meant; save_only_model=True "
            "says that it is."
        )
    if problem is None:
        return
    whole = find_resumable(folder.parent, "size").path
    advice = (
        f"Resume from the newest whole checkpoint: resume_from_checkpoint={str(whole)!r}."
        if whole is not None
        else f"No other checkpoint in {folder.parent} is whole: start the run again."
    )
    raise BrokenFileError(
        f"{folder} is no whole checkpoint, as where a process was killed inside of a save: {problem}. {advice}"
    )


def _gather(trainer: Trainer, value: Any) -> list[Any]:
    return gather_object([value]) if trainer.args.world_size > 1 else [value]


def _tell(run_dir: Path, chosen: Path | None, repaired: list[str], skipped: list[str]) -> None:
    for sentence in repaired:
        logger.warning(f"{run_dir}: {sentence}")
    if skipped:
        logger.warning(f"Not whole, and skipped: {'; '.join(skipped)}.")
    if chosen is None:
        logger.warning(f'resume_from_checkpoint="auto": {run_dir} has no whole checkpoint, the run starts fresh.')
    else:
        logger.warning(f'resume_from_checkpoint="auto": the run goes on from {chosen}.')
