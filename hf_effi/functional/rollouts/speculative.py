"""
Speculative reuse of rollouts: the completion that a prompt got before is a draft for the one that it gets now.

SPEC-RL (arXiv 2509.23232) keeps the log-prob of each draft token. That is not enough to be exact. Let a rule know of
the previous policy only the probability of the drawn token, and return the distribution of the current policy
whatever the other probabilities were: with three tokens or more, the mass that it moves from a draft token `x` to `y`
must be `prev(x) * pi(y)` for every `x`, so that it draws all tokens anew without regard to the draft. So a few more
numbers are kept: for each position the most probable tokens and their log-probs. Call these tokens `K`. With

    shared(v) = min(prev(v), pi(v)) for v in K, and 0 for all others,

a draft token `x` is accepted with probability `shared(x) / prev(x)`, and a rejected one is drawn anew from the
residual `pi - shared`, normalised. The result has the distribution `pi`, for every `k` and every vocabulary:

    P(v) = prev(v) * shared(v) / prev(v) + (1 - sum(shared)) * (pi(v) - shared(v)) / (1 - sum(shared)) = pi(v).

A draft token outside of `K` is always rejected, which costs acceptance and not exactness. With `k` at least as large
as the support of `prev` (a small vocabulary, or `top_k` sampling) this is speculative sampling as Leviathan et al.
(arXiv 2211.17192) have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import refuse_idle

_STORED_TOKENS = 64


@dataclass(frozen=True)
class SpeculativeReuse:
    """
    Reuse the rollouts of the last pass over the prompts as drafts, for `EffiGRPOTrainer(rollout_reuse=...)`.

    Args:
        lenience (`float`, *optional*, defaults to 0.0): 0 is the strict rule, whose completions have the distribution
            of the current policy. Above 0 a draft token is accepted with probability
            `min(1, exp(lenience) * pi / prev)` (SPEC-RL's `b = -lenience`; its scripts use 0.5) and what follows the
            first rejected one is generated anew. That keeps more and is biased: see [`acceptance`].
        stored_tokens (`int`, *optional*, defaults to 64): Most probable tokens that are kept for each position, at
            least 1, 8 bytes each. Only the strict rule needs them.
        max_bytes (`int`, *optional*, defaults to 2**30): Memory for drafts in each process, and about the size of its
            file in a checkpoint. It is divided by the bytes of a draft of full length, so that no draft is dropped
            because it is long; the oldest are dropped.

    Raises:
        TypeError: a lenience that is no number.
        ValueError: a value out of its range, or `stored_tokens` with a lenience.

    Example:
    ```python
    >>> SpeculativeReuse().capacity(max_length=100)  # drafts of up to 100 tokens in 1 GiB
    20808
    >>> SpeculativeReuse(lenience=0.5).capacity(max_length=100)
    894784
    ```
    """

    lenience: float = 0.0
    stored_tokens: int = _STORED_TOKENS
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if isinstance(self.lenience, bool) or not isinstance(self.lenience, (int, float)):
            raise TypeError(f"lenience must be a number >= 0, got {self.lenience!r}. 0 is exact.")
        if not 0 <= self.lenience < math.inf:
            raise ValueError(f"lenience must be a finite number >= 0, got {self.lenience!r}. 0 is exact.")
        if isinstance(self.stored_tokens, bool) or not isinstance(self.stored_tokens, int) or self.stored_tokens < 1:
            raise ValueError(f"stored_tokens must be an integer >= 1, got {self.stored_tokens!r}, e.g. 64.")
        if isinstance(self.max_bytes, bool) or not isinstance(self.max_bytes, int) or self.max_bytes < 1:
            raise ValueError(f"max_bytes must be an integer >= 1, got {self.max_bytes!r}, e.g. 2**30.")
        refuse_idle("stored_tokens", self.stored_tokens, _STORED_TOKENS, self.lenience == 0, "with lenience=0")

    @property
    def strict(self) -> bool:
        """Whether completions have the distribution of the current policy."""
        return self.lenience == 0

    def draft_bytes(self, max_length: int) -> int:
        """Return the bytes of a draft of `max_length` tokens."""
        return max_length * (4 + 8 * (self.stored_tokens if self.strict else 1))

    def capacity(self, max_length: int) -> int:
        """Return how many drafts of up to `max_length` tokens are kept."""
        return self.max_bytes // self.draft_bytes(max_length)


def keep_top(log_probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """
    Return log-probs and numbers of the most probable tokens of each distribution: `K` of this module.

    Which tokens these are must not depend on the one that is drawn, or the strict rule is not exact.

    Args:
        log_probs (`torch.Tensor`): Normalised, shape `(..., vocabulary)`.
        count (`int`): How many; the whole vocabulary where it is smaller.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: float32 and int32, shape `(..., min(count, vocabulary))`.

    Example:
    ```python
    >>> values, tokens = keep_top(torch.tensor([0.2, 0.5, 0.3]).log(), 2)
    >>> [round(value, 2) for value in values.exp().tolist()], tokens.tolist()
    ([0.5, 0.3], [1, 2])
    ```
    """
    values, tokens = log_probs.float().topk(min(count, log_probs.size(-1)), dim=-1)
    return values, tokens.to(torch.int32)


def acceptance(
    tokens: Tensor, log_probs: Tensor, stored: Tensor, stored_tokens: Tensor, lenience: float = 0.0
) -> Tensor:
    """
    Return the probability with which each draft token is accepted: `min(1, exp(lenience) * pi(x) / prev(x))`.

    It is 0 where nothing is stored for the token. "Accept iff `u < min(1, exp(lenience + delta))`" is SPEC-RL's
    `log u <= delta - b` with `delta = log pi(x) - log prev(x)` and `b = -lenience`.

    A lenience above 0 is biased: with the rest generated anew from `pi`, a token has the probability
    `min(prev(v), exp(lenience) * pi(v)) + (1 - S) * pi(v)`, where `S` is the share that is accepted. Tokens that the
    previous policy preferred come up to `exp(lenience) + 1 - S` times as often as they should, all others
    at least `1 - S` times; as the lenience grows, the old completion is repeated as it was.

    Args:
        tokens (`torch.Tensor`): Draft tokens `x`, int64, shape `(...,)`.
        log_probs (`torch.Tensor`): Of the current policy `pi`, normalised, shape `(..., vocabulary)`.
        stored, stored_tokens (`torch.Tensor`): What is known of the previous policy `prev`, from [`keep_top`], shape
            `(..., k)`. -1 stands for no token.
        lenience (`float`, *optional*, defaults to 0.0): At least 0.

    Returns:
        `torch.Tensor`: float64, shape `(...,)`, in [0, 1].

    Example:
    ```python
    >>> now, before = torch.tensor([0.2, 0.5, 0.3]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    >>> known = keep_top(before, 2)  # tokens 0 and 1
    >>> rows = torch.arange(3), now.expand(3, 3), known[0].expand(3, 2), known[1].expand(3, 2)
    >>> [round(p, 2) for p in acceptance(*rows).tolist()]
    [0.5, 1.0, 0.0]
    >>> [round(p, 2) for p in acceptance(*rows, lenience=0.5).tolist()]
    [0.82, 1.0, 0.0]
    ```
    """
    own = stored_tokens == tokens.unsqueeze(-1)
    previous = stored.double().masked_fill(~own, -math.inf).amax(dim=-1)
    current = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double()
    known = previous > -math.inf
    ratio = (lenience + current - previous.masked_fill(~known, 0.0)).exp().clamp(max=1.0)
    return ratio.masked_fill(~known, 0.0)


def accepted_lengths(accepted: Tensor, lengths: Tensor) -> Tensor:
    """
    Return how many tokens of each draft come before its first rejected one.

    Args:
        accepted (`torch.Tensor`): Boolean, shape `(rows, columns)`.
        lengths (`torch.Tensor`): Tokens of each draft, shape `(rows,)`.

    Returns:
        `torch.Tensor`: int64, shape `(rows,)`, at most `lengths`.

    Example:
    ```python
    >>> accepted = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
    >>> accepted_lengths(accepted, torch.tensor([3, 2, 3])).tolist()
    [1, 2, 0]
    ```
    """
    inside = torch.arange(accepted.size(1), device=accepted.device) < lengths.to(accepted.device).unsqueeze(1)
    return (accepted & inside).long().cumprod(dim=1).sum(dim=1)


def residual(log_probs: Tensor, stored: Tensor, stored_tokens: Tensor) -> Tensor:
    """
    Return the distribution from which a token is drawn in place of a rejected one: `pi - shared`, normalised.

    Where nothing is left but rounding (both policies are the same), it is `pi`.

    Args:
        log_probs, stored, stored_tokens (`torch.Tensor`): As in [`acceptance`].

    Returns:
        `torch.Tensor`: Probabilities, float64, shape `(..., vocabulary)`.

    Example:
    ```python
    >>> now, before = torch.tensor([0.2, 0.5, 0.3]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    >>> [round(p, 2) for p in residual(now, *keep_top(before, 3)).tolist()]
    [0.0, 0.5, 0.5]
    >>> [round(p, 2) for p in residual(now, *keep_top(before, 2)).tolist()]  # token 2 is always rejected
    [0.0, 0.25, 0.75]
    ```
    """
    current = log_probs.double().exp()
    known = stored_tokens >= 0
    places = stored_tokens.long().clamp(min=0)
    shared = torch.minimum(stored.double().exp(), current.gather(-1, places)).masked_fill(~known, 0.0)
    left = current.scatter_add(-1, places, -shared).clamp(min=0.0)
    total = left.sum(dim=-1, keepdim=True)
    nothing = total <= 1e-12
    return torch.where(nothing, current / current.sum(dim=-1, keepdim=True), left / total.masked_fill(nothing, 1.0))


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """
    Draw one token from each distribution with the numbers given: the first whose cumulative probability is above.

    Args:
        probabilities (`torch.Tensor`): Shape `(rows, vocabulary)`.
        uniforms (`torch.Tensor`): In [0, 1), shape `(rows,)`.

    Returns:
        `torch.Tensor`: int64, shape `(rows,)`; never a token of probability 0.

    Raises:
        ValueError: a distribution is not a number.

    Example:
    ```python
    >>> draw(torch.tensor([[0.0, 0.25, 0.75]] * 3), torch.tensor([0.0, 0.2, 0.25])).tolist()
    [1, 1, 2]
    ```
    """
    below = probabilities.double().cumsum(dim=-1)
    total = below[:, -1]
    if not bool((torch.isfinite(total) & (total > 0)).all()):
        raise ValueError("the policy gives probabilities that are not numbers. Its weights or logits are NaN or inf.")
    # Rounding must not reach the total, above which there is no token.
    target = torch.minimum(uniforms.to(below) * total, torch.nextafter(total, torch.zeros_like(total)))
    return (below <= target.unsqueeze(1)).sum(dim=1)
