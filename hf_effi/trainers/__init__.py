"""`Trainer`, `SFTTrainer` and `GRPOTrainer` with every method as an argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "EffiGRPOConfig": "hf_effi.trainers.grpo.config",
    "EffiGRPOTrainer": "hf_effi.trainers.grpo.trainer",
    "EffiSAMITrainer": "hf_effi.trainers.sami",
    "EffiSFTConfig": "hf_effi.trainers.sft",
    "EffiSFTTrainer": "hf_effi.trainers.sft",
    "EffiTrainer": "hf_effi.trainers.trainer",
    "EffiTrainingArguments": "hf_effi.trainers.trainer",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .grpo.config import EffiGRPOConfig as EffiGRPOConfig
    from .grpo.trainer import EffiGRPOTrainer as EffiGRPOTrainer
    from .sami import EffiSAMITrainer as EffiSAMITrainer
    from .sft import EffiSFTConfig as EffiSFTConfig
    from .sft import EffiSFTTrainer as EffiSFTTrainer
    from .trainer import EffiTrainer as EffiTrainer
    from .trainer import EffiTrainingArguments as EffiTrainingArguments

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC, ("grpo", "mixins"))
