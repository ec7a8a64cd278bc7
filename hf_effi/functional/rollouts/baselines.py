"""What is taken off rewards, and what they are divided by, to make advantages: baselines of least variance and others.

All functions take rewards of shape `(num_groups, group_size)` in which NaN is a completion without a reward
(unscorable, or a place that a smaller group does not have): its advantage is 0 and it is part of no mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data import check_number
from .selection import equal_reward_groups

#: how the rewards of the steps of a completion become one, see [`aggregate_steps`]
STEP_AGGREGATIONS = ("min", "prod", "log_mean", "mean", "last", "decayed")
#: what advantages are divided by, see [`standardized`]
ADVANTAGE_SCALES = ("group", "none")
#: which baseline the tokens get that only one completion of a group is long enough for, see [`token_advantages`]
TAILS = ("last", "zero")

_EPSILON = 1e-4  # TRL's, beside a standard deviation
#: steepest weight of rewards that lie in [0, 1], and how often the bracket around it is halved
_STEEPEST, _HALVINGS = 1e6, 60


def _parts(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards in float64 with 0 in the place of NaN, which are known, and the groups without any difference."""
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape (num_groups, group_size), got {tuple(rewards.shape)}.")
    known = ~torch.isnan(rewards)
    if not rewards.numel():
        return rewards.double(), known, torch.ones(len(rewards), dtype=torch.bool)
    return rewards.double().masked_fill(~known, 0.0), known, equal_reward_groups(rewards)


def _settled(advantages: Tensor, known: Tensor, equal: Tensor, like: Tensor) -> Tensor:
    """Make advantages exactly 0 where there is no reward or no difference."""
    dead = equal.unsqueeze(1) | ~known
    return advantages.masked_fill(dead.to(advantages.device), 0.0).to(like.dtype)


def weighted_advantages(rewards: Tensor, weights: Tensor, leave_one_out: bool = False) -> Tensor:
    """
    Rewards less a baseline that is a weighted mean of the group, without a standard deviation.

    `A_i = r_i - b`, `b = sum_j w_j r_j / sum_j w_j`. The variance of `A * grad log pi` is least where `w` is the
    squared norm of `grad log pi(y|x)`. With the number of tokens for it this is OPO. With `leave_one_out` the baseline
    of a completion is that of the others, so that the gradient is unbiased: `b_i` then sums over `j != i`.

    Papers: [On-Policy RL with Optimal Reward Baseline](https://huggingface.co/papers/2505.23585),
    [OBLR-PO](https://huggingface.co/papers/2511.23310).

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`; NaN = none.
        weights (`torch.Tensor`): Finite, >= 0, same shape. Where those of the known rewards sum to 0, the baseline is
            the plain mean.
        leave_one_out (`bool`, *optional*, defaults to `False`): A completion whose group has no other known reward
            gets 0.

    Returns:
        `torch.Tensor`: Shape `(num_groups, group_size)`; exactly 0 where all known rewards of a group are equal.

    Raises:
        ValueError: shapes differ, or a weight is negative or not finite.

    Example:
    ```python
    >>> rewards, lengths = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 1.0]])
    >>> weighted_advantages(rewards, lengths).tolist()
    [[0.5, -0.5, -0.5]]
    >>> [round(a, 4) for a in weighted_advantages(rewards, lengths, leave_one_out=True)[0].tolist()]
    [1.0, -0.6667, -0.6667]
    ```
    """
    values, known, equal = _parts(rewards)
    if weights.shape != rewards.shape:
        raise ValueError(
            f"weights must have the shape of rewards, {tuple(rewards.shape)}, got {tuple(weights.shape)}."
        )
    weights = weights.to(values.device).double()
    if not bool((weights[known].isfinite() & (weights[known] >= 0)).all()):
        raise ValueError(f"weights must be finite and >= 0, got {weights[known].tolist()[:8]}.")
    weights = weights.masked_fill(~known, 0.0)
    plain = known.double()
    own = 1.0 if leave_one_out else 0.0

    def mean(of: Tensor) -> tuple[Tensor, Tensor]:
        total = of.sum(1, keepdim=True) - own * of
        return ((of * values).sum(1, keepdim=True) - own * of * values) / total.clamp(min=1e-300), total

    baseline, total = mean(weights)
    # What is left of a sum from which its largest part is taken is rounding.
    enough = total > 1e-12 * weights.sum(1, keepdim=True)
    unweighted, others = mean(plain)
    baseline = torch.where(enough, baseline, unweighted)
    advantages = torch.where(others > 0, values - baseline, torch.zeros_like(values))
    return _settled(advantages, known, equal, rewards)


def token_energies(logps: Tensor, sum_sq_probs: Tensor, mask: Tensor, ratios: Tensor | None = None) -> Tensor:
    """
    Squared norm of the gradient with respect to the logits, summed up to each token.

    `W_t = sum_{j <= t} rho_j^2 (1 - 2 pi_j + sum_v pi_v^2)`: for one token, `||e_y - pi||^2`. Tokens outside of the
    mask count nothing.

    Args:
        logps (`torch.Tensor`): Log-prob of each token, shape `(..., tokens)`.
        sum_sq_probs (`torch.Tensor`): `sum_v pi_v^2` over the vocabulary at its position, same shape.
        mask (`torch.Tensor`): Tokens in the loss, boolean, same shape.
        ratios (`torch.Tensor`, *optional*): `rho`, what the loss of a token is multiplied by, same shape; 1 by
            default.

    Returns:
        `torch.Tensor`: float64, same shape, >= 0.

    Example:
    ```python
    >>> logps, squares = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.5, 0.375])
    >>> [round(w, 4) for w in token_energies(logps, squares, torch.tensor([True, True])).tolist()]
    [0.5, 1.375]
    ```
    """
    energy = (1.0 - 2.0 * logps.double().exp() + sum_sq_probs.double()).clamp(min=0.0)
    if ratios is not None:
        energy = energy * ratios.double().square()
    return torch.where(mask, energy, torch.zeros_like(energy)).cumsum(-1)


def token_advantages(rewards: Tensor, energies: Tensor, mask: Tensor, tail: str = "last") -> Tensor:
    """
    Rewards less a baseline for each token: the optimal token baseline (OTB).

    `A_it = r_i - B_t`, `B_t = sum_i r_i W_it / sum_i W_it` over the completions of the group that have a token at `t`.
    Where only one has, that would be its own reward.

    Paper: [The Optimal Token Baseline](https://huggingface.co/papers/2602.07078).

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`; NaN = none.
        energies (`torch.Tensor`): `W`, see [`token_energies`], shape `(num_groups, group_size, tokens)`.
        mask (`torch.Tensor`): Tokens in the loss, boolean, same shape.
        tail (`str`, *optional*, defaults to `"last"`): Where fewer than two completions have a token: `"last"` keeps
            the last baseline that two had a part in (0 before there was one); `"zero"` takes nothing off, as verl
            does.

    Returns:
        `torch.Tensor`: Shape `(num_groups, group_size, tokens)`; exactly 0 outside of the mask, where all known
        rewards of a group are equal, and in a group with one known reward.

    Raises:
        ValueError: shapes do not fit, or `tail` is unknown.

    Example:
    ```python
    >>> rewards, mask = torch.tensor([[1.0, 0.0]]), torch.tensor([[[True, True], [True, False]]])
    >>> token_advantages(rewards, torch.tensor([[[1.0, 2.0], [3.0, 3.0]]]), mask).tolist()
    [[[0.75, 0.75], [-0.25, 0.0]]]
    ```
    """
    values, known, equal = _parts(rewards)
    if energies.shape != mask.shape or energies.ndim != 3 or energies.shape[:2] != rewards.shape:
        raise ValueError(
            f"energies and mask must have shape {tuple(rewards.shape)} + (tokens,), got {tuple(energies.shape)} and "
            f"{tuple(mask.shape)}."
        )
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {TAILS}, got {tail!r}.")
    here = mask & known.unsqueeze(-1)
    weights, values = torch.where(here, energies.double(), 0.0), values.unsqueeze(-1)
    total, count = weights.sum(1), here.sum(1)
    plain = (here * values).sum(1) / count.clamp(min=1)
    baseline = torch.where(total > 0, (weights * values).sum(1) / total.clamp(min=1e-300), plain)
    shared = count >= 2
    if tail == "zero":
        baseline = torch.where(shared, baseline, 0.0)
    else:
        places = torch.arange(mask.size(2), device=mask.device).expand_as(shared)
        last = torch.where(shared, places, -1).cummax(1).values if mask.size(2) else places
        baseline = torch.where(last >= 0, baseline.gather(1, last.clamp(min=0)), 0.0)
    dead = equal | (known.sum(1) < 2)
    advantages = (values - baseline.unsqueeze(1)).masked_fill(~here | dead.view(-1, 1, 1), 0.0)
    return advantages.to(rewards.dtype)


def variance_ratio(advantages: Tensor, others: Tensor, weights: Tensor) -> float:
    """
    Second moment of the gradient under some advantages, over that under others.

    `sum w A^2 / sum w A'^2` with `w` the squared norm of `grad log pi`: both have the same mean where baselines are
    unbiased, so that below 1 the first has the smaller variance.

    Args:
        advantages, others, weights (`torch.Tensor`): Of one shape, `(num_groups, group_size)`.

    Returns:
        `float`: NaN where the others are all 0.

    Example:
    ```python
    >>> variance_ratio(torch.tensor([[0.5, -0.5]]), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    0.25
    ```
    """
    below = float((weights.double() * others.double().square()).sum())
    above = float((weights.double() * advantages.double().square()).sum())
    return above / below if below > 0 else math.nan


def entropic_advantages(rewards: Tensor, kl: float = math.log(2.0)) -> Tensor:
    """
    Advantages that look for the best completion of a group and not for a better mean.

    `A_i = e^{beta r_i} / mean_{j != i} e^{beta r_j} - 1`, where `beta >= 0` of each group makes the KL divergence of
    `softmax(beta r)` from the uniform distribution equal to `kl`. They do not change with `r + c` or `s r`, `s > 0`.
    Where the divergence cannot be reached, because too many completions are the best, `beta` is infinite: the best get
    the limit, the others -1. A single best one would then have an infinite advantage (a group of two, under `kl` =
    `ln 2`): it gets `n - 1`, for `n` known rewards.

    Paper: [Learning to Discover at Test Time](https://huggingface.co/papers/2601.16175).

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`; NaN = none.
        kl (`float`, *optional*, defaults to `ln 2`): In nats, in (0, 16].

    Returns:
        `torch.Tensor`: Shape `(num_groups, group_size)`, >= -1; exactly 0 where all known rewards are equal.

    Raises:
        ValueError: `kl` is out of range.

    Example:
    ```python
    >>> rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    >>> [[round(a, 3) for a in row] for row in entropic_advantages(rewards).tolist()]
    [[-0.798, -0.798, -0.798, 11.849], [-1.0, -1.0, 2.0, 2.0]]
    ```
    """
    check_number("kl", kl, 0.0, 16.0, open_low=True)
    values, known, equal = _parts(rewards)
    if not rewards.numel():
        return rewards.clone()
    lowest = values.masked_fill(~known, math.inf).amin(1, keepdim=True)
    highest = values.masked_fill(~known, -math.inf).amax(1, keepdim=True)
    span = torch.where(equal.unsqueeze(1), torch.ones_like(highest), highest - lowest)
    # Scaled to [-1, 0], so that no power overflows and the bracket fits every reward.
    scaled = torch.where(known, (values - highest) / span, torch.zeros_like(values))
    scaled = torch.where(equal.unsqueeze(1), torch.zeros_like(scaled), scaled)
    count = known.sum(1, keepdim=True)
    powers = torch.where(known, (_slope(scaled, known, kl) * scaled).exp(), torch.zeros_like(scaled))
    mean = (powers.sum(1, keepdim=True) - powers) / (count - 1).clamp(min=1)
    alone = (mean == 0) & (powers > 0)
    advantages = torch.where(alone, (count - 1).double(), powers / mean.clamp(min=1e-300) - 1.0)
    return _settled(advantages, known, equal | (count.squeeze(1) < 2), rewards)


def _slope(scaled: Tensor, known: Tensor, kl: float) -> Tensor:
    """Return `beta` of each group, shape `(num_groups, 1)`; the steepest one where it does not reach `kl`."""
    count = known.sum(1, keepdim=True).clamp(min=1).log()

    def divergence(beta: Tensor) -> Tensor:
        logits = (beta * scaled).masked_fill(~known, -math.inf)
        logs = torch.log_softmax(logits, 1).masked_fill(~known, 0.0)
        return (logs.exp() * known * logs).sum(1, keepdim=True) + count

    high = torch.ones(len(scaled), 1, dtype=scaled.dtype, device=scaled.device)
    while bool((more := (divergence(high) < kl) & (high < _STEEPEST)).any()):
        high = torch.where(more, high * 2, high)
    # What a divergence tends to: rounding lets one that only tends to `kl` seem to reach it.
    limit = count - ((scaled == 0) & known).sum(1, keepdim=True).clamp(min=1).log()
    reached, low = (divergence(high) >= kl) & (limit > kl * (1 + 1e-12)), torch.zeros_like(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = divergence(middle) >= kl
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(reached, high, torch.full_like(high, _STEEPEST))


def aggregate_steps(scores: Tensor, mask: Tensor, how: str = "min", outcome: Tensor | None = None) -> Tensor:
    """
    Make one number out of the scores of the steps of a completion.

    `min`, `mean`, `last` as they are called; `prod` is the product, which shrinks with the number of steps, and
    `log_mean` the geometric mean `exp(mean(log s))`, which does not. `decayed` is the backup of GroundedPRM:
    `(sum_{i=0}^{N-1}
    v_i (N - i) / N + f) / N` with the outcome `f`, so that early steps weigh more; `f` where there is no step.

    Paper: [GroundedPRM](https://huggingface.co/papers/2510.14942).

    Args:
        scores (`torch.Tensor`): Shape `(..., steps)`, in order.
        mask (`torch.Tensor`): Steps that there are, boolean, same shape.
        how (`str`, *optional*, defaults to `"min"`): One of `"min"`, `"prod"`, `"log_mean"`, `"mean"`, `"last"`,
            `"decayed"`.
        outcome (`torch.Tensor`, *optional*): `f`, shape `(...,)`, for `"decayed"` and only there.

    Returns:
        `torch.Tensor`: Shape `(...,)`; NaN where there is no step (`"decayed"`: where there is no outcome).

    Raises:
        ValueError: `how` is unknown, a shape does not fit, `outcome` is there without need or missing, or a score is
            below 0 for `"log_mean"`.

    Example:
    ```python
    >>> scores, mask = torch.tensor([0.9, 0.5, 0.8]), torch.tensor([True, True, True])
    >>> [round(float(aggregate_steps(scores, mask, how)), 4) for how in ("min", "prod", "mean", "last")]
    [0.5, 0.36, 0.7333, 0.8]
    >>> verdicts = torch.tensor([1.0, 1.0, -1.0])
    >>> round(float(aggregate_steps(verdicts, mask, "decayed", outcome=torch.tensor(1.0))), 4)
    0.7778
    ```
    """
    if how not in STEP_AGGREGATIONS:
        raise ValueError(f"how must be one of {STEP_AGGREGATIONS}, got {how!r}.")
    if scores.shape != mask.shape or scores.ndim < 1:
        raise ValueError(f"scores and mask must have one shape, got {tuple(scores.shape)} and {tuple(mask.shape)}.")
    if (outcome is not None) != (how == "decayed"):
        raise ValueError(f"outcome is what how='decayed' adds, and only that; how is {how!r}.")
    count = mask.sum(-1)
    if how == "decayed":
        return _decayed(scores, mask, outcome, count)  # type: ignore[arg-type]
    none = torch.full(count.shape, math.nan, dtype=scores.dtype, device=scores.device)
    if not scores.size(-1):
        return none
    if how == "min":
        found = scores.masked_fill(~mask, math.inf).amin(-1)
    elif how == "prod":
        found = scores.masked_fill(~mask, 1.0).prod(-1)
    elif how == "mean":
        found = scores.masked_fill(~mask, 0.0).sum(-1) / count.clamp(min=1)
    elif how == "log_mean":
        if bool((scores < 0).logical_and(mask).any()):
            raise ValueError(f"how='log_mean' needs scores >= 0, got {float(scores[mask].min())!r}.")
        found = (scores.log().masked_fill(~mask, 0.0).sum(-1) / count.clamp(min=1)).exp()
    else:
        places = torch.arange(scores.size(-1), device=scores.device)
        last = torch.where(mask, places, 0).amax(-1, keepdim=True)
        found = scores.gather(-1, last).squeeze(-1)
    return torch.where(count > 0, found, none)


def _decayed(scores: Tensor, mask: Tensor, outcome: Tensor, count: Tensor) -> Tensor:
    if outcome.shape != count.shape:
        raise ValueError(f"outcome must have shape {tuple(count.shape)}, got {tuple(outcome.shape)}.")
    before = mask.cumsum(-1) - 1
    share = (count.unsqueeze(-1) - before) / count.clamp(min=1).unsqueeze(-1)
    steps = (scores.masked_fill(~mask, 0.0) * share * mask).sum(-1)
    return torch.where(count > 0, (steps + outcome) / count.clamp(min=1), outcome)


def standardized(rewards: Tensor, scale: str = "group") -> Tensor:
    """
    Rewards less the mean of their group, over its standard deviation: TRL's advantages.

    Args:
        rewards (`torch.Tensor`): Shape `(num_groups, group_size)`; NaN = none.
        scale (`str`, *optional*, defaults to `"group"`): `"group"` divides by `std + 1e-4`, `"none"` does not divide.

    Returns:
        `torch.Tensor`: Shape `(num_groups, group_size)`; exactly 0 where all known rewards of a group are equal.

    Raises:
        ValueError: `scale` is unknown.

    Example:
    ```python
    >>> standardized(torch.tensor([[1.0, 0.0, float("nan")]]), scale="none").tolist()
    [[0.5, -0.5, 0.0]]
    ```
    """
    if scale not in ADVANTAGE_SCALES:
        raise ValueError(f"scale must be one of {ADVANTAGE_SCALES}, got {scale!r}.")
    values, known, equal = _parts(rewards)
    count = known.sum(1, keepdim=True)
    centred = (values - values.sum(1, keepdim=True) / count.clamp(min=1)).masked_fill(~known, 0.0)
    if scale == "group":
        spread = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (spread + _EPSILON)
    return _settled(centred, known, equal, rewards)


def duration_weights(seconds: Tensor, known: Tensor | None = None) -> Tensor:
    """
    Weights that undo the bias of asynchronous rollouts towards what is done quickly.

    `w_k = t_k / mean(t)`: where actors start again as soon as they are done, what takes `t` is seen in proportion to
    `1 / t`. The mean of the weights is 1. Synchronous GRPO has no such bias, and gets one by the weights.

    Paper: [Reinforcement Learning for Machine Learning Engineering Agents](https://huggingface.co/papers/2509.01684).

    Args:
        seconds (`torch.Tensor`): Durations >= 0, any shape; NaN = not known, which weighs 1.
        known (`torch.Tensor`, *optional*): Boolean, same shape: those that count. Defaults to what is not NaN.

    Returns:
        `torch.Tensor`: Same shape; 1 where the duration does not count, and everywhere if the mean is 0.

    Raises:
        ValueError: a duration is negative or infinite.

    Example:
    ```python
    >>> duration_weights(torch.tensor([1.0, 1.0, 4.0])).tolist()
    [0.5, 0.5, 2.0]
    ```
    """
    counts = ~torch.isnan(seconds) if known is None else known & ~torch.isnan(seconds)
    wrong = seconds[counts & ((seconds < 0) | seconds.isinf())]
    if wrong.numel():
        raise ValueError(f"durations must be finite and >= 0 seconds, got {float(wrong.flatten()[0])!r}.")
    mean = torch.where(counts, seconds, 0.0).sum() / counts.sum().clamp(min=1)
    if float(mean) == 0.0:
        return torch.ones_like(seconds)
    return torch.where(counts, seconds / mean, torch.ones_like(seconds))
