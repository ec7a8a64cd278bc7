"""Samplers that a Trainer can resume exactly, in the middle of any epoch, on any number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "AbilitySampler": "hf_effi.samplers.learned",
    "CompetenceSampler": "hf_effi.samplers.curricula",
    "CyclicalSampler": "hf_effi.samplers.curricula",
    "EffiSampler": "hf_effi.samplers.base",
    "GroupSampler": "hf_effi.samplers.group",
    "InterleavedSampler": "hf_effi.samplers.curricula",
    "MeasuringSampler": "hf_effi.samplers.learned",
    "MixtureSampler": "hf_effi.samplers.mixture",
    "MultistageSampler": "hf_effi.samplers.multistage",
    "QualityAscendingSampler": "hf_effi.samplers.curricula",
    "ReplaySampler": "hf_effi.samplers.mixture",
    "SelfPacedSampler": "hf_effi.samplers.learned",
    "ShuffledSampler": "hf_effi.samplers.base",
    "TokenBudgetBatchSampler": "hf_effi.samplers.token_budget",
    "cost_of_model": "hf_effi.samplers.token_budget",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .base import EffiSampler as EffiSampler
    from .base import ShuffledSampler as ShuffledSampler
    from .curricula import CompetenceSampler as CompetenceSampler
    from .curricula import CyclicalSampler as CyclicalSampler
    from .curricula import InterleavedSampler as InterleavedSampler
    from .curricula import QualityAscendingSampler as QualityAscendingSampler
    from .group import GroupSampler as GroupSampler
    from .learned import AbilitySampler as AbilitySampler
    from .learned import MeasuringSampler as MeasuringSampler
    from .learned import SelfPacedSampler as SelfPacedSampler
    from .mixture import MixtureSampler as MixtureSampler
    from .mixture import ReplaySampler as ReplaySampler
    from .multistage import MultistageSampler as MultistageSampler
    from .token_budget import TokenBudgetBatchSampler as TokenBudgetBatchSampler
    from .token_budget import cost_of_model as cost_of_model

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
