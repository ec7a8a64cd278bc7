"""What can be said of a GRPO run before it runs: longest completions, groups without a gradient, refills. Exact."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rollouts import next_refill_size

#: less likely outcomes of a refill are left out
_RARE = 1e-12


@dataclass(frozen=True)
class Lengths:
    """
    A histogram of token counts.

    Args:
        values (`tuple[int, ...]`): Lengths in tokens, at least 1, rising.
        shares (`tuple[float, ...]`): How often each occurs, above 0; made to add up to 1.

    Raises:
        ValueError: no values, values that do not rise from at least 1, shares that are not above 0.

    Example:
    ```python
    >>> lengths = Lengths((10, 30), (0.5, 0.5))
    >>> lengths.mean(), lengths.longest_of(2), lengths.longest_of(2, power=2)
    (20.0, 25.0, 700.0)

    ```
    """

    values: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.values[:-1], self.values[1:], strict=True))
        if not self.values or not rising or self.values[0] < 1:
            raise ValueError(f"lengths={self.values!r} must be whole numbers of at least 1 that rise.")
        if len(self.shares) != len(self.values) or not all(0 < share < math.inf for share in self.shares):
            raise ValueError(
                f"shares={self.shares!r} must be one number above 0 for each of {len(self.values)} lengths."
            )
        total = sum(self.shares)
        object.__setattr__(self, "shares", tuple(share / total for share in self.shares))

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Lengths:
        """Return the histogram of `(length, share)` in any order; equal lengths, once rounded, are added up."""
        found: Counter[int] = Counter()
        for value, share in pairs:
            found[round(value)] += share  # type: ignore[assignment]
        return cls(tuple(sorted(found)), tuple(found[value] for value in sorted(found)))

    @classmethod
    def of_quantiles(cls, points: Sequence[tuple[float, float]], steps: int = 64) -> Lengths:
        """
        Return the lengths between quantiles, on straight lines.

        Args:
            points (`Sequence[tuple[float, float]]`): `(percent, length)`, both rising, at least two; lengths below the
                first and above the last percent are those of the ends.
            steps (`int`, *optional*, defaults to `64`): Lengths of the histogram.

        Raises:
            ValueError: fewer than two points, or points that do not rise within 0 to 100 percent.

        Example:
        ```python
        >>> Lengths.of_quantiles([(0, 10), (100, 20)], steps=2).values
        (12, 18)

        ```
        """
        percents, values = [p for p, _ in points], [v for _, v in points]
        if len(points) < 2 or sorted(set(percents)) != percents or sorted(values) != values:
            raise ValueError(f"quantiles={list(points)!r} must be two or more (percent, length), both rising.")
        if percents[0] < 0 or percents[-1] > 100:
            raise ValueError(f"quantiles={list(points)!r}: percents must lie in [0, 100].")
        return cls.of((_between(percents, values, 100 * (step + 0.5) / steps), 1.0) for step in range(steps))

    def mean(self) -> float:
        """Return the mean length."""
        return sum(value * share for value, share in zip(self.values, self.shares, strict=True))

    def longest_of(self, rows: int, power: int = 1) -> float:
        """
        Return the expected `power`-th power of the longest of `rows` independent lengths, exactly.

        `E[max^k] = sum_v v^k (F(v)^n - F(v-)^n)`: a batch generates until its longest completion ends.

        Args:
            rows (`int`): From 1.
            power (`int`, *optional*, defaults to `1`): `k`.
        """
        total = below = 0.0
        for value, share in zip(self.values, self.shares, strict=True):
            upto = below + share
            total += value**power * (min(upto, 1.0) ** rows - below**rows)
            below = upto
        return total


def _between(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """Return the value on the straight line between the two places around `at`; beyond the ends, that of the end."""
    if at <= places[0]:
        return values[0]
    for left, right, low, high in zip(places[:-1], places[1:], values[:-1], values[1:], strict=True):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return values[-1]


def dead_share(pass_rates: Sequence[tuple[float, float]], group_size: int) -> float:
    """
    Return the expected share of groups without a gradient under rewards of 0 and 1.

    `sum_p w_p (p^G + (1 - p)^G)`: all `G` completions of a prompt are right, or all are wrong. Exact for independent
    completions.

    Args:
        pass_rates (`Sequence[tuple[float, float]]`): `(pass rate of a prompt, share of the prompts)`: rates in [0, 1],
            shares above 0, which are made to add up to 1.
        group_size (`int`): `G`, at least 1.

    Raises:
        ValueError: no rates, a rate outside [0, 1], a share that is not above 0, or a group of less than 1.

    Example:
    ```python
    >>> dead_share([(0.5, 1.0)], 4), dead_share([(0.0, 1.0), (0.5, 1.0)], 2)
    (0.125, 0.75)

    ```
    """
    check_pass_rates(pass_rates)
    if group_size < 1:
        raise ValueError(f"group_size={group_size!r} must be at least 1.")
    total = sum(share for _, share in pass_rates)
    return sum(share * (rate**group_size + (1 - rate) ** group_size) for rate, share in pass_rates) / total


def check_pass_rates(pass_rates: Sequence[tuple[float, float]]) -> None:
    """Raise `ValueError` unless there are rates in [0, 1] with shares above 0."""
    if not pass_rates:
        raise ValueError("pass_rates=[] is empty: give at least one (rate, share), such as (0.5, 1).")
    for rate, share in pass_rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"pass rate {rate!r} must lie in [0, 1].")
        if not 0 < share < math.inf:
            raise ValueError(f"share {share!r} of pass rate {rate!r} must be a number above 0.")


@dataclass(frozen=True)
class Refills:
    """
    What the group filter generates, expected.

    Args:
        rounds (`tuple[tuple[int, float], ...]`): Groups of a round, and how many such rounds a generation has.
        live (`float`): Groups with a gradient among those that are trained on.
        filled (`float`): How likely all of them are.
    """

    rounds: tuple[tuple[int, float], ...]
    live: float
    filled: float

    @property
    def groups(self) -> float:
        """Groups that are generated."""
        return sum(size * count for size, count in self.rounds)


def refills(prompts: int, live_share: float, max_rounds: int) -> Refills:
    """
    Return what the filter `difficulty_range=(0, 1)` generates until `prompts` groups have a gradient.

    The rule is the trainer's: the first round has `prompts` groups, each further one
    [`~hf_effi.functional.rollouts.next_refill_size`], at most `max_rounds` rounds; groups without a gradient fill what
    is missing then. Exact for independent groups.

    Args:
        prompts (`int`): Groups that a generation trains on, at least 1.
        live_share (`float`): Share of groups with a gradient, in [0, 1].
        max_rounds (`int`): At least 1; 1 never refills.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> found = refills(2, 0.5, 2)
    >>> round(found.groups, 9), round(found.live, 9), round(found.filled, 9)
    (3.5, 1.625, 0.6875)

    ```
    """
    if prompts < 1 or max_rounds < 1 or not 0 <= live_share <= 1:
        raise ValueError(
            f"prompts={prompts!r} and max_rounds={max_rounds!r} must be at least 1, and "
            f"live_share={live_share!r} in [0, 1]."
        )
    rounds: Counter[int] = Counter()
    states = {(0, 0): 1.0}  # generated, live -> probability
    live = filled = 0.0
    for number in range(max_rounds):
        after: dict[tuple[int, int], float] = {}
        for (generated, kept), likely in states.items():
            size = next_refill_size(prompts - kept, kept, generated, cap=prompts) if number else prompts
            rounds[size] += likely  # type: ignore[assignment]
            for more, chance in enumerate(_binomial(size, live_share)):
                if likely * chance > _RARE:
                    state = (generated + size, kept + more)
                    after[state] = after.get(state, 0.0) + likely * chance
        states = {}
        for (generated, kept), likely in after.items():
            if kept >= prompts or number == max_rounds - 1:
                live += likely * min(kept, prompts)
                filled += likely * (kept >= prompts)
            else:
                states[generated, kept] = likely
    return Refills(tuple(sorted(rounds.items())), live, filled)


def _binomial(count: int, rate: float) -> list[float]:
    """Return the probabilities of 0 to `count` successes."""
    if rate in (0.0, 1.0):
        return [float(k == count * rate) for k in range(count + 1)]
    logs = (math.log(rate), math.log1p(-rate))
    whole = math.lgamma(count + 1)
    return [
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * logs[0] + (count - k) * logs[1])
        for k in range(count + 1)
    ]
