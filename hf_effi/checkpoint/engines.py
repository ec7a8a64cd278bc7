"""What a background save is refused for, and what a failed one says."""

from __future__ import annotations

import shutil

from transformers import Trainer

from ..errors import RefusedError
from .commit import Commit
from .folders import find_resumable


def check_engine(trainer: Trainer, mode: str) -> None:
    """Refuse the background where an engine writes the state by code of its own."""
    if trainer.is_deepspeed_enabled:
        engine = "DeepSpeed, whose own code writes the sharded state"
    elif not trainer.is_fsdp_enabled:
        return
    elif trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        engine = 'FSDP1, whose states are not those of FSDP2 (fsdp_config={"version": 2})'
    elif trainer.args.save_on_each_node:
        engine = "FSDP with save_on_each_node=True, where no node has all shards (use a shared output_dir)"
    else:
        return
    raise RefusedError(
        f'mode={mode!r} does not write in the background under {engine}. Use mode="sync": its checkpoints are as '
        "whole."
    )


def failure_text(commit: Commit, problem: str) -> str:
    """Return what to tell of a save that failed: what is still there, and what to do."""
    rest = f"To go on from, {commit.run_dir} has {find_resumable(commit.run_dir, 'size')}."
    free = shutil.disk_usage(commit.run_dir).free if commit.run_dir.exists() else 0
    return (
        f"{commit.final.name} could not be saved ({problem}); what was there before is untouched. {rest} "
        f"{commit.run_dir} has {free / 2**30:.2f} GiB free. Make room or give another output_dir, then "
        'trainer.train(resume_from_checkpoint="auto").'
    )
