"""Filters of groups for `group_filters=[...]`, and the chain that several of them make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import (
    GroupDecision,
    band_edges,
    distance_to_bands,
    fill_order,
    keep_groups_by_pass_rate,
    rewards_named,
)
from ..functional.rollouts.policies import check_reward_name
from ..functional.rollouts.selection import check_difficulty_range

if TYPE_CHECKING:
    from ..protocols import GroupFilter, RolloutGroups

#: most filters of a chain, sources of a filter, and bands of lengths
MOST = 64


def _as_decision(reasons: Sequence[str]) -> GroupDecision:
    return GroupDecision(torch.tensor([r == "kept" for r in reasons], dtype=torch.bool), tuple(reasons))


@dataclass(frozen=True)
class ZeroVariance:
    """
    Drop groups whose rewards are all equal: dynamic sampling of DAPO
    ([2503.14476](https://huggingface.co/papers/2503.14476)).

    The same as [`PassRateBand`]`(0, 1)`. Reasons: `zero_variance`, `no_loss_tokens`, `unscorable`.

    Args:
        reward (`str`, *optional*): Name of the reward function that must differ within a group; by default the one
            that decides. With a bonus for format or length the sum nearly always differs: name the one for right
            answers.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> groups = RolloutGroups(rewards, rewards - rewards.mean(1, keepdim=True), torch.full((2, 2), 5), step=0)
    >>> ZeroVariance().decide(groups).reasons
    ('kept', 'zero_variance')
    ```
    """

    reward: str | None = None

    def __post_init__(self) -> None:
        check_reward_name(self.reward)

    def decide(self, groups: RolloutGroups) -> GroupDecision:
        return keep_groups_by_pass_rate(rewards_named(groups, self.reward), 0, 1, groups.has_gradient)

    def fill_order(self, groups: RolloutGroups) -> list[int]:
        return fill_order(rewards_named(groups, self.reward), 0, 1, groups.has_gradient, groups.live)


class SourceBands:
    """
    Keep groups whose pass rate lies in the band of their source: harder data may be kept at lower rates.

    Reasons: those of [`PassRateBand`], with `source_too_hard` and `source_too_easy` for a rate outside the band.

    Args:
        column (`str`): Column of the training dataset that names the source of a row.
        bands (`Mapping[str, tuple[float, float]]`): `{source: (low, high)}`, `0 <= low < high <= 1`; the ends 0 and 1
            are open, the others inclusive.
        default (`tuple[float, float]`, *optional*): Band of the sources that `bands` does not name. Without it such a
            source raises.
        reward (`str`, *optional*): Name of the reward function that is looked at; by default the one that decides.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    >>> names = {0: "olympiad", 1: "school"}
    >>> groups = RolloutGroups(
    ...     rewards, rewards - 0.25, torch.full((2, 4), 5), step=0, rows=(0, 1),
    ...     lookup=lambda column, rows: [names[row] for row in rows],
    ... )
    >>> SourceBands("source", {"olympiad": (0.1, 0.5), "school": (0.4, 0.8)}).decide(groups).reasons
    ('kept', 'source_too_hard')
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        column: str,
        bands: Mapping[str, Sequence[float]],
        default: Sequence[float] | None = None,
        reward: str | None = None,
    ) -> None:
        check_reward_name(reward)
        if not isinstance(column, str) or not column:
            raise ValueError(f"column must be the name of a column of the training dataset, got {column!r}.")
        if not isinstance(bands, Mapping) or not 1 <= len(bands) <= MOST:
            raise ValueError(f"bands must map 1 to {MOST} sources to (low, high), got {bands!r}.")
        self.column, self.reward = column, reward
        self.bands = {source: _band(f"bands[{source!r}]", band) for source, band in bands.items()}
        self.default = None if default is None else _band("default", default)

    def decide(self, groups: RolloutGroups) -> GroupDecision:
        reasons = [""] * len(groups.rewards)
        for band, members in self._by_band(groups).items():
            part = groups.take(members)
            found = keep_groups_by_pass_rate(rewards_named(part, self.reward), *band, part.has_gradient).reasons
            for group, reason in zip(members, found, strict=True):
                reasons[group] = f"source_{reason}" if reason in ("too_hard", "too_easy") else reason
        return _as_decision(reasons)

    def fill_order(self, groups: RolloutGroups) -> list[int]:
        """Return all groups: those with a gradient first, then by how far they are from the middle of their band."""
        rewards = rewards_named(groups, self.reward)
        distance = [0.0] * len(rewards)
        rates = torch.nanmean(rewards.to(torch.float64), dim=1).tolist()
        for (low, high), members in self._by_band(groups).items():
            for group in members:
                distance[group] = (
                    math.inf if math.isnan(rates[group]) else round(abs(rates[group] - (low + high) / 2), 9)
                )
        return sorted(range(len(rewards)), key=lambda g: (*_deadness(groups)[g], distance[g], g))

    def _by_band(self, groups: RolloutGroups) -> dict[tuple[float, float], list[int]]:
        found: dict[tuple[float, float], list[int]] = {}
        for group, source in enumerate(groups.column(self.column)):
            band = self.bands.get(source, self.default)
            if band is None:
                known = ", ".join(map(str, self.bands))
                raise ValueError(
                    f"column {self.column!r} holds the source {source!r}, and bands= names {known}. Add it, or give "
                    "default=(low, high)."
                )
            found.setdefault(band, []).append(group)
        return found


class LengthBand:
    """
    LSPO: of the groups with a gradient, keep those whose completions are short or long on average for this batch.

    The mean length of a group is ranked among all groups with a gradient that were generated for the step so far, and
    bands of quantiles are kept. Reasons: `zero_variance`, `no_loss_tokens` and `unscorable` for groups without a
    gradient, then `mid_length` and `too_long`. Paper: [LSPO](https://huggingface.co/papers/2510.01459).

    Args:
        bands (`Sequence[tuple[float, float]]`, *optional*, defaults to `((0, 0.3), (0.65, 0.95))`): Quantiles of the
            mean length that are kept, ends included, `0 <= low < high <= 1`, in order and apart from each other.
        reward (`str`, *optional*): Name of the reward function that must differ within a group; by default the one
            that decides.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> rewards = torch.tensor([[1.0, 0.0]] * 5)
    >>> lengths = torch.tensor([[10, 10], [20, 20], [30, 30], [40, 40], [50, 50]])
    >>> groups = RolloutGroups(rewards, rewards - 0.5, lengths, step=0)
    >>> LengthBand().decide(groups).reasons
    ('kept', 'kept', 'mid_length', 'kept', 'too_long')
    ```
    """

    @keeps_arguments
    def __init__(
        self, bands: Sequence[Sequence[float]] = ((0.0, 0.3), (0.65, 0.95)), reward: str | None = None
    ) -> None:
        check_reward_name(reward)
        if not isinstance(bands, (list, tuple)) or not 1 <= len(bands) <= MOST:
            raise ValueError(f"bands must be 1 to {MOST} pairs (low, high) of quantiles, got {bands!r}.")
        self.bands = tuple(_band("bands", band) for band in bands)
        if any(before[1] >= after[0] for before, after in zip(self.bands, self.bands[1:], strict=False)):
            raise ValueError(f"bands must be in order and apart from each other, got {bands!r}.")
        self.reward = reward

    def decide(self, groups: RolloutGroups) -> GroupDecision:
        rewards = rewards_named(groups, self.reward)
        reasons = list(keep_groups_by_pass_rate(rewards, 0, 1, groups.has_gradient).reasons)
        distance, above = self._distances(groups, [reason == "kept" for reason in reasons])
        for group, reason in enumerate(reasons):
            if reason == "kept" and distance[group] > 0:
                reasons[group] = "too_long" if above[group] else "mid_length"
        return _as_decision(reasons)

    def fill_order(self, groups: RolloutGroups) -> list[int]:
        """Return all groups: those with a gradient first, then by how far their length is from the nearest band."""
        reasons = keep_groups_by_pass_rate(rewards_named(groups, self.reward), 0, 1, groups.has_gradient).reasons
        distance, _ = self._distances(groups, [reason == "kept" for reason in reasons])
        return sorted(range(len(reasons)), key=lambda g: (*_deadness(groups)[g], distance[g], g))

    def _distances(self, groups: RolloutGroups, alive: list[bool]) -> tuple[list[float], list[bool]]:
        lengths = groups.lengths.to(torch.float64).sum(1) / groups.sizes.clamp(min=1)
        if not any(alive):
            return [0.0] * len(alive), [False] * len(alive)
        edges = band_edges(lengths[torch.tensor(alive)], self.bands)
        return distance_to_bands(lengths, edges).tolist(), (lengths > edges[-1][1]).tolist()


class FilterChain:
    """
    Several filters, one after the other: a group is trained on if every one of them keeps it.

    A filter sees the groups that those before it have kept, and no others, so that bands over a batch
    ([`LengthBand`]) are bands over what is left. The reason of a group is that of the first filter that rejects it.
    This is what `group_filters=[...]` of [`EffiGRPOTrainer`] makes.

    Args:
        filters (`Sequence[GroupFilter]`): 1 to 64 of them, in order.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    >>> lengths = torch.tensor([[9, 9], [1, 1], [5, 5], [7, 7]])
    >>> groups = RolloutGroups(rewards, rewards - rewards.mean(1, keepdim=True), lengths, step=0)
    >>> chain = FilterChain([ZeroVariance(), LengthBand([(0.0, 0.5)])])
    >>> chain.decide(groups).reasons, chain.fill_order(groups)
    (('too_long', 'zero_variance', 'kept', 'kept'), [2, 3, 0, 1])
    ```
    """

    @keeps_arguments
    def __init__(self, filters: Sequence[GroupFilter]) -> None:
        if not isinstance(filters, (list, tuple)):
            raise ValueError(f"filters must be a list of group filters, got {filters!r}.")
        self.filters = tuple(filters)
        if not 1 <= len(self.filters) <= MOST:
            raise ValueError(f"a chain has 1 to {MOST} filters, got {len(self.filters)}. Leave group_filters= out.")
        for each in self.filters:
            if isinstance(each, type):
                raise ValueError(f"group_filters holds the class {each.__name__}. Pass an object: {each.__name__}().")
            missing = [name for name in ("decide", "fill_order") if not callable(getattr(each, name, None))]
            if missing:
                raise ValueError(
                    f"group_filters must hold objects with decide(groups) and fill_order(groups), and "
                    f"{type(each).__name__} has no {' and no '.join(missing)}. Pass an object, e.g. ZeroVariance()."
                )

    def decide(self, groups: RolloutGroups) -> GroupDecision:
        return _as_decision(self._run(groups)[0])

    def fill_order(self, groups: RolloutGroups) -> list[int]:
        """
        Return all groups, the least bad first.

        Groups with a gradient come before those without one, those with a token in the loss before those without, and
        unscorable ones last, whichever filter rejected them: filling is there to keep the step from being empty. Among
        these, a group that more filters kept is less bad; of those that one filter rejected, its own order counts.
        """
        reasons, passed, place = self._run(groups, order=True)
        return sorted(range(len(reasons)), key=lambda g: (*_deadness(groups)[g], -passed[g], place[g], g))

    def _run(self, groups: RolloutGroups, order: bool = False) -> tuple[list[str], list[int], list[int]]:
        """Return the reason of each group, how many filters kept it, and its place in the order of its last filter."""
        count = len(groups.rewards)
        reasons, passed, place = ["kept"] * count, [0] * count, [0] * count
        left = list(range(count))
        for each in self.filters:
            if not left:
                break
            part = groups.take(left)
            decision = each.decide(part)
            if order:
                for position, index in enumerate(each.fill_order(part)):
                    place[left[index]] = position
            for group, reason in zip(left, decision.reasons, strict=True):
                reasons[group] = reason
                passed[group] += reason == "kept"
            left = [group for group, kept in zip(left, decision.keep.tolist(), strict=True) if kept]
        return reasons, passed, place


def _deadness(groups: RolloutGroups) -> list[tuple[bool, bool, bool]]:
    """How little a group can teach: unscorable, then no token in the loss, then no gradient."""
    unscorable = torch.isnan(cast(Tensor, groups.weighted_rewards)).all(1)  # filled in when the view was made
    columns = (unscorable, ~groups.live.any(1), ~groups.has_gradient.any(1))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _band(name: str, band: Any) -> tuple[float, float]:
    numbers = list(band) if isinstance(band, Sequence) and not isinstance(band, str) else []
    good = [isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers]
    if len(numbers) != 2 or not all(good):
        raise ValueError(f"{name} must be two numbers (low, high), got {band!r}.")
    try:
        check_difficulty_range(numbers[0], numbers[1])
    except ValueError:
        raise ValueError(f"{name} must satisfy 0 <= low < high <= 1, got {band!r}.") from None
    return float(numbers[0]), float(numbers[1])
