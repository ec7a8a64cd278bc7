"""
Stopped and resumed equals uninterrupted, to the bit: each trainer, tuning, kind of data, stop and stateful object of
ours, by a covering design; the rows of two processes are in tests/distributed/test_exactness_matrix_ranks.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi.checkpoint.manifest import MANIFEST
from hf_effi.errors import BrokenFileError
from tests.helpers import exactness
from tests.helpers.exactness import CALLBACKS, ON_ITS_OWN_MODEL, PLUGS, SAMPLERS, Row, covering_design, faults_of

DESIGN = covering_design()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_every_stateful_object_is_in_the_matrix() -> None:
    """A new one fails here until it has an entry in tests/helpers/exactness.py."""
    assert exactness.stateful_callbacks() == set(CALLBACKS) | set(ON_ITS_OWN_MODEL)
    assert exactness.stateful_samplers() == set(SAMPLERS)
    plugged = {name for names in PLUGS.values() for name in names}
    assert plugged == set(CALLBACKS) | set(SAMPLERS) | {"SpeculativeReuse"}  # an argument of the trainer


def test_the_design_covers_every_pair_that_is_allowed() -> None:
    import itertools

    every = [row for values in itertools.product(*exactness.FACTORS.values()) if (row := Row(*values)).allowed()]
    wanted = {pair for row in every for pair in exactness._pairs(row)}
    assert wanted == {pair for row in DESIGN for pair in exactness._pairs(row)}
    assert len(DESIGN) < len(every) / 5


def name_of(row: Row) -> str:
    return "-".join([row.trainer, row.tuning, row.data, row.stop.rsplit(", ", 1)[1].replace(" ", "_"), row.plug])


@pytest.mark.filterwarnings("ignore::hf_effi.errors.DecayToZeroWarning")
@pytest.mark.parametrize("row", [row for row in DESIGN if row.ranks == 1], ids=name_of)
def test_stopped_and_resumed_is_uninterrupted(tmp_path: Path, row: Row) -> None:
    assert not faults_of(row, tmp_path)


def test_stock_alone_is_not(tmp_path: Path) -> None:
    """What is repaired: a stream in its second pass, and the loss of a log that spans the stop."""
    logged, not_logged = exactness.STOPS
    found = faults_of(Row("Trainer", "full", "stream", 1, logged, "nothing"), tmp_path / "stream", attach=False)
    assert any("[weights]" in fault for fault in found)
    found = faults_of(Row("Trainer", "full", "map", 1, not_logged, "nothing"), tmp_path / "log", attach=False)
    assert found and all("[logs]" in fault and "[loss]" in fault for fault in found)


# --- a file that is missing -----------------------------------------------------------------------------------------

#: file -> words of the error. Without a manifest the file is missed by what a checkpoint must have.
MISSING = {
    "optimizer.pt": "optimizer.pt is missing",
    "scheduler.pt": "scheduler.pt is missing",
    "rng_state.pth": "rng_state.pth is missing",
    "trainer_state.json": "trainer_state.json is missing",
    "model.safetensors": "model.safetensors is missing",
    "effi_average.pt": "effi_average.pt is missing",
    "effi_sampler.pt": "effi_sampler.pt",
}
ROWS = {
    "stock with a checkpointer": Row("Trainer", "full", "map", 1, "inside of an epoch, logged", "SelfPacedSampler"),
    "ours": Row("SFT", "full", "map", 1, "inside of an epoch, logged", "observers"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folders = {}
    for name, row in ROWS.items():
        folders[name] = tmp_path_factory.mktemp("saved")
        exactness.build(row, folders[name], [exactness._SaveAt(4)]).train()
    return folders


CASES = [
    (which, name, sealed)
    for which, own, ways in (
        ("stock with a checkpointer", "effi_sampler.pt", ("sealed", "not sealed")),
        ("ours", "effi_average.pt", ("not sealed",)),
    )
    for name in MISSING
    for sealed in ways
    if not name.startswith("effi_") or name == own
]


@pytest.mark.parametrize(("which", "name", "sealed"), CASES)
def test_a_missing_file_is_named(saved: dict[str, Path], tmp_path: Path, which: str, name: str, sealed: str) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(saved[which] / "checkpoint-4", checkpoint)
    if sealed == "not sealed":
        (checkpoint / MANIFEST).unlink(missing_ok=True)
    (checkpoint / name).unlink()
    error, words = (BrokenFileError, MISSING[name])
    if name == "model.safetensors" and sealed == "not sealed":
        error, words = ValueError, "Can't find a valid checkpoint at"  # the Trainer's own
    for resume in (str(checkpoint), True):
        trainer: Any = exactness.build(ROWS[which], tmp_path, [])
        with pytest.raises(error, match=words):
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step in (0, 4), "nothing was trained"
