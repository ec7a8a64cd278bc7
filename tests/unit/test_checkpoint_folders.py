"""Manifests, commits, rotation and repair of checkpoint folders; every moment of a commit is interrupted once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_effi.checkpoint import find_resumable, list_checkpoints, repair_run_dir, verify_checkpoint
from hf_effi.checkpoint.commit import Commit
from hf_effi.checkpoint.folders import ASIDE, LOCK, TRASH, checkpoints_in, rotate
from hf_effi.checkpoint.manifest import MANIFEST, digest_of, read_manifest
from hf_effi.checkpoint.staging import StagedFile
from tests.helpers.distributed import ROOT, child_environment

FILES = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"}
PHASES = ["write", "sync", "seal", "replace", "rename", "clean", "rotate"]


def fill(folder: Path, step: int, value: float = 0.0) -> None:
    """Write what a stock Trainer writes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((64,), float(step) + value)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step, "state": torch.zeros(64)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "config.json").write_text("{}")


def commit(run: Path, step: int, value: float = 0.0, **over) -> Commit:
    made = Commit(run, step, **over)
    made.begin()
    fill(made.made, step, value)
    return made


def save(run: Path, step: int, value: float = 0.0, **over) -> Path:
    made = commit(run, step, value, **over)
    made.finish()
    return made.final


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_a_manifest_lists_every_file_with_its_length_and_digest(tmp_path):
    folder = save(tmp_path, 3, facts={"world_size": 2})
    content = json.loads((folder / MANIFEST).read_text())
    assert set(content["files"]) == FILES and content["step"] == 3 and content["world_size"] == 2
    for name, entry in content["files"].items():
        assert entry == {"bytes": (folder / name).stat().st_size, "crc32": digest_of(folder / name, "crc32")}
    assert set(content["versions"]) >= {"hf_effi", "torch", "transformers", "python"}


def test_digests_by_hand(tmp_path):
    (tmp_path / "x").write_bytes(b"123456789")
    assert digest_of(tmp_path / "x", "crc32") == "cbf43926"  # the check value of CRC-32
    (tmp_path / "x").write_bytes(b"abc")
    assert digest_of(tmp_path / "x", "sha256").startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize("digest", ["crc32", "sha256"])
@pytest.mark.parametrize("name", sorted(FILES | {MANIFEST}))
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "delete"])
def test_every_harm_to_every_file_is_found(tmp_path, digest, name, harm):
    good = save(tmp_path, 1, digest=digest)
    bad = save(tmp_path, 2, digest=digest)
    path = bad / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    new = {"flip": content, "cut": content[: len(content) // 2], "empty": b""}
    path.unlink() if harm == "delete" else path.write_bytes(new[harm])
    if name == MANIFEST and harm == "delete":
        assert find_resumable(tmp_path).path == bad, "it is then a checkpoint as stock writes them, and whole"
        assert not verify_checkpoint(bad).sealed
        return
    found = find_resumable(tmp_path)
    assert found.path == good and [report.path for report in found.skipped] == [bad]
    assert (name if name != MANIFEST or harm != "flip" else "") in found.skipped[0].problem
    if harm != "flip":
        assert find_resumable(tmp_path, "size").path == good, "lengths suffice for this"


def test_size_does_not_read_contents_and_says_so(tmp_path):
    bad = save(tmp_path, 2)
    content = bytearray((bad / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bad / "model.safetensors").write_bytes(content)
    assert verify_checkpoint(bad, "size").whole and not verify_checkpoint(bad, "content").whole


@pytest.mark.parametrize("name", ["training_args.bin", "README.md"])
def test_what_an_upload_leaves_out_may_be_missing(tmp_path, name):
    made = commit(tmp_path, 1)
    (made.made / name).write_text("x")
    made.finish()
    (made.final / name).unlink()
    assert verify_checkpoint(made.final).whole


def test_files_that_come_later_are_no_concern(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "notes.txt").write_text("later")
    assert verify_checkpoint(folder).whole


def test_a_manifest_of_a_newer_version_is_refused_by_name(tmp_path):
    folder = save(tmp_path, 1)
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "schema": 2}))
    assert "version 2, and this hf_effi reads version 1" in verify_checkpoint(folder).problem


@pytest.mark.parametrize("name", ["../x", "/dev/zero", "a/../../x", "a\\b", "a\0b"])
def test_a_manifest_of_a_stranger_does_not_lead_out_of_the_folder(tmp_path, name):
    folder = save(tmp_path, 1)
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = {"bytes": 0, "crc32": "00000000"}
    (folder / MANIFEST).write_text(json.dumps(content))
    assert "lists no files of this folder" in verify_checkpoint(folder).problem


def test_a_link_to_a_device_is_not_read(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    assert "config.json is no regular file" in verify_checkpoint(folder).problem


def test_a_checkpoint_that_was_renamed_to_another_step_is_not_whole(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "checkpoint-9")
    assert "step 1" in verify_checkpoint(tmp_path / "checkpoint-9").problem


@pytest.mark.parametrize("name", sorted(FILES - {"config.json", "model.safetensors"}))
def test_a_checkpoint_of_stock_without_one_of_its_halves_is_not_whole(tmp_path, name):
    fill(tmp_path / "checkpoint-1", 1)
    assert verify_checkpoint(tmp_path / "checkpoint-1").whole
    (tmp_path / "checkpoint-1" / name).unlink()
    assert f"{name} is missing" in verify_checkpoint(tmp_path / "checkpoint-1").problem


def test_a_state_of_another_step_is_found(tmp_path):
    fill(tmp_path / "checkpoint-1", 1)
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 2}')
    assert "of update 2" in verify_checkpoint(tmp_path / "checkpoint-1").problem


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="level='deep' is not one of"):
        verify_checkpoint(tmp_path, "deep")
    with pytest.raises(NotADirectoryError, match="Name a checkpoint-N folder"):
        verify_checkpoint(tmp_path / "none")
    assert list_checkpoints(tmp_path / "none") == [] and find_resumable(tmp_path / "none").path is None
    assert repair_run_dir(tmp_path / "none") == []


# --- a commit --------------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("phase", "same_step"),
    [(phase, same) for phase in PHASES for same in (False, True) if same or phase != "replace"],
)
def test_an_end_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, phase, same_step):
    """A killed process runs no `except`: the clean-up of a commit is taken away."""
    older = save(tmp_path, 5)
    step = 5 if same_step else 6

    def at(now):
        if now == phase:
            raise Ended

    made = commit(tmp_path, step, value=0.5, at=at, limit=1)
    monkeypatch.setattr(Commit, "abandon", lambda self, error=None: None)
    with pytest.raises(Ended):
        made.finish()
    made.release()  # as the system does for a process that ends
    monkeypatch.undo()
    for path in checkpoints_in(tmp_path):
        assert verify_checkpoint(path).whole, phase
    repair_run_dir(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    found = find_resumable(tmp_path)
    assert not found.skipped and found.path is not None
    sealed = phase in ("rename", "clean", "rotate")
    assert found.path.name == (f"checkpoint-{step}" if sealed else older.name)


def test_between_the_two_renames_of_one_step(tmp_path):
    """Neither has the name: the old one is back after a repair, or the new one where it was sealed."""
    save(tmp_path, 5)
    made = commit(tmp_path, 5, value=0.5)

    def rename(source, target):
        if Path(target) == made.final:
            os._exit(0)
        real(source, target)

    real = os.rename
    if (child := os.fork()) == 0:
        os.rename = rename
        made.finish()
    os.waitpid(child, 0)
    made.release()
    assert checkpoints_in(tmp_path) == [] and (made.aside / "replaced" / "checkpoint-5").is_dir()
    assert repair_run_dir(tmp_path) == ["checkpoint-5 was complete and got its name."]
    assert names(tmp_path) == ["checkpoint-5"] and verify_checkpoint(tmp_path / "checkpoint-5").whole


def test_an_unsealed_newer_one_gives_the_name_back(tmp_path):
    aside = tmp_path / f"{ASIDE}5"
    save(tmp_path, 5)
    (aside / "replaced").mkdir(parents=True)
    (tmp_path / "checkpoint-5").rename(aside / "replaced" / "checkpoint-5")
    fill(aside / "checkpoint-5", 5)
    done = repair_run_dir(tmp_path)
    assert done == [
        "checkpoint-5 was being written and not complete: deleted.",
        "checkpoint-5 had been moved out of the way and got its name back.",
    ]
    assert verify_checkpoint(tmp_path / "checkpoint-5").sealed


def test_a_failed_rename_puts_the_older_one_back(tmp_path, monkeypatch):
    older = save(tmp_path, 5)
    before = (older / MANIFEST).read_bytes()
    made, real = commit(tmp_path, 5, value=0.5), os.rename
    monkeypatch.setattr(
        "hf_effi.checkpoint.commit.os.rename",
        lambda a, b: real(a, b) if Path(a) != made.made else (_ for _ in ()).throw(OSError(28, "No space left")),
    )
    with pytest.raises(OSError, match="No space left"):
        made.finish()
    assert (older / MANIFEST).read_bytes() == before and names(tmp_path) == ["checkpoint-5"]


def test_a_state_in_memory_is_written_by_the_commit(tmp_path):
    made = commit(tmp_path, 1)
    made.writes = [
        StagedFile(made.made / "model.safetensors", "safetensors", {"weight": torch.ones(3)}, {"format": "pt"}),
        StagedFile(made.made / "optimizer.pt", "torch", {"a": torch.ones(2)}),
    ]
    made.finish()
    assert torch.equal(torch.load(made.final / "optimizer.pt", weights_only=True)["a"], torch.ones(2))
    assert verify_checkpoint(made.final).whole


def test_what_a_callback_put_there_before_the_name_is_taken_along(tmp_path):
    made = commit(tmp_path, 1)
    (made.final / "mine").mkdir(parents=True)
    (made.final / "mine" / "notes.txt").write_text("x")
    made.finish()
    assert (made.final / "mine" / "notes.txt").read_text() == "x" and names(tmp_path) == ["checkpoint-1"]
    assert "mine/notes.txt" in read_manifest(made.final)["files"]


# --- rotation and repair ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (2, 1, [1, 4]),
        (1, 2, [2, 4]),
    ],
)
def test_rotation_keeps_what_a_trainer_keeps(tmp_path, limit, best, left):
    for step in range(1, 5):
        save(tmp_path, step)
    rotate(tmp_path, limit, (tmp_path / f"checkpoint-{best}",) if best else ())
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_rotation_never_deletes_the_last_whole_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    rotate(tmp_path, 1)
    assert find_resumable(tmp_path).path == tmp_path / "checkpoint-1"
    assert "checkpoint-3" in names(tmp_path), "the newest stays, so that it can be looked at"


def test_repair_removes_what_a_rotation_had_begun_to_delete(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / f"{TRASH}abc")
    assert repair_run_dir(tmp_path) == [f"{TRASH}abc was being deleted: done."]
    assert names(tmp_path) == ["checkpoint-1"]


def test_repair_waits_for_a_writer_and_gives_up_by_name(tmp_path):
    made = commit(tmp_path, 1)
    made.release()
    code = (
        "import fcntl, sys, time\nfile = open(sys.argv[1], 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(1, flush=True)\ntime.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(made.aside / LOCK)], stdout=subprocess.PIPE, cwd=ROOT, env=child_environment()
    )
    try:
        holder.stdout.readline()
        with pytest.raises(TimeoutError, match="give this one an output_dir of its own"):
            repair_run_dir(tmp_path, wait_seconds=0.3)
        assert made.made.is_dir()
    finally:
        holder.kill()
        holder.wait()
    assert repair_run_dir(tmp_path) == ["checkpoint-1 was being written and not complete: deleted."]
