"""Checkpoints: saved safely, checked, found again, averaged; and exact copies of a training state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "AveragePlan": "hf_effi.checkpoint.average",
    "CheckpointReport": "hf_effi.checkpoint.manifest",
    "InstructionDelta": "hf_effi.checkpoint.merge_delta",
    "Interpolation": "hf_effi.checkpoint.merge_interpolate",
    "InterpolationRow": "hf_effi.checkpoint.merge_interpolate",
    "MemorySnapshot": "hf_effi.checkpoint.memory_snapshot",
    "Resumable": "hf_effi.checkpoint.folders",
    "RewindCost": "hf_effi.checkpoint.memory_snapshot",
    "RunAverage": "hf_effi.checkpoint.merge_runs",
    "SafeCheckpointer": "hf_effi.checkpoint.safe",
    "WeightFolder": "hf_effi.checkpoint.merge_files",
    "add_instruction_delta": "hf_effi.checkpoint.merge_delta",
    "average_checkpoints": "hf_effi.checkpoint.average",
    "average_runs": "hf_effi.checkpoint.merge_runs",
    "convert_checkpoint": "hf_effi.checkpoint.convert",
    "find_resumable": "hf_effi.checkpoint.folders",
    "interpolate": "hf_effi.checkpoint.merge_interpolate",
    "list_checkpoints": "hf_effi.checkpoint.folders",
    "measure_rewind": "hf_effi.checkpoint.memory_snapshot",
    "plan_average": "hf_effi.checkpoint.average",
    "repair_run_dir": "hf_effi.checkpoint.folders",
    "restore_snapshot": "hf_effi.checkpoint.snapshot",
    "search_coefficients": "hf_effi.checkpoint.merge_search",
    "take_snapshot": "hf_effi.checkpoint.snapshot",
    "verify_checkpoint": "hf_effi.checkpoint.manifest",
    "write_interpolation": "hf_effi.checkpoint.merge_interpolate",
    "written_in_probe": "hf_effi.checkpoint.probes",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .average import AveragePlan as AveragePlan
    from .average import average_checkpoints as average_checkpoints
    from .average import plan_average as plan_average
    from .convert import convert_checkpoint as convert_checkpoint
    from .folders import Resumable as Resumable
    from .folders import find_resumable as find_resumable
    from .folders import list_checkpoints as list_checkpoints
    from .folders import repair_run_dir as repair_run_dir
    from .manifest import CheckpointReport as CheckpointReport
    from .manifest import verify_checkpoint as verify_checkpoint
    from .memory_snapshot import MemorySnapshot as MemorySnapshot
    from .memory_snapshot import RewindCost as RewindCost
    from .memory_snapshot import measure_rewind as measure_rewind
    from .merge_delta import InstructionDelta as InstructionDelta
    from .merge_delta import add_instruction_delta as add_instruction_delta
    from .merge_files import WeightFolder as WeightFolder
    from .merge_interpolate import Interpolation as Interpolation
    from .merge_interpolate import InterpolationRow as InterpolationRow
    from .merge_interpolate import interpolate as interpolate
    from .merge_interpolate import write_interpolation as write_interpolation
    from .merge_runs import RunAverage as RunAverage
    from .merge_runs import average_runs as average_runs
    from .merge_search import search_coefficients as search_coefficients
    from .probes import written_in_probe as written_in_probe
    from .safe import SafeCheckpointer as SafeCheckpointer
    from .snapshot import restore_snapshot as restore_snapshot
    from .snapshot import take_snapshot as take_snapshot

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
