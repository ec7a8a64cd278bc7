"""One static table: which method comes from which paper, where its code, card, tests and bench are, and its
status with the evidence for it.

Docs, `hf-effi list` and the contract tests read it. Nothing dispatches on it.
"""

from __future__ import annotations

from ._methods import (
    checkpoints,
    continual,
    data,
    experiments,
    forecasting,
    kernels,
    label_free,
    long_sequences,
    loops,
    observers,
    optimizer_groups,
    optimizers,
    optimizers_muon,
    planning,
    rejected,
    rewards_code,
    rewards_length,
    rewards_structure,
    rewards_text,
    rollouts,
    schedules,
    selection_groups,
    selection_model,
    selection_prompts,
    selection_signals,
    sharpness,
    token_data,
    traffic,
)
from ._methods.row import GOALS, Goal, Kind, Method, Status

__all__ = ["GOALS", "METHODS", "Goal", "Kind", "Method", "Status", "find_method", "methods_by_goal"]

#: heading of the methods that a bench of ours says no to
NOT_SHIPPED = "Measured and not shipped"
#: the table: one row per method
METHODS: tuple[Method, ...] = (
    *rollouts.ROWS,
    *selection_prompts.ROWS,
    *selection_model.ROWS,
    *selection_groups.ROWS,
    *selection_signals.ROWS,
    *rewards_text.ROWS,
    *rewards_structure.ROWS,
    *rewards_code.ROWS,
    *rewards_length.ROWS,
    *label_free.ROWS,
    *loops.ROWS,
    *schedules.ROWS,
    *optimizer_groups.ROWS,
    *optimizers_muon.ROWS,
    *optimizers.ROWS,
    *data.ROWS,
    *token_data.ROWS,
    *continual.ROWS,
    *long_sequences.ROWS,
    *kernels.ROWS,
    *checkpoints.ROWS,
    *observers.ROWS,
    *planning.ROWS,
    *experiments.ROWS,
    *forecasting.ROWS,
    *sharpness.ROWS,
    *traffic.ROWS,
    *rejected.ROWS,
)


def find_method(key: str) -> Method:
    """
    Return the row with this key.

    Raises:
        KeyError: no such method; the message lists the known keys.

    Example:
    ```python
    >>> find_method("wsd").paper_id
    '2404.06395'
    ```
    """
    for method in METHODS:
        if method.key == key:
            return method
    raise KeyError(f"unknown method {key!r}. Known: {', '.join(sorted(m.key for m in METHODS))}.")


def methods_by_goal(first: bool = False) -> dict[str, list[Method]]:
    """
    Return the methods by what a user wants, in the order of `GOALS`; those that were measured and are not shipped come
    last.

    Args:
        first (`bool`, *optional*, defaults to `False`): Give each method once, under the first of its goals.

    Returns:
        `dict[str, list[Method]]`: Heading -> methods.

    Example:
    ```python
    >>> [method.key for method in methods_by_goal()["I want RL to cost less"]][:3]
    ['exact_savings', 'grpo_token_budget', 'rollout_savings']
    ```
    """
    groups = {
        title: [m for m in METHODS if goal in m.goals[: 1 if first else None] and m.status != "rejected"]
        for goal, title in GOALS.items()
    }
    groups[NOT_SHIPPED] = [m for m in METHODS if m.status == "rejected"]
    return groups
