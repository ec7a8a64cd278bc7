"""Was a prompt trained on? Entropies of two answers to it, compared, and how well they tell two sets apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_count, check_number, seeded

#: fewest tokens of both answers: the cosine of two short curves is close to 1 whatever the model
LEAST_TOKENS = 8


def top_k_entropy(logits: Tensor, top_k: int | None = 50) -> Tensor:
    """
    Return `-sum p log p` in nats over the `top_k` likeliest tokens; `p` is not renormalised.

    Args:
        logits (`torch.Tensor`): Shape `(..., vocabulary)`.
        top_k (`int`, *optional*, defaults to 50): Tokens in the sum; more than there are is all. `None` is the exact
            entropy.

    Returns:
        `torch.Tensor`: float32, shape `(...)`.

    Raises:
        ValueError: `top_k` is no count.

    Example:
    ```python
    >>> logits = torch.tensor([0.5, 0.25, 0.25]).log()
    >>> round(float(top_k_entropy(logits, 1)), 4), round(float(top_k_entropy(logits, None)), 4)
    (0.3466, 1.0397)
    ```
    """
    logps = logits.float().log_softmax(-1)
    if top_k is not None:
        logps = logps.topk(min(check_count("top_k", top_k), logps.size(-1)), dim=-1).values
    return torch.special.entr(logps.exp()).sum(-1)


def entropy_similarity(
    first: Tensor | Sequence[float] | None, second: Tensor | Sequence[float] | None, min_tokens: int = LEAST_TOKENS
) -> float:
    """
    Return how alike the entropies of two answers to one prompt run; high says that the prompt was trained on.

    `cos(H1, H2) * min(n1, n2) / max(n1, n2)`, the shorter one padded with zeros. Self-Critique,
    [2510.09259](https://huggingface.co/papers/2510.09259).

    Args:
        first, second (`torch.Tensor` or `Sequence[float]`, *optional*): Entropy of each token, shape `(n,)`; `None`
            where there is no answer.
        min_tokens (`int`, *optional*, defaults to 8): An answer with fewer tokens says nothing, and gives NaN. With 0
            all count, and an empty one gives 0.

    Returns:
        `float`: In [0, 1]; NaN where nothing can be said: an answer is missing or too short, or all its entropies are
        0, so that there is no direction to compare.

    Raises:
        ValueError: more than one dimension, a negative entropy, or one that is not finite.

    Example:
    ```python
    >>> entropy_similarity([1, 2, 3], [1, 2, 3], min_tokens=0)
    1.0
    >>> round(entropy_similarity([1, 2, 3], [1, 2], min_tokens=0), 4)
    0.3984
    ```
    """
    check_count("min_tokens", min_tokens, 0)
    if first is None or second is None:
        return math.nan
    one, two = _curve("first", first), _curve("second", second)
    shorter, longer = sorted((len(one), len(two)))
    if shorter < min_tokens:
        return math.nan
    if shorter == 0:
        return 0.0
    sizes = float(one.norm() * two.norm())
    if sizes == 0:
        return math.nan
    return min(float(one[:shorter] @ two[:shorter]) / sizes, 1.0) * shorter / longer


def _curve(name: str, values: Tensor | Sequence[float]) -> Tensor:
    curve = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if curve.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(curve.shape)}. Pass one entropy for each token.")
    if not bool(torch.isfinite(curve).all()) or bool((curve < 0).any()):
        raise ValueError(f"{name} must hold finite entropies of at least 0, got {curve.tolist()[:4]}...")
    return curve


def auc(scores: Tensor | Sequence[float], reference: Tensor | Sequence[float]) -> float:
    """
    Return the share of pairs in which a score is above one of the reference; a tie counts as half.

    Args:
        scores, reference (`torch.Tensor` or `Sequence[float]`): Shapes `(n,)` and `(m,)`; NaN are left out.

    Returns:
        `float`: 0.5 where they cannot be told apart; NaN where a side has no number.

    Example:
    ```python
    >>> auc([0.9, 0.8, 0.4], [0.3, 0.8])
    0.75
    ```
    """
    one, two = _known(scores), _known(reference)
    return float(_wins(one, two).mean()) if len(one) and len(two) else math.nan


def _known(scores: Tensor | Sequence[float]) -> Tensor:
    values = torch.as_tensor(scores, dtype=torch.float64).detach().cpu().reshape(-1)
    return values[~torch.isnan(values)]


def _wins(one: Tensor, two: Tensor) -> Tensor:
    difference = one.unsqueeze(1) - two.unsqueeze(0)
    return (difference > 0).double() + 0.5 * (difference == 0).double()


@dataclass(frozen=True)
class ContaminationReport:
    """
    How well the scores of suspected prompts are told from those of a reference.

    Args:
        auc (`float`): Probability that a suspected prompt scores above one of the reference; 0.5 is chance.
        low, high (`float`): Bootstrap interval of it.
        scored, reference (`int`): Prompts with a score on each side.
        unscored (`int`): Prompts of both without one: an answer was too short.

    Example:
    ```python
    >>> print(ContaminationReport(0.7, 0.6, 0.8, 50, 50, 0))
    AUC 0.70 (0.60 to 0.80) of 50 prompts against 50 of the reference
    ```
    """

    auc: float
    low: float
    high: float
    scored: int
    reference: int
    unscored: int = 0

    def __str__(self) -> str:
        return (
            f"AUC {self.auc:.2f} ({self.low:.2f} to {self.high:.2f}) of {self.scored} prompts against "
            f"{self.reference} of the reference"
        )


def contamination_report(
    scores: Tensor | Sequence[float],
    reference: Tensor | Sequence[float],
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> ContaminationReport:
    """
    Return the AUC of scores against those of a reference, with a percentile bootstrap interval over both.

    A score says nothing by itself, as the model and the instruction decide its size: only how prompts rank beside
    prompts that were certainly not trained on, of the same kind and length, does.

    Args:
        scores, reference (`torch.Tensor` or `Sequence[float]`): Of [`entropy_similarity`], shapes `(n,)` and `(m,)`;
            NaN are left out and counted.
        samples (`int`, *optional*, defaults to 1000): Resamples.
        level (`float`, *optional*, defaults to 0.95): Of the interval, in (0, 1).
        seed (`int`, *optional*, defaults to 0): Of the resamples.

    Returns:
        [`ContaminationReport`]: With NaN for AUC and interval where a side has no score.

    Raises:
        ValueError: a setting out of range.

    Example:
    ```python
    >>> print(contamination_report([0.9, 0.8, 0.95, 0.7], [0.1, 0.2, float("nan"), 0.3]))
    AUC 1.00 (1.00 to 1.00) of 4 prompts against 3 of the reference
    ```
    """
    check_count("samples", samples)
    check_number("level", level, 0.0, 1.0, open_low=True, open_high=True)
    one, two = _known(scores), _known(reference)
    unscored = len(scores) + len(reference) - len(one) - len(two)
    if not len(one) or not len(two):
        return ContaminationReport(math.nan, math.nan, math.nan, len(one), len(two), unscored)
    wins, draws = _wins(one, two), seeded(seed)
    found = torch.empty(samples, dtype=torch.float64)
    for place in range(samples):
        rows = torch.randint(len(one), (len(one),), generator=draws)
        columns = torch.randint(len(two), (len(two),), generator=draws)
        found[place] = wins[rows][:, columns].mean()
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = found.quantile(ends).tolist()
    return ContaminationReport(float(wins.mean()), low, high, len(one), len(two), unscored)
