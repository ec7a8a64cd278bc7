"""Which completions of the surviving groups are trained on: pruners for `rollout_pruner=`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..functional.data import check_count, check_number, seeded
from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import between, keep_by_variance, kept_rows

if TYPE_CHECKING:
    from ..protocols import RolloutGroups

#: from which rows advantages are measured
ADV_STATS = ("subset", "full")
#: in which pool completions compete: those of a prompt, or of the whole batch
SCOPES = ("group", "global")

#: given values, how many to keep and which rows have a token in the loss, returns the mask
Choose = Callable[[Tensor, int, Tensor], Tensor]


@dataclass(frozen=True)
class _Amount:
    """
    How many completions stay: a count of each group, or a share of each pool that may change over the run.

    Args:
        keep (`int`, *optional*): Completions of a group.
        share (`tuple[float, float]`, *optional*): Share at the start and at the end of the run.
        least (`int`): Fewest completions of a pool.
    """

    keep: int | None
    share: tuple[float, float] | None
    least: int

    @classmethod
    def of(cls, keep: Any, keep_fraction: Any, least: int) -> _Amount:
        if (keep is None) == (keep_fraction is None):
            raise ValueError(
                "give one of keep= (completions of each group, e.g. 8) and keep_fraction= (a share of them, e.g. "
                f"0.25), got keep={keep!r} and keep_fraction={keep_fraction!r}."
            )
        if keep is not None:
            return cls(check_count("keep", keep, least), None, least)
        return cls(None, _share("keep_fraction", keep_fraction), least)

    def of_pool(self, rows: int, groups: int, progress: float) -> int:
        """Return how many rows of a pool stay, in which `groups` groups compete."""
        if self.share is None:
            return min(rows, cast(int, self.keep) * groups)
        return kept_rows(rows, between(*self.share, progress), self.least)

    def check(self, group_size: int) -> None:
        if self.keep is not None and self.keep > group_size:
            raise ValueError(
                f"keep={self.keep} completions of a group of {group_size} cannot be kept. Lower it, or raise "
                "num_generations."
            )


def _share(name: str, share: Any) -> tuple[float, float]:
    pair = tuple(share) if isinstance(share, Sequence) and not isinstance(share, str) else (share, share)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number in (0, 1], or two: at the start and at the end, got {share!r}.")
    return check_number(name, pair[0], 0, 1, open_low=True), check_number(name, pair[1], 0, 1, open_low=True)


def _check_scope(scope: Any, adv_stats: Any) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}.")
    if adv_stats not in ADV_STATS:
        raise ValueError(f"adv_stats must be one of {ADV_STATS}, got {adv_stats!r}.")
    if scope == "global" and adv_stats == "subset":
        raise ValueError(
            "scope='global' can leave one completion of a group, whose advantage among the kept ones is 0. Set "
            "adv_stats='full'."
        )


def _keep(groups: RolloutGroups, values: Tensor, amount: _Amount, scope: str, choose: Choose) -> Tensor:
    """Return the mask over the groups: the rows of each pool that stay, padding aside."""
    present = cast(Tensor, groups.present).cpu()  # filled in when the view was made
    amount.check(present.size(1))
    values, live = values.detach().cpu(), groups.live.cpu()
    mask = torch.zeros_like(present)
    members = range(len(present))
    for pool in [[group] for group in members] if scope == "group" else [list(members)]:
        there = present[pool]
        rows = int(there.sum())
        if rows:
            part = torch.zeros_like(there)
            count = amount.of_pool(rows, len(pool), groups.progress)
            part[there] = choose(values[pool][there], count, live[pool][there])
            mask[pool] = part
    return mask


class MaxVariancePruner:
    """
    PODS: train on the completions whose rewards have the largest variance.

    With `scope="group"` the weighted rewards of each group decide, see
    [`~hf_effi.functional.rollouts.keep_by_variance`]; with `"global"` the advantages of the whole batch do, without
    being normalised again. Paper: [2504.13818](https://huggingface.co/papers/2504.13818).

    Args:
        keep (`int`, *optional*): Completions of a group that stay (with `"global"`: on average), >= 2, or >= 1 with
            `adv_stats="full"`. The paper keeps a half to a quarter of them, at least 4.
        keep_fraction (`float` or `tuple[float, float]`, *optional*): In its place the share that stays, in (0, 1]; of
            two numbers the first holds at the start of the run and the second at its end, linearly in between.
        scope (`str`, *optional*, defaults to `"group"`): `"group"`, or `"global"` for all groups of the batch.
        adv_stats (`str`, *optional*, defaults to `"subset"`): Rows that mean and standard deviation of the advantages
            are measured from: the kept `"subset"` of each group, as in the released code, or the `"full"` group.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.2, 0.9, 0.5, 0.1]])
    >>> groups = RolloutGroups(rewards, rewards - rewards.mean(1, keepdim=True), torch.full((2, 4), 5), step=0)
    >>> MaxVariancePruner(keep=2).keep(groups).tolist()
    [[True, True, False, False], [False, True, False, True]]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        keep: int | None = None,
        keep_fraction: float | Sequence[float] | None = None,
        scope: str = "group",
        adv_stats: str = "subset",
    ) -> None:
        _check_scope(scope, adv_stats)
        self.scope, self.adv_stats = scope, adv_stats
        self._amount = _Amount.of(keep, keep_fraction, 2 if adv_stats == "subset" else 1)

    def keep(self, groups: RolloutGroups) -> Tensor:
        """Return the mask over the groups, see [`~hf_effi.protocols.RolloutPruner`]."""
        values = cast(Tensor, groups.weighted_rewards) if self.scope == "group" else _scorable_advantages(groups)
        return _keep(groups, values, self._amount, self.scope, keep_by_variance)

    def check_group_size(self, group_size: int) -> None:
        """Raise `ValueError` where more completions shall be kept than a group has."""
        self._amount.check(group_size)


class RandomPruner:
    """
    Train on completions drawn at random: the control that a claim about pruning needs, at the same rate.

    A completion without a token in the loss, or without a reward, is drawn only where no other is left, as by the
    pruners that this one is compared with.

    Args:
        keep, keep_fraction, scope (*optional*): As in [`MaxVariancePruner`].
        seed (`int`, *optional*, defaults to 0): Seed of the draws, which are a function of it and of the count of
            generations.
        adv_stats (`str`, *optional*, defaults to `"full"`): `"full"` or `"subset"`.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    >>> groups = RolloutGroups(rewards, rewards - rewards.mean(1, keepdim=True), torch.full((2, 4), 5), step=0)
    >>> RandomPruner(keep_fraction=0.5).keep(groups).sum(1).tolist()
    [2, 2]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        keep: int | None = None,
        keep_fraction: float | Sequence[float] | None = None,
        scope: str = "group",
        seed: int = 0,
        adv_stats: str = "full",
    ) -> None:
        _check_scope(scope, adv_stats)
        self.scope, self.seed, self.adv_stats = scope, check_count("seed", seed, 0), adv_stats
        self._amount = _Amount.of(keep, keep_fraction, 2 if adv_stats == "subset" else 1)

    def keep(self, groups: RolloutGroups) -> Tensor:
        """Return the mask over the groups, see [`~hf_effi.protocols.RolloutPruner`]."""
        generator = seeded(self.seed, groups.generation)

        def draw(values: Tensor, count: int, live: Tensor) -> Tensor:
            drawn = torch.rand(len(values), generator=generator).tolist()
            useless = (~live | torch.isnan(values)).tolist()
            mask = torch.zeros(len(values), dtype=torch.bool)
            mask[sorted(range(len(values)), key=lambda row: (useless[row], drawn[row], row))[:count]] = True
            return mask

        return _keep(groups, cast(Tensor, groups.weighted_rewards), self._amount, self.scope, draw)

    def check_group_size(self, group_size: int) -> None:
        """Raise `ValueError` where more completions shall be kept than a group has."""
        self._amount.check(group_size)


class FirstRowsPruner:
    """
    Train on the first completions of each group, in the order of generation.

    What a reward makes of a whole group, such as a vote ([`~hf_effi.rewards.MajorityVoteReward`]), is made of all of
    them: TTRL votes with 64 completions and trains on the first 32. The choice looks at no reward.

    Args:
        keep (`int`): Completions of a group that stay, >= 2, or >= 1 with `adv_stats="full"`; at most as many as the
            group has.
        adv_stats (`str`, *optional*, defaults to `"subset"`): Rows that mean and standard deviation of the advantages
            are measured from: the kept `"subset"` of each group, as in the code of TTRL, or the `"full"` group.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    >>> groups = RolloutGroups(rewards, rewards - 0.5, torch.full((1, 4), 5), step=0)
    >>> FirstRowsPruner(2).keep(groups).tolist()
    [[True, True, False, False]]
    ```
    """

    @keeps_arguments
    def __init__(self, keep: int, adv_stats: str = "subset") -> None:
        _check_scope("group", adv_stats)
        self.adv_stats = adv_stats
        self._amount = _Amount.of(keep, None, 2 if adv_stats == "subset" else 1)

    def keep(self, groups: RolloutGroups) -> Tensor:
        """Return the mask over the groups, see [`~hf_effi.protocols.RolloutPruner`]."""
        values = cast(Tensor, groups.weighted_rewards)
        return _keep(groups, values, self._amount, "group", lambda rows, count, live: torch.arange(len(rows)) < count)

    def check_group_size(self, group_size: int) -> None:
        """Raise `ValueError` where more completions shall be kept than a group has."""
        self._amount.check(group_size)


class D3S:
    """
    D3S: train on the completions whose advantages have the largest variance, and of these on the tokens with the
    largest `|advantage| * entropy`, strictly at first and less so as training goes on.

    Share of the completions and share of the tokens follow `(1 - rho) * start + rho * end` with the progress `rho` of
    the run. Advantages are those of the full groups. Paper: [2509.22115](https://huggingface.co/papers/2509.22115). It
    does not give the four numbers where we could read them; the defaults are ours.

    Args:
        completions (`float` or `tuple[float, float]`, *optional*, defaults to `(0.25, 0.5)`): Share of the completions
            that stays at the start and at the end, in (0, 1].
        tokens (`float` or `tuple[float, float]`, *optional*, defaults to `(0.2, 1.0)`): Share of the tokens of a
            micro-batch, over all ranks, that have a loss, in (0, 1]; 1 leaves the token level off.
        scope (`str`, *optional*, defaults to `"group"`): Where completions compete: `"group"`, or `"global"` for all
            groups of the batch.

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> advantages = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.1, -0.1, 0.2, -0.2]])
    >>> groups = RolloutGroups(advantages, advantages, torch.full((2, 4), 5), step=0)
    >>> D3S(scope="global").keep(groups).tolist()
    [[True, True, False, False], [False, False, False, False]]
    >>> D3S().token_share(0.5)
    0.6
    ```
    """

    #: see [`~hf_effi.protocols.RolloutPruner`]
    adv_stats = "full"

    @keeps_arguments
    def __init__(
        self,
        completions: float | Sequence[float] = (0.25, 0.5),
        tokens: float | Sequence[float] = (0.2, 1.0),
        scope: str = "group",
    ) -> None:
        _check_scope(scope, self.adv_stats)
        self.scope = scope
        self._amount = _Amount(None, _share("completions", completions), 1)
        self._tokens = _share("tokens", tokens)

    def keep(self, groups: RolloutGroups) -> Tensor:
        """Return the mask over the groups, see [`~hf_effi.protocols.RolloutPruner`]."""
        return _keep(groups, _scorable_advantages(groups), self._amount, self.scope, keep_by_variance)

    def token_share(self, progress: float) -> float:
        """Return the share of the tokens that have a loss at this progress of the run, in (0, 1]."""
        return between(*self._tokens, progress)

    @property
    def chooses_tokens(self) -> bool:
        """Whether the token level is on at any time of the run."""
        return min(self._tokens) < 1.0


def _scorable_advantages(groups: RolloutGroups) -> Tensor:
    """Advantages, NaN for completions that no reward function could score, whose advantage is 0."""
    unscorable = torch.isnan(cast(Tensor, groups.weighted_rewards))
    return groups.advantages.masked_fill(unscorable.to(groups.advantages.device), math.nan)
