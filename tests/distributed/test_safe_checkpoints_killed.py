"""SIGKILL inside each phase of a save, on one process and on two: what is left resumes to the bit."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hf_effi.checkpoint import find_resumable, list_checkpoints
from tests.helpers import assert_bitwise_equal
from tests.helpers.distributed import ChildFailure, Children, reference_to, run_distributed

#: phase in which the save of step 4 is ended -> the step that a resume goes on from
PHASES = {"write": 2, "sync": 2, "seal": 2, "rename": 4, "clean": 4, "rotate": 4}


@mock.patch("hf_effi.checkpoint.safe._SMALL", 1)  # every file is written later
def train(folder: str, phase: str | None = None, grpo: bool = False, mode: str = "sync") -> dict[str, Any]:
    """Train 6 updates with a save at each second one; SIGKILL all of a job in `phase` of the save of step 4."""
    from hf_effi.checkpoint import safe
    from tests.helpers import weights_of
    from tests.training.test_resume_mixin import effi
    from tests.training.test_resume_mixin import grpo as grpo_trainer

    def at(self: Any, now: str) -> None:
        if now == phase and self.trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(self: Any, *args: Any) -> None:
        real(self, *args)
        if phase == "after" and self.trainer.state.global_step == 4:  # handed over, and hardly written
            os.kill(os.getpid(), signal.SIGKILL)

    real, safe.SafeCheckpointer._save = safe.SafeCheckpointer._save, save
    safe.SafeCheckpointer.at = at
    over = {"max_steps": 6, "save_total_limit": 1, "safe_checkpoints": mode, "per_device_train_batch_size": 4}
    trainer = grpo_trainer(Path(folder), **over) if grpo else effi(Path(folder), num_train_epochs=2, **over)
    trainer.train(resume_from_checkpoint="auto")
    return weights_of(trainer.model)


def killed(folder: Path, *args: Any, world_size: int = 1) -> None:
    """Run `train` in children that are all killed once one of them is."""
    module, name, file = reference_to(train)
    job = {"module": module, "name": name, "file": file, "args": (str(folder), *args), "kwargs": {}}
    with tempfile.TemporaryDirectory() as directory:
        children = Children(job, world_size, Path(directory))
        try:
            with pytest.raises(ChildFailure, match="exit codes"):
                children.wait(240)
        finally:
            children.kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    return {world: run_distributed(train, world, str(tmp_path_factory.mktemp(f"whole{world}")))[0] for world in (1, 2)}


@pytest.mark.parametrize("phase", PHASES)
def test_one_process(tmp_path: Path, whole: dict[int, Any], phase: str) -> None:
    killed(tmp_path, phase)
    reports = list_checkpoints(tmp_path, "content")
    assert reports and all(report.whole for report in reports)
    after = run_distributed(train, 1, str(tmp_path))[0]
    assert_bitwise_equal(whole[1], after)
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name or path.name.startswith(".")] == [
        "checkpoint-6"
    ]


@pytest.mark.parametrize("phase", ["sync", "rename"])
def test_two_processes(tmp_path: Path, whole: dict[int, Any], phase: str) -> None:
    killed(tmp_path, phase, world_size=2)
    assert all(report.whole for report in list_checkpoints(tmp_path, "content"))
    results = run_distributed(train, 2, str(tmp_path))
    for result in results:
        assert_bitwise_equal(whole[2], result)


def test_a_thread_of_grpo(tmp_path: Path) -> None:
    expected = run_distributed(train, 1, str(tmp_path / "whole"), None, True)[0]
    killed(tmp_path / "run", "seal", True, "thread")
    assert find_resumable(tmp_path / "run").path.name == "checkpoint-2"
    assert_bitwise_equal(expected, run_distributed(train, 1, str(tmp_path / "run"), None, True, "thread")[0])


def test_the_process_that_writes_outlives_a_trainer_that_is_killed(tmp_path: Path) -> None:
    killed(tmp_path, "after", False, "process")
    # `auto` waits for whoever still writes, and finds what the killed trainer had handed over.
    run_distributed(resume_and_tell, 1, str(tmp_path))
    assert (tmp_path / "found").read_text() == "checkpoint-4"


def resume_and_tell(folder: str) -> None:
    from hf_effi.checkpoint import repair_run_dir

    repair_run_dir(folder)
    Path(folder, "found").write_text(find_resumable(folder).path.name)
