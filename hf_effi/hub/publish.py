"""Publishing a trainer's run: card, recipe, record and weights, from copies that training cannot overwrite."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .._compat import installed_versions
from .._environment import describe_machine
from .._files import CHECKPOINT_PREFIXES, drop_link
from .._run_record import EVENTS, FOLDER, SUMMARY, has_record, read_run
from ..callbacks.observer import describe
from ..functional.probes import without_probes
from .model_card import PICTURE, add_section
from .recipe import RECIPE_FILE, recipe_of
from .uploads import HubUploader

logger = logging.getLogger(__name__)
CARD = "README.md"
#: `training_args.bin` is a pickle with the write token in it; the recipe has the same arguments without.
NOT_UPLOADED = ("_*", f"{FOLDER}/_*", "checkpoint-*", "**/training_args.bin", "training_args.bin")
#: Of a checkpoint, what continues the training and is no part of the model.
_TRAINING_STATE = (
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "trainer_state",
    "training_args",
    *CHECKPOINT_PREFIXES,
)


#: Of `ddp_timeout`, after which the other processes give up on the first one, what it may wait for the Hub.
_SHARE_OF_TIMEOUT = 0.8


def uploader_for(args: Any, repo_id: str, seconds: float | None) -> HubUploader:
    """
    Return an uploader that follows the `hub_*` arguments of a trainer.

    Raises:
        ValueError: while one process waited for `seconds`, the others would run into `ddp_timeout`.
    """
    if seconds is None:
        seconds = _SHARE_OF_TIMEOUT * args.ddp_timeout
    else:
        check_seconds(args, seconds)
    return HubUploader(
        repo_id,
        token=args.hub_token,
        private=args.hub_private_repo,
        revision=args.hub_revision,
        seconds=seconds,
        keep_all=args.hub_always_push,
    )


def check_seconds(args: Any, seconds: float) -> None:
    """
    Check how long a run may wait for the Hub.

    Raises:
        ValueError: no number above 0, or one that is no less than `ddp_timeout` with several processes.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"Waiting {seconds!r} s for the Hub: it must be a number above 0.")
    if args.world_size > 1 and seconds >= args.ddp_timeout:
        raise ValueError(
            f"Waiting {seconds:g} s for the Hub must be shorter than ddp_timeout={args.ddp_timeout}, as the other "
            "processes wait too. Lower it, or raise ddp_timeout."
        )


def write_section(trainer: Any, repo_id: str) -> None:
    """
    Add the section to the card in `output_dir`. Whatever goes wrong is no reason to end a run: it becomes a warning.
    """
    folder = Path(trainer.args.output_dir)
    try:
        run = read_run(folder) if has_record(folder) else _run_without_a_record(trainer)
        secrets = [trainer.args.hub_token] if trainer.args.hub_token else []
        add_section(folder / CARD, recipe_of(trainer), run, repo_id, secrets)
    except Exception as error:
        logger.warning("The model card is without its recipe: %s", describe(error))


def make_room_for_card(output_dir: str | Path) -> None:
    """Take a symbolic link out of the place of the card, which a Trainer would follow as it writes one."""
    drop_link(Path(output_dir) / CARD)


def _run_without_a_record(trainer: Any) -> dict[str, Any]:
    return {
        "log_history": without_probes(trainer.state.log_history),
        "machine": describe_machine(),
        "versions": installed_versions(),
        "processes": trainer.args.world_size,
    }


def snapshot(output_dir: str | Path, checkpoint: str | Path, path_in_repo: str | None = None) -> Path:
    """
    Return a new folder with the model of a checkpoint, the card and the record, which nothing changes any more.

    The checkpoint's files are linked where the file system can: they are written once. The others are copied.

    Args:
        path_in_repo (`str`, *optional*): Where the whole checkpoint goes as well, such as `last-checkpoint`.
    """
    output_dir, checkpoint = Path(output_dir), Path(checkpoint)
    folder, outside = Path(tempfile.mkdtemp(prefix="_effi_upload_", dir=output_dir)), links_out_of(checkpoint)
    try:
        for source in sorted(checkpoint.rglob("*")):
            relative = source.relative_to(checkpoint)
            if source.is_dir() or source.name == "training_args.bin" or glob.escape(relative.as_posix()) in outside:
                continue
            if path_in_repo is not None:
                _link(source, folder / path_in_repo / relative)
            if len(relative.parts) == 1 and not source.name.startswith(_TRAINING_STATE):
                _link(source, folder / relative)
        for name in (CARD, PICTURE, RECIPE_FILE, f"{FOLDER}/{SUMMARY}", f"{FOLDER}/{EVENTS}"):
            source = output_dir / name
            if source.is_file() and not _leads_out(source, output_dir):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy2(source, folder / name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _leads_out(source: Path, folder: Path) -> bool:
    """Whether a symbolic link leads a path out of the folder: what lies there is not known to be of the run."""
    return not source.resolve().is_relative_to(folder.resolve())


def links_out_of(folder: str | Path) -> list[str]:
    """
    Return a pattern for each symbolic link that leads out of a folder; an upload would follow it.

    They are named in a warning: a link to weights elsewhere may have been meant.
    """
    folder = Path(folder)
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() and _leads_out(path, folder)]
    if found:
        names = ", ".join(str(path) for path in found[:5])
        logger.warning("Not uploaded, as links lead out of %s: %s. Copy the files there instead.", folder, names)
    return [glob.escape(path.as_posix()) for path in found]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)  # another file system, or one without links


def push_checkpoint(
    uploader: HubUploader,
    output_dir: str | Path,
    checkpoint: str | Path,
    message: str,
    path_in_repo: str | None = None,
) -> None:
    """
    Upload the model of a checkpoint beside training. Without room for the copy it is left out, with an error log.
    """
    try:
        folder = snapshot(output_dir, checkpoint, path_in_repo)
    except Exception as error:
        logger.error("%s was not pushed to %s: %s", checkpoint, uploader.repo_id, describe(error))
        return
    uploader.submit(folder, message, ignore=("training_args.bin",), temporary=True)
