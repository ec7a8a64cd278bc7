"""`EffiGRPOTrainer`: TRL's `GRPOTrainer` with exact savings, filtering, pruning and exact resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "EffiGRPOConfig": "hf_effi.trainers.grpo.config",
    "EffiGRPOTrainer": "hf_effi.trainers.grpo.trainer",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .config import EffiGRPOConfig as EffiGRPOConfig
    from .trainer import EffiGRPOTrainer as EffiGRPOTrainer

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
