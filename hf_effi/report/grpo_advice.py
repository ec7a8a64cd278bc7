"""Settings that follow from a plan of GRPO, each with its reason in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..functional.grpo_expected import Lengths
from ..functional.grpo_plan import GRPOChoices, GRPOShape

#: relative gain from which a setting is worth a word
WORTH = 0.05
#: the longest completions that a cut would take, as a share
_TAIL = 0.05


@dataclass(frozen=True)
class Outcome:
    """
    What one set of choices comes to.

    Args:
        name (`str`): For the table.
        choices ([`~hf_effi.functional.grpo_plan.GRPOChoices`]): What is on.
        seconds (`dict[str, float]`): Of each phase of an update.
        bounds (`tuple[float, float]`): Seconds of an update at the fast and the slow end.
        groups (`float`): Groups generated for an update.
        live_groups (`float`): Groups with a gradient that a generation's updates train on.
        updates (`int`): Updates of a generation.
    """

    name: str
    choices: GRPOChoices
    seconds: dict[str, float]
    bounds: tuple[float, float]
    groups: float
    live_groups: float
    updates: int

    @property
    def total(self) -> float:
        """Seconds of an update."""
        return sum(self.seconds.values())

    @property
    def seconds_per_live_group(self) -> float:
        """Seconds of a generation and its updates for each group with a gradient; infinite without any."""
        return self.total * self.updates / self.live_groups if self.live_groups > 0 else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; `None` in place of what is infinite."""
        per_live = self.seconds_per_live_group if self.live_groups > 0 else None
        return {
            "name": self.name,
            **dataclasses.asdict(self.choices),
            "seconds": self.seconds,
            "seconds_of_update": self.total,
            "bounds": list(self.bounds),
            "groups_generated": self.groups,
            "live_groups": self.live_groups / self.updates,
            "seconds_per_live_group": per_live,
        }


#: makes an outcome of choices, for a shape
Plan = Callable[[str, GRPOChoices, GRPOShape], Outcome]


def advice(
    shape: GRPOShape, outcomes: Sequence[Outcome], dead_by_size: Mapping[int, float], plan: Plan
) -> tuple[tuple[str, str], ...]:
    """
    Return settings with the reason for each, those that change nothing in the gradient first.

    Args:
        shape ([`~hf_effi.functional.grpo_plan.GRPOShape`]): The run.
        outcomes (`Sequence[Outcome]`): Stock first; then the exact savings, then the filter and pruning.
        dead_by_size (`Mapping[int, float]`): Size of a group -> share of groups without a gradient.
        plan (`Callable`): Makes further outcomes.
    """
    stock, best = outcomes[0], _best_exact(outcomes)
    found = [_exact(stock, best)]
    others = [one for one in outcomes if one.choices.filter_rounds or one.choices.prune_rate]
    found += [_selection(one, best, shape) for one in others if one.live_groups > 0]
    found += _length(shape, best, plan)
    found += _iterations(shape, best, plan)
    found += _reference(shape, best, plan)
    found += _size(shape, dead_by_size)
    return tuple(found)


def _best_exact(outcomes: Sequence[Outcome]) -> Outcome:
    exact = [one for one in outcomes if not one.choices.filter_rounds and not one.choices.prune_rate]
    return min(exact, key=lambda one: one.total)


def _exact(stock: Outcome, best: Outcome) -> tuple[str, str]:
    gain = 1 - best.total / stock.total
    if gain < WORTH:
        return (
            "exact_savings=auto",
            f"saves {gain:.0%} of an update here; it keeps the gradient, so it costs nothing to leave it on.",
        )
    return (
        f"exact_savings={','.join(best.choices.savings)}" if best.choices.savings else "exact_savings=off",
        f"{best.total:.3g} s an update in place of {stock.total:.3g} ({gain:.0%} less) with the same gradient.",
    )


def _selection(one: Outcome, best: Outcome, shape: GRPOShape) -> tuple[str, str]:
    gain = 1 - one.seconds_per_live_group / best.seconds_per_live_group if best.live_groups > 0 else 1.0
    seconds = f"{one.seconds_per_live_group:.3g} s a group with a gradient, {best.seconds_per_live_group:.3g} without"
    if one.choices.filter_rounds:
        what, text = "difficulty_range=[0, 1]", f"{shape.dead:.0%} of the groups have no gradient. {seconds}"
        if gain >= WORTH or (shape.dead >= 0.3 and gain > -WORTH):
            return what, f"{text}; {one.live_groups:.3g} of {shape.prompts} trained groups have one."
        return (
            f"no {what}",
            f"{text}: refills generate {one.groups * one.updates / shape.prompts:.2f} times as much. It pays only "
            "where larger effective batches do.",
        )
    what = f"prune_rate={one.choices.prune_rate}"
    if gain >= WORTH:
        return what, f"{seconds}. Not exact: completions with small advantages are left out; compare rewards."
    return (
        f"no {what}",
        f"{seconds}: generation, which it does not shorten, is {_share(best, 'gen'):.0%} of an update.",
    )


def _share(one: Outcome, phase: str) -> float:
    return one.seconds[phase] / one.total


def _length(shape: GRPOShape, best: Outcome, plan: Plan) -> list[tuple[str, str]]:
    """Say what the longest completions cost, where they are few."""
    lengths, upto, cap = shape.completion_lengths, 0.0, shape.completion_lengths.values[-1]
    for value, share in zip(lengths.values, lengths.shares, strict=True):
        upto += share
        if upto >= 1 - _TAIL:
            cap = value
            break
    if cap == lengths.values[-1]:
        return []
    cut = Lengths.of((min(value, cap), share) for value, share in zip(lengths.values, lengths.shares, strict=True))
    shorter = plan("shorter", best.choices, dataclasses.replace(shape, completion_lengths=cut))
    gain = 1 - shorter.total / best.total
    if gain < WORTH:
        return []
    waits = lengths.longest_of(shape.rows) / lengths.mean()
    return [
        (
            f"max_completion_length={cap}, or rollout_savings=compact",
            f"generation runs to the longest completion, {waits:.1f} times the mean; cutting the longest {_TAIL:.0%} "
            f"would save {gain:.0%} of an update, and change their rewards. `compact` keeps them, and drops finished "
            "rows from the batch.",
        )
    ]


def _iterations(shape: GRPOShape, best: Outcome, plan: Plan) -> list[tuple[str, str]]:
    if shape.num_iterations > 1 or _share(best, "gen") < 0.5:
        return []
    twice = plan("twice", best.choices, dataclasses.replace(shape, num_iterations=2))
    return [
        (
            "num_iterations=2 (another algorithm: compare rewards)",
            f"generation is {_share(best, 'gen'):.0%} of an update; two updates for each would take {twice.total:.3g} "
            f"s in place of {best.total:.3g}, the second off policy and with a forward for old log-probs.",
        )
    ]


def _reference(shape: GRPOShape, best: Outcome, plan: Plan) -> list[tuple[str, str]]:
    if shape.beta == 0:
        return []
    choices = dataclasses.replace(best.choices, savings=("trim", "sort", "skip", "pack", "share"))
    without = plan("without", choices, dataclasses.replace(shape, beta=0.0))
    return [
        (
            "beta=0 (another objective: compare rewards)",
            f"the reference forward and the groups without a gradient, which only beta=0 lets be skipped, cost "
            f"{1 - without.total / best.total:.0%} of an update.",
        )
    ]


def _size(shape: GRPOShape, dead_by_size: Mapping[int, float]) -> list[tuple[str, str]]:
    """Say which size of groups has most rows with a gradient, where that is another one."""
    now = dead_by_size[shape.group_size]
    best = min(dead_by_size, key=lambda size: dead_by_size[size])
    if now - dead_by_size[best] < 2 * WORTH:
        return []
    return [
        (
            f"num_generations={best} with as many completions in all",
            f"{1 - dead_by_size[best]:.0%} of the completions would be in groups with a gradient, in place of "
            f"{1 - now:.0%}; each update sees fewer prompts.",
        )
    ]
