"""Samplers that a Trainer can resume exactly, in the middle of any epoch, on any number of processes."""

from __future__ import annotations

from .base import EffiSampler, SamplerError, SamplerMismatchError, ShuffledSampler
from .curricula import CompetenceSampler, CyclicalSampler, InterleavedSampler, QualityAscendingSampler
from .group import GroupSampler
from .learned import AbilitySampler, MeasuringSampler, SelfPacedSampler
from .measure import RowCorrect, RowLoss
from .mixture import MixtureSampler, ReplaySampler
from .scores import ColumnScore, ModelScore, RowScorer, ScoreMismatchError, add_score, model_fingerprint
from .token_budget import TokenBudgetBatchSampler, cost_of_model

__all__ = [
    "AbilitySampler",
    "ColumnScore",
    "CompetenceSampler",
    "CyclicalSampler",
    "EffiSampler",
    "GroupSampler",
    "InterleavedSampler",
    "MeasuringSampler",
    "MixtureSampler",
    "ModelScore",
    "QualityAscendingSampler",
    "ReplaySampler",
    "RowCorrect",
    "RowLoss",
    "RowScorer",
    "SamplerError",
    "SamplerMismatchError",
    "ScoreMismatchError",
    "SelfPacedSampler",
    "ShuffledSampler",
    "TokenBudgetBatchSampler",
    "add_score",
    "cost_of_model",
    "model_fingerprint",
]
