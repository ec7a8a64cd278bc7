"""Group statistics, keep-masks, pruning, and the bookkeeping of ragged rollout batches."""

from .batching import (
    Bucket,
    concat_rows,
    contiguous_rows,
    deal_rows,
    even_repeats,
    plan_buckets,
    scatter_completion,
    take_rows,
    trim_rows,
)
from .elastic import deal_again, first_difference, micro_step_in
from .layout import GenerationLayout
from .masks import loss_mask, policy_mask, row_advantages, rows_with_gradient
from .policies import PRUNE_METRICS, PRUNE_SCOPES, AdvantagePruner, PassRateBand
from .prompts import ShuffledPrompts, draw_fresh, prompt_key
from .selection import (
    REASONS,
    GroupDecision,
    binary_pass_rates,
    equal_reward_groups,
    fill_order,
    group_pass_rates,
    keep_by_advantage,
    keep_groups_by_pass_rate,
    kept_share,
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
    "REASONS",
    "ShuffledPrompts",
    "binary_pass_rates",
    "concat_rows",
    "contiguous_rows",
    "deal_again",
    "deal_rows",
    "draw_fresh",
    "equal_reward_groups",
    "even_repeats",
    "fill_order",
    "first_difference",
    "group_pass_rates",
    "keep_by_advantage",
    "keep_groups_by_pass_rate",
    "kept_share",
    "loss_mask",
    "micro_step_in",
    "next_refill_size",
    "plan_buckets",
    "policy_mask",
    "prompt_key",
    "pruned_count",
    "row_advantages",
    "rows_with_gradient",
    "scatter_completion",
    "take_rows",
    "trim_rows",
]
