"""Which groups and which completions to train on. Every choice is a deterministic function of its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data._checks import is_finite_number
from ..options import refuse_idle

#: Pass rates are small-denominator fractions; this absorbs the rounding of `k / G` and nothing else.
_RATE_TOLERANCE = 1e-9

#: why a group is kept or dropped; each has a counter in the log
REASONS = ("kept", "too_hard", "too_easy", "zero_variance", "no_loss_tokens", "unscorable")


@dataclass(frozen=True)
class GroupDecision:
    """
    What a group filter decided.

    Args:
        keep (`torch.Tensor`): Boolean, shape `(num_groups,)`.
        reasons (`tuple[str, ...]`): One word per group; `"kept"` where `keep` is true.
    """

    keep: Tensor
    reasons: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Return how many groups fell under each reason that is not `"kept"`."""
        dropped = [reason for reason in self.reasons if reason != "kept"]
        return {reason: dropped.count(reason) for reason in sorted(set(dropped))}


def group_pass_rates(rewards: Tensor) -> Tensor:
    """
    Mean reward of each group, ignoring unscorable (NaN) rows.

    `p(x) = mean_i r_i`, the pass rate when rewards are 0 or 1.

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`; NaN marks a row no reward function could score.

    Returns:
        `torch.Tensor`: float64, shape `(num_groups,)`; NaN where a whole group is unscorable.

    Example:
    ```python
    >>> group_pass_rates(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, float("nan"), 1.0, 0.0]])).tolist()
    [0.25, 0.6666666666666666]
    ```
    """
    return torch.nanmean(rewards.to(torch.float64), dim=1)


def binary_pass_rates(rewards: Tensor) -> Tensor:
    """
    Pass rate of each group where there is one: where every scorable reward of the generation is 0 or 1.

    A mean of other rewards is no rate of anything: a reward of -1 for a wrong answer or a bonus for brevity gives
    numbers that look like one. All rows of a group count, also those that a truncation took out of the loss: they are
    answers that the policy gave, and they are in the mean that TRL's advantages are measured from.

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`; NaN rows are ignored.

    Returns:
        `torch.Tensor`: float64, shape `(num_groups,)`; NaN where a group is unscorable, and everywhere if a reward is
        neither 0 nor 1.

    Example:
    ```python
    >>> binary_pass_rates(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])).tolist()
    [0.25, 0.75]
    >>> binary_pass_rates(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist()
    [nan, nan]
    ```
    """
    rates = group_pass_rates(rewards)
    scorable = rewards[~torch.isnan(rewards)]
    return rates if bool(((scorable == 0) | (scorable == 1)).all()) else torch.full_like(rates, math.nan)


def equal_reward_groups(rewards: Tensor) -> Tensor:
    """
    Whether all scorable rewards of a group are exactly equal, so that every advantage of the group is exactly zero.

    Exact equality, not a small standard deviation: the mean of `G` equal fp32 numbers can differ from them in the last
    bit, which a division by `std + 1e-4` turns into an advantage near 1e-4 that carries nothing but rounding.

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`; NaN rows are ignored.

    Returns:
        `torch.Tensor`: Boolean, shape `(num_groups,)`. A group with no scorable row counts as equal.

    Example:
    ```python
    >>> equal_reward_groups(torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [float("nan"), 0.3, 0.3]])).tolist()
    [True, False, True]
    ```
    """
    missing = torch.isnan(rewards)
    highest = rewards.masked_fill(missing, -math.inf).amax(dim=1)
    lowest = rewards.masked_fill(missing, math.inf).amin(dim=1)
    return (highest <= lowest) | missing.all(dim=1)


def keep_groups_by_pass_rate(
    rewards: Tensor, low: float = 0.2, high: float = 0.8, has_gradient: Tensor | None = None
) -> GroupDecision:
    """
    Balanced online difficulty filtering: keep a group iff `low <= p <= high`, its rewards differ and it has a
    gradient.

    The ends 0 and 1 are open: a group that is all wrong or all right has no gradient, so `(0, 1)` is the zero-variance
    filter of DAPO's dynamic sampling. Note the discretisation: with 8 completions per group, 0.2-0.8 means 2 to 6
    right.

    Paper: [Online Difficulty Filtering for Reasoning Oriented Reinforcement
    Learning](https://huggingface.co/papers/2504.03380); dynamic sampling:
    [DAPO](https://huggingface.co/papers/2503.14476).

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`, each in [0, 1] unless the band is `(0, 1)`, where
            any finite reward will do; NaN rows are ignored.
        low (`float`, *optional*, defaults to `0.2`): Lower end, in [0, 1), inclusive unless 0.
        high (`float`, *optional*, defaults to `0.8`): Upper end, in (low, 1], inclusive unless 1.
        has_gradient (`torch.Tensor`, *optional*): Boolean, shape `(num_groups, group_size)`: rows with a non-zero
            advantage and a token in the loss, see [`rows_with_gradient`]. A group without one is dropped. By default
            every row of a group whose rewards differ has a gradient. The pass rate is that of all scorable rows: a
            completion that was cut off and masked is an answer that the policy gave.

    Returns:
        [`GroupDecision`]: the mask and a reason per group: `kept`, `unscorable`, `too_hard`, `too_easy`,
        `zero_variance`, or `no_loss_tokens` where the rewards would do and no row with a token in the loss has an
        advantage. The first that applies, in this order.

    Raises:
        ValueError: the band is empty or outside [0, 1], or a reward is outside [0, 1] with a band inside it.

    Example:
    ```python
    >>> rewards = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 1, 1], [1.0, 1, 0, 0], [0.0, 0, 0, 0]])
    >>> keep_groups_by_pass_rate(rewards, 0.2, 0.8).reasons
    ('kept', 'too_easy', 'kept', 'too_hard')
    >>> keep_groups_by_pass_rate(rewards, 0.0, 1.0).reasons
    ('kept', 'zero_variance', 'kept', 'zero_variance')
    >>> cut = torch.tensor([[True, False, False, False], [True] * 4, [False] * 4, [True] * 4])
    >>> keep_groups_by_pass_rate(rewards, 0.0, 1.0, has_gradient=cut).reasons
    ('kept', 'zero_variance', 'no_loss_tokens', 'zero_variance')
    ```
    """
    check_difficulty_range(low, high)
    variance_only = low == 0 and high == 1
    if not variance_only:
        outside = rewards[(rewards < 0) | (rewards > 1)]
        if outside.numel():
            raise ValueError(
                f"a pass rate needs rewards in [0, 1], got {outside[0].item():g}. Name the 0/1 correctness reward "
                "with `difficulty_reward`, or use `difficulty_range=(0, 1)`, which only drops groups of equal rewards."
            )
    rates = group_pass_rates(rewards).tolist()
    equal = equal_reward_groups(rewards).tolist()
    dead = [False] * len(rates) if has_gradient is None else (~has_gradient.any(dim=1)).tolist()
    reasons = []
    for rate, is_equal, is_dead in zip(rates, equal, dead, strict=True):
        if math.isnan(rate):
            reasons.append("unscorable")
        elif not variance_only and (rate < low - _RATE_TOLERANCE or (low == 0 and rate <= 0)):
            reasons.append("too_hard")
        elif not variance_only and (rate > high + _RATE_TOLERANCE or (high == 1 and rate >= 1)):
            reasons.append("too_easy")
        else:
            reasons.append("zero_variance" if is_equal else "no_loss_tokens" if is_dead else "kept")
    keep = torch.tensor([reason == "kept" for reason in reasons], dtype=torch.bool)
    return GroupDecision(keep=keep, reasons=tuple(reasons))


def check_difficulty_range(low: float, high: float) -> None:
    """Raise `ValueError` unless `0 <= low < high <= 1`."""
    if not (is_finite_number(low) and is_finite_number(high) and 0 <= low < high <= 1):
        raise ValueError(
            f"difficulty_range must satisfy 0 <= low < high <= 1, got ({low!r}, {high!r}). Use e.g. (0.2, 0.8), or "
            "(0, 1) to drop only groups whose rewards are all equal."
        )


def fill_order(
    rewards: Tensor, low: float, high: float, has_gradient: Tensor | None = None, live: Tensor | None = None
) -> list[int]:
    """
    In which order rejected groups are taken when a filtered batch cannot be filled.

    Groups with a gradient come first, by the distance of their pass rate from the middle of the band; then those
    without one; then those without any token in the loss; then unscorable ones. Ties go to the lower index.

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`.
        low (`float`): Lower end of the band.
        high (`float`): Upper end of the band.
        has_gradient (`torch.Tensor`, *optional*): As in [`keep_groups_by_pass_rate`]. By default all rows of the
            groups whose rewards differ.
        live (`torch.Tensor`, *optional*): Boolean, shape `(num_groups, group_size)`: rows with a token in the loss. By
            default all.

    Returns:
        `list[int]`: every group index once.

    Example:
    ```python
    >>> fill_order(torch.tensor([[0.0, 0, 0, 0], [1.0, 1, 1, 0], [1.0, 0, 0, 0]]), 0.4, 0.6)
    [1, 2, 0]
    ```
    """
    middle = (low + high) / 2
    rates = group_pass_rates(rewards).tolist()
    dead = equal_reward_groups(rewards)
    if has_gradient is not None:
        dead = dead | ~has_gradient.any(dim=1)
    empty = torch.zeros_like(dead) if live is None else ~live.any(dim=1)
    rank = (dead.int() + (dead & empty).int()).tolist()

    def key(index: int) -> tuple[int, float, int]:
        rate = rates[index]
        if math.isnan(rate):
            return (3, 0.0, index)
        return (rank[index], round(abs(rate - middle), 9), index)

    return sorted(range(len(rates)), key=key)


def next_refill_size(missing: int, kept: int, generated: int, cap: int, factor: float = 1.25) -> int:
    """
    How many groups to generate in the next refill round.

    `ceil(factor * missing / acceptance)`, with the acceptance rate seen so far (GRESO's adaptive size,
    [2506.02177](https://huggingface.co/papers/2506.02177)), at least `missing` and at most `cap`.

    Args:
        missing (`int`): Groups still needed, >= 1.
        kept (`int`): Groups accepted so far.
        generated (`int`): Groups generated so far, >= 1.
        cap (`int`): Most groups of one round, usually the size of the first round.
        factor (`float`, *optional*, defaults to `1.25`): Margin for the spread of the acceptance rate.

    Example:
    ```python
    >>> next_refill_size(missing=4, kept=12, generated=16, cap=16)
    7
    >>> next_refill_size(missing=16, kept=0, generated=16, cap=16)
    16
    ```
    """
    if kept == 0:
        return cap
    wanted = math.ceil(factor * missing * generated / kept)
    return max(1, min(cap, max(missing, wanted)))


def kept_share(kept: Sequence[int], original: Sequence[int], loss_tokens: Tensor, by_token: bool) -> float:
    """
    What the loss of the kept rows is multiplied by so that it is averaged over the original rows.

    `L = (1 / Z_original) * sum_{i kept} l_i = (Z_kept / Z_original) * L_kept`: a dropped row counts as one without any
    loss. `Z` is what the loss divides by: rows, or tokens in the loss.

    Args:
        kept (`Sequence[int]`): Rows that are trained on; one that comes several times counts once.
        original (`Sequence[int]`): Rows that were there before pruning; those of groups that a filter dropped are not.
        loss_tokens (`torch.Tensor`): Tokens in the loss of every row, shape `(rows,)`.
        by_token (`bool`): Whether the loss divides by tokens (dapo, cispo, vespo, bnpo) or by rows (grpo, dr_grpo,
            sapo, luspo).

    Returns:
        `float`: in [0, 1].

    Example:
    ```python
    >>> tokens = torch.tensor([10, 20, 30, 40])
    >>> kept_share([3, 1], range(4), tokens, by_token=False), kept_share([3, 1], range(4), tokens, by_token=True)
    (0.5, 0.6)
    ```
    """
    kept = sorted(set(kept))
    if not by_token:
        return len(kept) / len(original)
    return float(loss_tokens[kept].sum()) / max(1.0, float(loss_tokens[list(original)].sum()))


def pruned_count(rows: int, prune_rate: float) -> int:
    """
    How many of `rows` remain after pruning: `rows - int(rows * prune_rate)`, as in CPPO's released code.

    Example:
    ```python
    >>> [pruned_count(16, rate) for rate in (0.0, 0.5, 0.875, 0.9375)]
    [16, 8, 2, 1]
    ```
    """
    return rows - int(rows * prune_rate + _RATE_TOLERANCE)


def keep_by_advantage(
    advantages: Tensor,
    keep: int,
    *,
    metric: str = "smallest",
    balance_signs: bool = False,
    generator: torch.Generator | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """
    CPPO completion pruning inside one pool of rows: which `keep` rows survive.

    The gradient of a completion scales with `|A_i|`, so CPPO prunes the rows with the smallest `|A_i|`. Ties go to the
    lower row index on every backend. Paper: [CPPO](https://huggingface.co/papers/2503.22342).

    With binary rewards the largest `|A|` belong to the rarer outcome, so a kept set can have one sign only, which
    trains like rejection sampling; `balance_signs` first gives each sign half of the places, as far as it has rows.

    A row without a token in the loss counts as `A_i = 0` and is kept only when no other row is left, whatever the
    metric.

    Args:
        advantages (`torch.Tensor`): Shape `(rows,)`.
        keep (`int`): Rows to keep, in [1, rows].
        metric (`str`, *optional*, defaults to `"smallest"`): What is pruned: `"smallest"` |A| (CPPO), `"largest"` |A|,
            or `"random"` rows (the control that a claim needs; takes `generator`).
        balance_signs (`bool`, *optional*, defaults to `False`): See above. Not for `"random"`.
        generator (`torch.Generator`, *optional*): Source of the random metric, seeded alike on all ranks.
        live (`torch.Tensor`, *optional*): Boolean, shape `(rows,)`: rows with a token in the loss. By default all.

    Returns:
        `torch.Tensor`: Boolean, shape `(rows,)`, exactly `keep` true.

    Raises:
        ValueError: `keep` or `metric` is outside its range, or `balance_signs` or `generator` would do nothing.

    Example:
    ```python
    >>> keep_by_advantage(torch.tensor([0.1, -2.0, 0.5, 0.5]), keep=2).tolist()
    [False, True, True, False]
    >>> keep_by_advantage(torch.tensor([3.0, 2.0, 0.1, -0.2]), keep=2, balance_signs=True).tolist()
    [True, False, False, True]
    >>> live = torch.tensor([False, True, False, True])
    >>> keep_by_advantage(torch.tensor([3.0, 2.0, 0.1, -0.2]), 2, live=live).tolist()
    [False, True, False, True]
    ```
    """
    rows = advantages.numel()
    advantages = advantages.detach()
    if live is not None:
        advantages = torch.where(live, advantages, torch.zeros_like(advantages))
    if not 1 <= keep <= rows:
        raise ValueError(f"keep must be in [1, {rows}] (the rows of the pool), got {keep}. Lower `prune_rate`.")
    refuse_idle("balance_signs", balance_signs, False, metric != "random", "without metric='random'")
    refuse_idle("generator", generator, None, metric == "random", "with metric='random'")
    if metric == "random":
        score = torch.rand(rows, generator=generator)
    elif metric in ("smallest", "largest"):
        score = advantages.abs().to("cpu", torch.float64) * (1 if metric == "smallest" else -1)
    else:
        raise ValueError(f"prune_metric must be 'smallest', 'largest' or 'random', got {metric!r}.")
    # A stable sort keeps the lower index first among equal scores, whatever the backend.
    order = torch.sort(score, descending=True, stable=True).indices.tolist()
    if live is not None:
        dead = (~live).tolist()
        order.sort(key=lambda row: dead[row])
    if balance_signs:
        sign = torch.sign(advantages).tolist()
        half = keep // 2
        chosen = [i for i in order if sign[i] > 0][:half] + [i for i in order if sign[i] < 0][:half]
        taken = set(chosen)
        chosen += [i for i in order if i not in taken][: keep - len(chosen)]
    else:
        chosen = order[:keep]
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[chosen] = True
    return mask
