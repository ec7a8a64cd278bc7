"""Samplers that a Trainer can resume exactly, in the middle of any epoch, on any number of processes."""

from __future__ import annotations

from .attention_influence import AttentionInfluence, copy_head_scores, masked_heads, retrieval_heads
from .base import EffiSampler, SamplerError, SamplerMismatchError, ShuffledSampler
from .curricula import CompetenceSampler, CyclicalSampler, InterleavedSampler, QualityAscendingSampler
from .group import GroupSampler
from .learned import AbilitySampler, MeasuringSampler, SelfPacedSampler
from .measure import RowCorrect, RowLoss
from .mixture import MixtureSampler, ReplaySampler
from .multistage import MultistageSampler
from .scores import ColumnScore, ModelScore, RowScorer, ScoreMismatchError, add_score, model_fingerprint
from .self_improvement import GreedyAnswers, SelfImprovement
from .token_budget import TokenBudgetBatchSampler, cost_of_model

__all__ = [
    "AbilitySampler",
    "AttentionInfluence",
    "ColumnScore",
    "CompetenceSampler",
    "CyclicalSampler",
    "EffiSampler",
    "GreedyAnswers",
    "GroupSampler",
    "InterleavedSampler",
    "MeasuringSampler",
    "MixtureSampler",
    "ModelScore",
    "MultistageSampler",
    "QualityAscendingSampler",
    "ReplaySampler",
    "RowCorrect",
    "RowLoss",
    "RowScorer",
    "SamplerError",
    "SamplerMismatchError",
    "ScoreMismatchError",
    "SelfImprovement",
    "SelfPacedSampler",
    "ShuffledSampler",
    "TokenBudgetBatchSampler",
    "add_score",
    "cost_of_model",
    "copy_head_scores",
    "masked_heads",
    "model_fingerprint",
    "retrieval_heads",
]
