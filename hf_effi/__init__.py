"""hf_effi: keep the Trainer you have, add one line, train for less.

Public names are loaded on first use: `import hf_effi` imports neither trl nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

#: public name -> module that defines it
_PUBLIC = {
    "EffiGRPOConfig": "hf_effi.trainers.grpo_config",
    "EffiGRPOTrainer": "hf_effi.trainers.grpo",
    "EffiSFTConfig": "hf_effi.trainers.sft",
    "EffiSFTTrainer": "hf_effi.trainers.sft",
    "EffiTrainer": "hf_effi.trainers.trainer",
    "EffiTrainingArguments": "hf_effi.trainers.trainer",
    "LRScheduleCallback": "hf_effi.callbacks.lr_schedule",
    "METHODS": "hf_effi.methods",
    "Method": "hf_effi.methods",
    "SamplerCallback": "hf_effi.callbacks.sampler",
    "SamplerMixin": "hf_effi.trainers._sampler_mixin",
    "SequenceLengthMixin": "hf_effi.trainers._length_mixin",
    "wsd": "hf_effi.functional.schedules",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:  # what editors and type checkers see of the lazy names
    from .callbacks.lr_schedule import LRScheduleCallback  # noqa: F401
    from .callbacks.sampler import SamplerCallback  # noqa: F401
    from .functional.schedules import wsd  # noqa: F401
    from .methods import METHODS, Method  # noqa: F401
    from .trainers._length_mixin import SequenceLengthMixin  # noqa: F401
    from .trainers._sampler_mixin import SamplerMixin  # noqa: F401
    from .trainers.grpo import EffiGRPOTrainer  # noqa: F401
    from .trainers.grpo_config import EffiGRPOConfig  # noqa: F401
    from .trainers.sft import EffiSFTConfig, EffiSFTTrainer  # noqa: F401
    from .trainers.trainer import EffiTrainer, EffiTrainingArguments  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_effi' has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
