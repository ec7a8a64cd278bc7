"""Checkpoints: saved safely, checked, found again, averaged; and exact copies of a training state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "CheckpointReport": "hf_effi.checkpoint.manifest",
    "MemorySnapshot": "hf_effi.checkpoint.memory_snapshot",
    "Resumable": "hf_effi.checkpoint.folders",
    "RewindCost": "hf_effi.checkpoint.memory_snapshot",
    "SafeCheckpointer": "hf_effi.checkpoint.safe",
    "average_checkpoints": "hf_effi.checkpoint.average",
    "find_resumable": "hf_effi.checkpoint.folders",
    "list_checkpoints": "hf_effi.checkpoint.folders",
    "measure_rewind": "hf_effi.checkpoint.memory_snapshot",
    "repair_run_dir": "hf_effi.checkpoint.folders",
    "restore_snapshot": "hf_effi.checkpoint.snapshot",
    "take_snapshot": "hf_effi.checkpoint.snapshot",
    "verify_checkpoint": "hf_effi.checkpoint.manifest",
    "written_in_probe": "hf_effi.checkpoint.probes",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .average import average_checkpoints as average_checkpoints
    from .folders import Resumable as Resumable
    from .folders import find_resumable as find_resumable
    from .folders import list_checkpoints as list_checkpoints
    from .folders import repair_run_dir as repair_run_dir
    from .manifest import CheckpointReport as CheckpointReport
    from .manifest import verify_checkpoint as verify_checkpoint
    from .memory_snapshot import MemorySnapshot as MemorySnapshot
    from .memory_snapshot import RewindCost as RewindCost
    from .memory_snapshot import measure_rewind as measure_rewind
    from .probes import written_in_probe as written_in_probe
    from .safe import SafeCheckpointer as SafeCheckpointer
    from .snapshot import restore_snapshot as restore_snapshot
    from .snapshot import take_snapshot as take_snapshot

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
