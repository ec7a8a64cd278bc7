"""Advantage transforms: what GRPO's advantages are made of, in the place of `(r - mean) / (std + 1e-4)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..errors import RefusedError
from ..functional.data import check_number
from ..functional.rollouts import (
    ADVANTAGE_SCALES,
    STEP_AGGREGATIONS,
    TAILS,
    aggregate_steps,
    duration_weights,
    entropic_advantages,
    standardized,
    token_advantages,
    token_energies,
    weighted_advantages,
)

if TYPE_CHECKING:
    from ..protocols import RolloutGroups, TokenStats

#: what [`OBLRBaseline`] takes for the squared norm of a completion's gradient
GRADIENT_WEIGHTS = ("lengths", "energies")
#: most side columns that [`ProcessRewards`] reads
MOST_STEPS = 256


def _rewards(groups: RolloutGroups) -> Tensor:
    """TRL's weighted reward; NaN for what is not there."""
    return cast(Tensor, groups.weighted_rewards).masked_fill(~cast(Tensor, groups.present), math.nan)


def _lengths(groups: RolloutGroups) -> Tensor:
    return cast(Tensor, groups.loss_tokens)


def _stats(groups: RolloutGroups, who: str) -> TokenStats:
    if groups.token_stats is None:
        raise ValueError(
            f"{who} reads groups.token_stats, which are not there. EffiGRPOTrainer adds them for an "
            "advantage_transform with needs_token_stats = True; a wrapper around it must have that attribute too."
        )
    return groups.token_stats


def _energies(groups: RolloutGroups, who: str) -> tuple[Tensor, Tensor]:
    stats = _stats(groups, who)
    mask = stats.mask & cast(Tensor, groups.present).unsqueeze(-1)
    return token_energies(stats.logps, stats.sum_sq_probs, mask, stats.ratios), mask


def side_of(groups: RolloutGroups, name: str, who: str) -> Tensor:
    """
    Return a side column of the groups, NaN where there is no completion.

    Raises:
        ValueError: there is no such column; the message names those that there are.
    """
    if name not in groups.side:
        known = ", ".join(sorted(groups.side)) or "none"
        raise ValueError(
            f"{who}: there is no side column {name!r}; there are: {known}. Pass side_column(fn, name={name!r}) among "
            "the reward functions."
        )
    return groups.side[name].masked_fill(~cast(Tensor, groups.present), math.nan)


@dataclass(frozen=True)
class OPO:
    """
    Optimal reward baseline: the mean reward of the group weighted by lengths, and no standard deviation.

    `A_i = r_i - sum_j L_j r_j / sum_j L_j`, `L` the tokens in the loss. See
    [`~hf_effi.functional.rollouts.weighted_advantages`]. Paper:
    [2505.23585](https://huggingface.co/papers/2505.23585).

    Example:
    ```python
    >>> from hf_effi.protocols import RolloutGroups
    >>> groups = RolloutGroups(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[3, 1]]), step=0)
    >>> OPO()(groups).tolist()
    [[0.25, -0.75]]
    ```
    """

    def __call__(self, groups: RolloutGroups) -> Tensor:
        """Return the advantages, shape `(num_groups, group_size)`."""
        return weighted_advantages(_rewards(groups), _lengths(groups).double())


@dataclass(frozen=True)
class OTB:
    """
    Optimal token baseline: each token has a baseline of its own, from how uncertain the policy was up to there.

    See [`~hf_effi.functional.rollouts.token_advantages`] and [`~hf_effi.functional.rollouts.token_energies`]. Under
    vLLM's correction the energies are multiplied by the square of the ratio. One more forward of all rows without a
    gradient. Paper: [2602.07078](https://huggingface.co/papers/2602.07078).

    Args:
        tail (`str`, *optional*, defaults to `"last"`): The baseline where only one completion of the group still has a
            token: the `"last"` one that two had a part in, or `"zero"`, as in verl.

    Raises:
        ValueError: `tail` is unknown.

    Example:
    ```python
    >>> OTB().needs_token_stats
    True
    ```
    """

    tail: str = "last"
    needs_token_stats = True

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {TAILS}, got {self.tail!r}.")

    def __call__(self, groups: RolloutGroups) -> Tensor:
        """Return the advantages, shape `(num_groups, group_size, tokens)`."""
        return token_advantages(_rewards(groups), *_energies(groups, "OTB"), self.tail)


@dataclass(frozen=True)
class OBLRBaseline:
    """
    Baseline of least gradient variance, estimated from the other completions of the group.

    `b_i = sum_{j != i} w_j r_j / sum_{j != i} w_j`, `w` the squared norm of `grad log pi(y|x)`. No standard deviation.
    See [`~hf_effi.functional.rollouts.weighted_advantages`]. Paper:
    [2511.23310](https://huggingface.co/papers/2511.23310); its weights are not public, those here are two cheap ones.

    Args:
        weights (`str`, *optional*, defaults to `"lengths"`): `"lengths"`, the tokens in the loss; or `"energies"`, the
            squared norm with respect to the logits, `W` of [`OTB`] at the last token, for one more forward of all rows
            without a gradient.
        leave_one_out (`bool`, *optional*, defaults to `True`): With `False` the completion itself has a part in its
            baseline, and the gradient is biased towards 0; with `"lengths"` that is [`OPO`].

    Raises:
        ValueError: `weights` is unknown, or `leave_one_out` is no bool.

    Example:
    ```python
    >>> OBLRBaseline().needs_token_stats, OBLRBaseline("energies").needs_token_stats
    (False, True)
    ```
    """

    weights: str = "lengths"
    leave_one_out: bool = True

    def __post_init__(self) -> None:
        if self.weights not in GRADIENT_WEIGHTS:
            raise ValueError(f"weights must be one of {GRADIENT_WEIGHTS}, got {self.weights!r}.")
        if not isinstance(self.leave_one_out, bool):
            raise ValueError(f"leave_one_out={self.leave_one_out!r} must be True or False.")

    @property
    def needs_token_stats(self) -> bool:
        """Whether `groups.token_stats` are asked for."""
        return self.weights == "energies"

    def __call__(self, groups: RolloutGroups) -> Tensor:
        """Return the advantages, shape `(num_groups, group_size)`."""
        return weighted_advantages(_rewards(groups), self.squared_norms(groups), self.leave_one_out)

    def squared_norms(self, groups: RolloutGroups) -> Tensor:
        """Return `w`, float64, shape `(num_groups, group_size)`."""
        if self.weights == "lengths":
            return _lengths(groups).double()
        energies, _ = _energies(groups, "OBLRBaseline('energies')")
        return energies[..., -1] if energies.size(-1) else torch.zeros_like(groups.rewards, dtype=torch.float64)


@dataclass(frozen=True)
class EntropicAdvantages:
    """
    Advantages for a reward of which the best single completion counts, and not the mean: TTT-Discover's.

    See [`~hf_effi.functional.rollouts.entropic_advantages`]. They are much larger than TRL's, up to 11.8 in a group of
    four: keep the clipping of ratios and lower the learning rate. Paper:
    [2601.16175](https://huggingface.co/papers/2601.16175).

    Args:
        kl (`float`, *optional*, defaults to `ln 2`): Divergence of the weights of a group from equal ones, in nats, in
            (0, 16].

    Raises:
        ValueError: `kl` is out of range.

    Example:
    ```python
    >>> round(EntropicAdvantages().kl, 4)
    0.6931
    ```
    """

    kl: float = math.log(2.0)

    def __post_init__(self) -> None:
        check_number("kl", self.kl, 0.0, 16.0, open_low=True)

    def __call__(self, groups: RolloutGroups) -> Tensor:
        """Return the advantages, shape `(num_groups, group_size)`."""
        return entropic_advantages(_rewards(groups), self.kl)


@dataclass(frozen=True)
class ProcessRewards:
    """
    Rewards of steps beside the reward of the outcome.

    `r_i = outcome_i + weight * aggregate(steps_i)`, then the mean of the group is taken off and, with `scale="group"`,
    divided by its standard deviation. With `how="decayed"` the outcome is a part of the aggregate already:
    `r_i = weight * aggregate(steps_i, outcome_i)`. The scores of the steps come from side columns, one for each step,
    in order: NaN where a completion has no such step; without any step the outcome alone counts. See
    [`~hf_effi.functional.rollouts.aggregate_steps`].

    Args:
        columns (`str` or `Sequence[str]`): Names of the side columns, at most 256.
        how (`str`, *optional*, defaults to `"min"`): `"min"`, `"prod"`, `"mean"`, `"last"` or `"decayed"`. `prod`
            shrinks with the number of steps; `min` is raised by making fewer steps.
        weight (`float`, *optional*, defaults to 1.0): In units of the outcome for one of the aggregate, > 0.
        scale (`str`, *optional*, defaults to `"group"`): Or `"none"`.

    Raises:
        ValueError: no column, one twice, or a setting out of range.

    Example:
    ```python
    >>> ProcessRewards(["step_1", "step_2"], how="mean").columns
    ('step_1', 'step_2')
    ```
    """

    columns: str | Sequence[str]
    how: str = "min"
    weight: float = 1.0
    scale: str = "group"

    def __post_init__(self) -> None:
        given = self.columns if isinstance(self.columns, (list, tuple)) else ()
        names = (self.columns,) if isinstance(self.columns, str) else tuple(given)
        good = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
        if not good or not 1 <= len(names) <= MOST_STEPS:
            raise ValueError(
                f"columns must be 1 to {MOST_STEPS} different names of side columns, got {self.columns!r}."
            )
        object.__setattr__(self, "columns", names)
        for name, value, known in (("how", self.how, STEP_AGGREGATIONS), ("scale", self.scale, ADVANTAGE_SCALES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}.")
        check_number("weight", self.weight, 0.0, open_low=True)

    @property
    def side_columns(self) -> tuple[str, ...]:
        """Side columns that are read."""
        return (self.columns,) if isinstance(self.columns, str) else tuple(self.columns)

    def __call__(self, groups: RolloutGroups) -> Tensor:
        """Return the advantages, shape `(num_groups, group_size)`."""
        return standardized(self.rewards(groups), self.scale)

    def rewards(self, groups: RolloutGroups) -> Tensor:
        """Return outcome and steps together, shape `(num_groups, group_size)`; NaN = unscorable."""
        steps = torch.stack([side_of(groups, name, "ProcessRewards") for name in self.columns], dim=-1)
        outcome = _rewards(groups).to(steps.dtype)
        known = ~torch.isnan(steps)
        if self.how == "decayed":
            return (self.weight * aggregate_steps(steps, known, "decayed", outcome)).to(groups.rewards.dtype)
        found = aggregate_steps(steps, known, self.how)
        # As TRL adds functions up: what does not apply adds nothing, and where none applies there is no reward.
        both = outcome.nan_to_num(0.0) + self.weight * found.nan_to_num(0.0)
        return both.masked_fill(torch.isnan(outcome) & torch.isnan(found), math.nan).to(groups.rewards.dtype)


@dataclass(frozen=True)
class DurationWeights:
    """
    Multiplies TRL's advantages by how long a completion took, against the bias of asynchronous rollouts.

    `A_i <- A_i t_i / mean(t)` over the completions that are given together. See
    [`~hf_effi.functional.rollouts.duration_weights`]. `EffiGRPOTrainer` generates synchronously: there every
    completion is seen once, however long it takes, and the weights would introduce the bias that they undo elsewhere.
    So they are refused without `force=True`, which is for rollouts that come from a server which drops what is late.

    Args:
        column (`str`, *optional*, defaults to `"seconds"`): Side column with the durations; NaN weighs 1.
        force (`bool`, *optional*, defaults to `False`): Take the weights although generation is synchronous.

    Raises:
        RefusedError: without `force=True`.
        ValueError: `column` is no name, or `force` no bool.

    Example:
    ```python
    >>> DurationWeights("seconds", force=True)
    DurationWeights(column='seconds', force=True)
    ```
    """

    column: str = "seconds"
    force: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise ValueError(f"column={self.column!r} must be the name of a side column.")
        if not isinstance(self.force, bool):
            raise ValueError(f"force={self.force!r} must be True or False.")
        if not self.force:
            raise RefusedError(
                "DurationWeights undoes a bias of asynchronous rollouts, which see more often what is done quickly. "
                "EffiGRPOTrainer generates synchronously and has no such bias: the weights would introduce one. Drop "
                "them, or pass force=True if your rollouts come from a server that drops what is late."
            )

    @property
    def side_columns(self) -> tuple[str, ...]:
        """Side columns that are read."""
        return (self.column,)

    def __call__(self, groups: RolloutGroups) -> Tensor:
        """Return the advantages, shape `(num_groups, group_size)`."""
        counts = cast(Tensor, groups.present) & groups.live
        weights = duration_weights(side_of(groups, self.column, "DurationWeights"), counts)
        return groups.advantages * weights.to(groups.advantages)
