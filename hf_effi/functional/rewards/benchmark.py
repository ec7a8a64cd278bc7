"""What a reward model is worth: does the right answer win among several, and are equally right ones scored alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..options import is_finite

#: of accuracy on prompts with several right answers, on their references with one, of both margins, and of their size
TIES_WEIGHTS = (0.30, 0.30, 0.20, 0.20, 0.01)


def best_of_credit(scores: Sequence[float], num_right: int = 1) -> float:
    """
    Return 1 where a right answer has the highest score, 0 where a wrong one has, and the share of the right ones among
    those that share it.

    With one right answer a tie of `t` answers is worth `1 / t`, as in RewardBench 2,
    [2506.01937](https://huggingface.co/papers/2506.01937).

    Args:
        scores (`Sequence[float]`): Of the right answers first, then of the wrong ones.
        num_right (`int`, *optional*, defaults to 1): Right answers among them.

    Raises:
        ValueError: no right or no wrong answer, or a score that is not finite.

    Example:
    ```python
    >>> best_of_credit([2.0, 1.0, 0.0, 1.0]), best_of_credit([2.0, 2.0, 0.0, 1.0]), best_of_credit([1.0, 2.0])
    (1.0, 0.5, 0.0)
    ```
    """
    right, _ = _both(scores, num_right)
    best = max(scores)
    return sum(score == best for score in right) / sum(score == best for score in scores)


def _both(scores: Sequence[float], num_right: int) -> tuple[Sequence[float], Sequence[float]]:
    if isinstance(num_right, bool) or not isinstance(num_right, int) or not 1 <= num_right < len(scores):
        raise ValueError(f"num_right={num_right!r} of {len(scores)} scores: give a right and a wrong answer at least.")
    if not all(is_finite(score) for score in scores):
        raise ValueError(f"scores must be finite, got {list(scores)}.")
    return scores[:num_right], scores[num_right:]


@dataclass(frozen=True)
class TiesScore:
    """
    What [`ties_score`] returns.

    Args:
        tied_accuracy (`float`): Share of the prompts with several right answers of which all beat all wrong ones.
        reference_accuracy (`float`): The same of prompts with one right answer.
        margin_preferred (`float`): Share of the prompts on which right and wrong are further apart than right answers.
        margin_preferred_hard (`float`): The same with the smaller gap of prompt and reference.
        margin (`float`): Mean of `tanh(gap / spread - 1)`, in (-1, 1).
        score (`float`): Their weighted sum.
        pairs (`int`): Prompts that have a reference.
    """

    tied_accuracy: float
    reference_accuracy: float
    margin_preferred: float
    margin_preferred_hard: float
    margin: float
    score: float
    pairs: int


def ties_score(
    tied: Mapping[str, tuple[Sequence[float], int]],
    reference: Mapping[str, tuple[Sequence[float], int]],
    weights: Sequence[float] = TIES_WEIGHTS,
) -> TiesScore:
    """
    Return the score of the subset Ties of RewardBench 2: many right answers, none of which should win by much.

    Of a prompt let `gap` be the lowest score of a right answer less the highest of a wrong one, and `spread` the
    highest less the lowest of the right ones. A prompt is right where `gap > 0`. Over the prompts with a reference:
    `gap > spread`, `min(gap, gap of the reference) > spread`, and the mean of `tanh(min(...) / spread - 1)`, of which
    0 / 0 counts as 0. Paper: [2506.01937](https://huggingface.co/papers/2506.01937); the weights are those of its
    code.

    Args:
        tied (`Mapping[str, tuple]`): Prompt -> (scores, right ones first; number of right ones, at least 2).
        reference (`Mapping[str, tuple]`): The same for its form with one right answer.
        weights (`Sequence[float]`, *optional*): Of the five parts.

    Returns:
        [`TiesScore`].

    Raises:
        ValueError: no prompt that has a reference, fewer than two right answers, five weights missing, or a score that
            is not finite.

    Example:
    ```python
    >>> found = ties_score({"1": ([3.0, 2.5, 1.0], 2)}, {"1": ([3.0, 1.0], 1)})
    >>> found.tied_accuracy, found.margin_preferred, round(found.score, 4)
    (1.0, 1.0, 1.0096)
    ```
    """
    if len(weights) != len(TIES_WEIGHTS):
        raise ValueError(f"weights={weights!r} must be {len(TIES_WEIGHTS)} numbers.")
    tied_stats = {name: _gap_and_spread(*found) for name, found in tied.items()}
    references = {name: _gap_and_spread(*found)[0] for name, found in reference.items()}
    if few := [name for name, (_, count) in tied.items() if count < 2]:
        raise ValueError(f"prompt {few[0]!r} has one right answer. Tied prompts have two or more.")
    pairs = [name for name in tied if name in references]
    if not pairs:
        raise ValueError("no prompt with several right answers has a reference of the same name, with one.")
    gaps = [(tied_stats[name][0], min(tied_stats[name][0], references[name]), tied_stats[name][1]) for name in pairs]
    parts = (
        _mean([gap > 0 for gap, _ in tied_stats.values()]),
        _mean([gap > 0 for gap in references.values()]),
        _mean([gap > spread for gap, _, spread in gaps]),
        _mean([hard > spread for _, hard, spread in gaps]),
        _mean([_margin(hard, spread) for _, hard, spread in gaps]),
    )
    score = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return TiesScore(*parts, score=score, pairs=len(pairs))


def _gap_and_spread(scores: Sequence[float], num_right: int) -> tuple[float, float]:
    right, wrong = _both(scores, num_right)
    return min(right) - max(wrong), max(right) - min(right)


def _margin(gap: float, spread: float) -> float:
    if spread == 0:  # the limit
        return 0.0 if gap == 0 else math.copysign(1.0, gap)
    return math.tanh(gap / spread - 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
