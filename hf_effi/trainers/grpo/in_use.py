"""What a trainer shows of the methods that are on."""

from __future__ import annotations

from typing import Any, cast

from ...protocols import AdvantageTransform, GroupFilter, PromptSelector, RolloutAllocator, RolloutPruner
from ...selection import HybridGate, Screening
from .forward import LogProbForward
from .pipeline import RolloutPipeline


class MethodsInUse:
    """Attributes of [`EffiGRPOTrainer`] that can be read and not set."""

    @property
    def exact_savings(self) -> tuple[str, ...]:
        """Names of the exact savings that are on."""
        forward: LogProbForward = cast(Any, self)._forward
        return forward.exact_savings

    @property
    def prompt_selector(self) -> PromptSelector | None:
        """What chooses the prompts of every generation; `None` is the data loader."""
        return _rollouts_of(self).objects.prompt_selector

    @property
    def group_filter(self) -> GroupFilter | None:
        """What chooses the groups to train on; `None` takes all."""
        return _rollouts_of(self).objects.group_filter

    @property
    def rollout_pruner(self) -> RolloutPruner | None:
        """What chooses the completions to train on; `None` takes all."""
        return _rollouts_of(self).objects.rollout_pruner

    @property
    def advantage_transform(self) -> AdvantageTransform | None:
        """What makes advantages out of groups; `None` leaves TRL's."""
        return _rollouts_of(self).objects.advantage_transform

    @property
    def rollout_allocator(self) -> RolloutAllocator | None:
        """What divides completions over prompts; `None` gives each `num_generations`."""
        return _rollouts_of(self).objects.rollout_allocator

    @property
    def screening(self) -> Screening | None:
        """How prompts are screened before most of their completions are generated; `None` does not."""
        return _rollouts_of(self).objects.screening

    @property
    def hybrid_gate(self) -> HybridGate | None:
        """What gives hopeless groups a demonstration; `None` where nothing does."""
        return _rollouts_of(self).objects.hybrid_gate


def _rollouts_of(trainer: object) -> RolloutPipeline:
    rollouts: RolloutPipeline = cast(Any, trainer)._rollouts
    return rollouts
