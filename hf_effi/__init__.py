"""hf_effi: keep the Trainer you have, add one line, train for less.

What most users type is here; the rest is in rooms: `hf_effi.schedules`, `hf_effi.samplers`, `hf_effi.data`,
`hf_effi.callbacks`, `hf_effi.memory`, `hf_effi.attention`, `hf_effi.kernels`, `hf_effi.layers`, `hf_effi.parallel`,
`hf_effi.checkpoint`, `hf_effi.recipes`, `hf_effi.report`, `hf_effi.hub`, `hf_effi.errors`, `hf_effi.trainers` and
`hf_effi.trainers.mixins`. All names are loaded on first use: `import hf_effi` imports neither trl nor triton.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from ._faces import face
from ._version import __version__

#: public name -> module that defines it
_PUBLIC = {
    "ActivationOffloadCallback": "hf_effi.callbacks.layer_modes",
    "EffiGRPOConfig": "hf_effi.trainers.grpo.config",
    "EffiGRPOTrainer": "hf_effi.trainers.grpo.trainer",
    "EffiSFTConfig": "hf_effi.trainers.sft",
    "EffiSFTTrainer": "hf_effi.trainers.sft",
    "EffiTrainer": "hf_effi.trainers.trainer",
    "EffiTrainingArguments": "hf_effi.trainers.trainer",
    "GRPODoctor": "hf_effi.callbacks.doctor",
    "HubCallback": "hf_effi.hub.callback",
    "KernelPatchCallback": "hf_effi.callbacks.kernel_patch",
    "LRScheduleCallback": "hf_effi.callbacks.lr_schedule",
    "METHODS": "hf_effi.methods",
    "MemoryBudgetCallback": "hf_effi.callbacks.layer_modes",
    "PatchCallback": "hf_effi.callbacks.patch",
    "RunRecordCallback": "hf_effi.callbacks.run_record",
    "SamplerCallback": "hf_effi.callbacks.sampler",
    "SelectiveCheckpointCallback": "hf_effi.callbacks.layer_modes",
    "TrainDoctor": "hf_effi.callbacks.doctor",
    "WeightAveragingCallback": "hf_effi.callbacks.weight_averaging",
    "accelerate_config": "hf_effi.recipes.launch",
    "from_card": "hf_effi.hub.recipe",
    "patch": "hf_effi.kernels",
    "plan_memory": "hf_effi.report.plan_memory",
    "read_run": "hf_effi._run_record",
    "unpatch": "hf_effi.patching.handle",
}
#: packages without a face
_NO_ROOMS = ("_methods", "demo", "functional", "patching")
#: rooms whose faces have public names: every other package, and the table
_ROOMS = (
    *sorted(found.name for found in pkgutil.iter_modules(__path__) if found.ispkg and found.name not in _NO_ROOMS),
    "methods",
    "errors",
)

if TYPE_CHECKING:  # what editors and type checkers see of the lazy names
    from ._run_record import read_run as read_run
    from .callbacks.doctor import GRPODoctor as GRPODoctor
    from .callbacks.doctor import TrainDoctor as TrainDoctor
    from .callbacks.kernel_patch import KernelPatchCallback as KernelPatchCallback
    from .callbacks.layer_modes import ActivationOffloadCallback as ActivationOffloadCallback
    from .callbacks.layer_modes import MemoryBudgetCallback as MemoryBudgetCallback
    from .callbacks.layer_modes import SelectiveCheckpointCallback as SelectiveCheckpointCallback
    from .callbacks.lr_schedule import LRScheduleCallback as LRScheduleCallback
    from .callbacks.patch import PatchCallback as PatchCallback
    from .callbacks.run_record import RunRecordCallback as RunRecordCallback
    from .callbacks.sampler import SamplerCallback as SamplerCallback
    from .callbacks.weight_averaging import WeightAveragingCallback as WeightAveragingCallback
    from .hub.callback import HubCallback as HubCallback
    from .hub.recipe import from_card as from_card
    from .kernels import patch as patch
    from .methods import METHODS as METHODS
    from .patching.handle import unpatch as unpatch
    from .recipes.launch import accelerate_config as accelerate_config
    from .report.plan_memory import plan_memory as plan_memory
    from .trainers.grpo.config import EffiGRPOConfig as EffiGRPOConfig
    from .trainers.grpo.trainer import EffiGRPOTrainer as EffiGRPOTrainer
    from .trainers.sft import EffiSFTConfig as EffiSFTConfig
    from .trainers.sft import EffiSFTTrainer as EffiSFTTrainer
    from .trainers.trainer import EffiTrainer as EffiTrainer
    from .trainers.trainer import EffiTrainingArguments as EffiTrainingArguments


def _room_of(name: str) -> str:
    """Return where a name is that is not at the top, for the message."""
    for room in (*_ROOMS, "trainers.mixins"):
        module = importlib.import_module(f"hf_effi.{room}")
        if name in getattr(module, "__all__", ()):
            return f"It is in a room: `from hf_effi.{room} import {name}`."
    return ""


__getattr__, __dir__, __all__ = face(__name__, _PUBLIC, _ROOMS, _room_of)
__all__ = ["__version__", *__all__]
