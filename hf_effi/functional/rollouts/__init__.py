"""Group statistics, keep-masks, pruning, and the bookkeeping of ragged rollout batches."""

from .batching import (
    Bucket,
    concat_rows,
    contiguous_rows,
    deal_rows,
    plan_buckets,
    scatter_completion,
    take_rows,
    trim_rows,
)
from .layout import GenerationLayout
from .policies import PRUNE_METRICS, PRUNE_SCOPES, AdvantagePruner, PassRateBand
from .prompts import ShuffledPrompts
from .selection import (
    GroupDecision,
    equal_reward_groups,
    fill_order,
    group_pass_rates,
    keep_by_advantage,
    keep_groups_by_pass_rate,
    next_refill_size,
    pruned_count,
)

__all__ = [
    "AdvantagePruner",
    "Bucket",
    "GenerationLayout",
    "GroupDecision",
    "PRUNE_METRICS",
    "PRUNE_SCOPES",
    "PassRateBand",
    "ShuffledPrompts",
    "concat_rows",
    "contiguous_rows",
    "deal_rows",
    "equal_reward_groups",
    "fill_order",
    "group_pass_rates",
    "keep_by_advantage",
    "keep_groups_by_pass_rate",
    "next_refill_size",
    "plan_buckets",
    "pruned_count",
    "scatter_completion",
    "take_rows",
    "trim_rows",
]
