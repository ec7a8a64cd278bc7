"""Samplers that a Trainer can resume exactly, in the middle of any epoch, on any number of processes."""

from __future__ import annotations

from .base import EffiSampler, SamplerError, SamplerMismatchError, ShuffledSampler
from .group import GroupSampler

__all__ = [
    "EffiSampler",
    "GroupSampler",
    "SamplerError",
    "SamplerMismatchError",
    "ShuffledSampler",
]
