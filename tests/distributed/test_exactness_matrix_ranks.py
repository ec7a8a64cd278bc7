"""The rows of the exactness matrix with two processes, and the files that each of them has in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_effi.errors import BrokenFileError
from tests.helpers import run_distributed
from tests.helpers.exactness import Row, _SaveAt, build, covering_design, faults_of


def faults(folder: str) -> dict[str, list[str]]:
    torch.set_num_threads(1)
    rows = [row for row in covering_design() if row.ranks == 2]
    return {str(row): faults_of(row, Path(folder) / str(number)) for number, row in enumerate(rows)}


def test_stopped_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    for found in run_distributed(faults, 2, str(tmp_path), timeout=400):
        assert found and not any(found.values()), {row: names for row, names in found.items() if names}


def without_a_rank(folder: str) -> list[str]:
    said = []
    for trainer, plug in (("Trainer", "nothing"), ("GRPO", "nothing")):
        row = Row(trainer, "full", "map", 2, "inside of an epoch, not logged", plug)
        path = Path(folder) / trainer
        build(row, path, [_SaveAt(5)]).train()
        if torch.distributed.get_rank() == 0:
            (path / "checkpoint-5" / "hf_effi_manifest.json").unlink(missing_ok=True)
            (path / "checkpoint-5" / "rng_state_1.pth").unlink()
        torch.distributed.barrier()
        try:
            build(row, path, []).train(resume_from_checkpoint=str(path / "checkpoint-5"))
        except BrokenFileError as error:
            said.append(str(error))
        torch.distributed.barrier()
    return said


def test_the_lost_random_state_of_a_rank_is_named(tmp_path: Path) -> None:
    for said in run_distributed(without_a_rank, 2, str(tmp_path)):
        assert len(said) == 2 and all("has no rng_state_1.pth" in text for text in said)
