"""Samplers that a Trainer can resume exactly, in the middle of any epoch, on any number of processes."""

from __future__ import annotations

from .base import EffiSampler, SamplerError, SamplerMismatchError, ShuffledSampler
from .curricula import CompetenceSampler, CyclicalSampler, InterleavedSampler, QualityAscendingSampler
from .group import GroupSampler
from .learned import AbilitySampler, MeasuringSampler, SelfPacedSampler
from .measure import RowCorrect, RowLoss
from .mixture import MixtureSampler, ReplaySampler

__all__ = [
    "AbilitySampler",
    "CompetenceSampler",
    "CyclicalSampler",
    "EffiSampler",
    "GroupSampler",
    "InterleavedSampler",
    "MeasuringSampler",
    "MixtureSampler",
    "QualityAscendingSampler",
    "ReplaySampler",
    "RowCorrect",
    "RowLoss",
    "SamplerError",
    "SamplerMismatchError",
    "SelfPacedSampler",
    "ShuffledSampler",
]
