"""What a generation of GRPO costs: its work from lengths and pass rates, its seconds from the speeds of a device."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .forward_costs import LAYOUTS, ForwardCosts, RowLengths, bucket_count, grouped_order
from .grpo_expected import Lengths, check_pass_rates, dead_share, refills

#: phases of `functional/metrics.py`, and what is outside of them: optimizer, clipping, loader and logging
PHASES = ("gen", "reward", "logp", "train", "update")
#: savings that a plan can switch on, as `exact_savings` of [`EffiGRPOConfig`] names them
SAVINGS = ("trim", "sort", "skip", "pack", "share")
#: phase -> name of a count -> count, of one generation and the updates that train on it
Work = dict[str, dict[str, float]]
#: phase -> name of a count -> seconds for each
Speeds = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class GRPOShape:
    """
    What a run trains on, on one device.

    Args:
        prompts (`int`): Prompts of an update, at least 1.
        group_size (`int`): Completions of a prompt, at least 2.
        micro_batch (`int`): Rows of a micro-batch; must divide `prompts * group_size`.
        prompt_lengths, completion_lengths ([`Lengths`]): In tokens.
        pass_rates (`tuple[tuple[float, float], ...]`): `(rate, share)` of the prompts, as in [`dead_share`].
        num_iterations (`int`, *optional*, defaults to `1`): Updates for each generation.
        beta (`float`, *optional*, defaults to `0.0`): KL coefficient; above 0 the reference model is forwarded.

    Raises:
        ValueError: a number out of range.
    """

    prompts: int
    group_size: int
    micro_batch: int
    prompt_lengths: Lengths
    completion_lengths: Lengths
    pass_rates: tuple[tuple[float, float], ...] = ((0.5, 1.0),)
    num_iterations: int = 1
    beta: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("group_size", 2), ("micro_batch", 1), ("num_iterations", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        if self.rows % self.micro_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide the {self.rows} rows of an update "
                f"({self.prompts} prompts x {self.group_size}). Choose a divisor."
            )
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be a number from 0.")
        check_pass_rates(self.pass_rates)

    @property
    def rows(self) -> int:
        """Completions that an update trains on."""
        return self.prompts * self.group_size

    @property
    def dead(self) -> float:
        """Share of groups without a gradient."""
        return dead_share(self.pass_rates, self.group_size)


@dataclass(frozen=True)
class GRPOChoices:
    """
    What a run switches on.

    Args:
        savings (`tuple[str, ...]`, *optional*): Of `SAVINGS`; `skip` acts only with `beta=0`.
        filter_rounds (`int`, *optional*, defaults to `0`): `difficulty_max_rounds` of `difficulty_range=(0, 1)`; 0 is
            no filter.
        prune_rate (`float`, *optional*, defaults to `0.0`): Share of completions dropped before log-probs and loss, in
            [0, 1), with `prune_allocation=True`: `1 / (1 - prune_rate)` times more prompts are generated.

    Raises:
        ValueError: an unknown saving, or a number out of range.
    """

    savings: tuple[str, ...] = ()
    filter_rounds: int = 0
    prune_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in self.savings:
            if name not in SAVINGS:
                raise ValueError(f"savings={self.savings!r}: {name!r} is not known. Known: {', '.join(SAVINGS)}.")
        if self.filter_rounds < 0:
            raise ValueError(f"filter_rounds={self.filter_rounds!r} must be 0 (off) or more.")
        whole = 1 / (1 - self.prune_rate) if 0 <= self.prune_rate < 1 else math.nan
        if not abs(whole - round(whole) if whole == whole else math.inf) < 1e-3:
            raise ValueError(
                f"prune_rate={self.prune_rate!r} must be 0 or 1 - 1/R for a whole R, such as 0.5 or 0.75."
            )
        if self.prune_rate and self.filter_rounds:
            raise ValueError("filter_rounds and prune_rate are planned one at a time: set one of them to 0.")

    @property
    def oversample(self) -> int:
        """How many times more prompts are generated than trained on by pruning."""
        return round(1 / (1 - self.prune_rate))


@dataclass(frozen=True)
class PlannedWork:
    """
    The expected work of one generation and the updates that train on it.

    Args:
        counts (`Work`): Phase -> count -> how many.
        updates (`int`): Updates of a generation.
        generated_groups (`float`): Groups that are generated.
        live_groups (`float`): Groups with a gradient that are trained on.
    """

    counts: Work
    updates: int
    generated_groups: float
    live_groups: float

    def seconds(self, speeds: Speeds) -> dict[str, float]:
        """Return the seconds of each phase of one update, the mean over the updates of a generation."""
        return {
            phase: sum(count * speeds.get(phase, {}).get(name, 0.0) for name, count in counts.items()) / self.updates
            for phase, counts in self.counts.items()
        }


@dataclass
class _Forwards:
    """
    Sums of forwards: calls, those without padding, tokens, pairs in attention, calls of it, completion tokens, and
    what the search for the best buckets tries.
    """

    forward: float = 0.0
    flat: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    segment: float = 0.0
    completion_token: float = 0.0
    planning: float = 0.0

    def scaled(self, factor: float) -> dict[str, float]:
        return {name: value * factor for name, value in vars(self).items()}


#: what tokens, pairs and calls of attention cost when only they cost
_TOKENS, _PAIRS, _CALLS = ForwardCosts(0.0, 0.0), ForwardCosts(1.0, 0.0), ForwardCosts(0.0, 1.0)


@dataclass(frozen=True)
class _Layouts:
    """The trainer's choice of layouts for the rows of a forward."""

    savings: tuple[str, ...]
    costs: ForwardCosts

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(name for name in LAYOUTS if name in self.savings)

    def chosen(self, rows: Sequence[RowLengths], buckets: int) -> tuple[str, float]:
        """Return the cheapest layout and its price."""
        layouts = self.layouts or ("trim",)
        prices = {layout: self.costs.of(layout, rows, buckets) for layout in layouts}
        best = min(prices, key=lambda layout: prices[layout])
        return best, prices[best]

    def add(self, sums: _Forwards, rows: Sequence[RowLengths], of: int, width: int, max_rows: int | None) -> None:
        """Add the forwards of some of the `of` rows of a batch whose columns, padding included, are `width`."""
        sums.completion_token += sum(row.completion_tokens for row in rows)
        buckets = bucket_count(of, 0, max_rows, trims="trim" in self.savings)
        layout = self.chosen(rows, buckets)[0]
        if "trim" not in self.savings and layout == "trim":
            rows = [RowLengths(None, 0, width)] * len(rows)
        tokens = _TOKENS.of(layout, rows, buckets)
        calls = _CALLS.of(layout, rows, buckets) - tokens
        forwards = calls if layout == "trim" else min(buckets, len(rows)) if max_rows is not None else 1
        sums.token += tokens
        sums.pair += _PAIRS.of(layout, rows, buckets) - tokens
        sums.segment += calls
        sums.forward += forwards
        sums.flat += 0 if layout == "trim" else forwards
        if "trim" in self.savings:  # once for the price beside the others', once for the forward itself
            sums.planning += _planning(of, buckets) * ((len(self.layouts) > 1) + (layout == "trim"))


def _planning(rows: int, buckets: int) -> float:
    """Return how many cuts are tried for the best buckets of some rows."""
    return float(buckets * rows**2)


def planned_work(
    shape: GRPOShape, choices: GRPOChoices, costs: ForwardCosts, draws: int | None = None, seed: int = 0
) -> PlannedWork:
    """
    Return the expected work of a generation.

    Decoding, dead groups and refills are exact expectations; the tokens of forwards with padding, packing and shared
    prompts are means over drawn batches.

    Args:
        shape ([`GRPOShape`]): What is trained on.
        choices ([`GRPOChoices`]): What is on.
        costs ([`~hf_effi.functional.forward_costs.ForwardCosts`]): Of the model and the device.
        draws (`int`, *optional*): Batches that are drawn; by default 3 to 64, fewer of large ones.
        seed (`int`, *optional*, defaults to `0`): Of the draws.

    Example:
    ```python
    >>> shape = GRPOShape(1, 2, 2, Lengths((3,), (1,)), Lengths((5,), (1,)))
    >>> work = planned_work(shape, GRPOChoices(), ForwardCosts(0.0, 0.0))
    >>> work.counts["train"]["token"], work.counts["gen"]["step"], work.live_groups
    (16.0, 5.0, 0.5)

    ```
    """
    alive = 1 - shape.dead
    if choices.filter_rounds:
        plan = refills(shape.prompts, alive, choices.filter_rounds)
        rounds, live = plan.rounds, plan.live
    else:
        rounds = ((shape.prompts * choices.oversample, 1.0),)
        live = shape.prompts * choices.oversample * alive
    # Pruning keeps the largest advantages, and a dead group has none: rows of live groups come first.
    live_of_trained = min(1.0, live / shape.prompts)
    counts: Work = {"gen": _generation(shape, rounds), "reward": {"call": 0.0, "row": 0.0}}
    calls, groups = sum(count for _, count in rounds), sum(size * count for size, count in rounds)
    counts["reward"] = {"call": calls, "row": groups * shape.group_size}
    passes = (shape.num_iterations > 1) + (shape.beta > 0)
    scored, trained, micro_steps = _forwards(shape, choices, costs, live_of_trained, bool(passes), draws, seed)
    counts["logp"] = {"pass": float(passes), **scored.scaled(passes)}
    counts["train"] = {
        "generation": calls,
        "micro_step": shape.num_iterations * micro_steps,
        **trained.scaled(shape.num_iterations),
    }
    counts["update"] = {"update": float(shape.num_iterations), "micro_step": shape.num_iterations * micro_steps}
    return PlannedWork(counts, shape.num_iterations, groups, live)


def _generation(shape: GRPOShape, rounds: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Return the counts of the calls of `generate`: each runs until its longest completion ends."""
    sums: Counter[str] = Counter()
    for groups, count in rounds:
        rows = groups * shape.group_size
        width = shape.prompt_lengths.longest_of(groups)
        steps, square = (shape.completion_lengths.longest_of(rows, power) for power in (1, 2))
        one = {
            "call": 1.0,
            "row": rows,
            "prefill_token": rows * width,
            "step": steps,
            "step_row": steps * rows,
            "step_context": rows * (steps * width + square / 2),
        }
        for name, value in one.items():
            sums[name] += count * value  # type: ignore[assignment]
    return dict(sums)


def _forwards(
    shape: GRPOShape,
    choices: GRPOChoices,
    costs: ForwardCosts,
    live_share: float,
    scores: bool,
    draws: int | None,
    seed: int,
) -> tuple[_Forwards, _Forwards, int]:
    """Return the mean forwards of a scoring pass and of a pass of training, and the micro-steps of the latter."""
    draws = max(3, min(64, 2000 // shape.rows)) if draws is None else draws
    layouts, rng = _Layouts(choices.savings, costs), random.Random(seed)
    scored, trained = _Forwards(), _Forwards()
    skips = "skip" in choices.savings and shape.beta == 0
    for _ in range(draws):
        rows, live = _drawn(shape, live_share, rng)
        width = max(row.prompt_tokens for row in rows) + max(row.completion_tokens for row in rows)
        counted = live if skips else [True] * len(rows)
        if scores:
            layouts.add(scored, _kept(rows, range(len(rows)), counted), len(rows), width, shape.micro_batch)
        if {"sort", "trim", "share"} <= set(choices.savings) and shape.micro_batch < shape.rows:
            # Both orders of all micro-batches are priced, each twice where padding is the cheapest.
            cuts = shape.rows // shape.micro_batch
            trained.planning += 3 * cuts * _planning(shape.micro_batch, bucket_count(shape.micro_batch))
        for cut in _micro_batches(shape, layouts, rows, counted, rng):
            layouts.add(trained, _kept(rows, cut, counted), len(cut), width, None)
    for sums in (scored, trained):
        for name, value in vars(sums).items():
            setattr(sums, name, value / draws)
    return scored, trained, shape.rows // shape.micro_batch


def _kept(rows: Sequence[RowLengths], cut: Sequence[int], counted: Sequence[bool]) -> list[RowLengths]:
    """Return the rows of a batch that are forwarded: where none counts, the shortest one keeps the graph whole."""
    return [rows[i] for i in cut if counted[i]] or [rows[min(cut, key=lambda i: rows[i].tokens)]]


def _drawn(shape: GRPOShape, live_share: float, rng: random.Random) -> tuple[list[RowLengths], list[bool]]:
    """Return the rows of one drawn generation, and which of them have a gradient."""
    rows, live = [], []
    for prompt in range(shape.prompts):
        (before,) = rng.choices(shape.prompt_lengths.values, shape.prompt_lengths.shares)
        after = rng.choices(shape.completion_lengths.values, shape.completion_lengths.shares, k=shape.group_size)
        rows += [RowLengths(prompt, before, tokens) for tokens in after]
        live += [rng.random() < live_share] * shape.group_size
    return rows, live


def _micro_batches(
    shape: GRPOShape, layouts: _Layouts, rows: Sequence[RowLengths], counted: Sequence[bool], rng: random.Random
) -> list[list[int]]:
    """Return the rows of each micro-batch: as they come shuffled, or the cheaper one of the orders of `sort`."""
    size = shape.micro_batch
    order = list(range(len(rows)))
    rng.shuffle(order)
    if "sort" in layouts.savings and size < len(rows):
        order = sorted(range(len(rows)), key=lambda i: (counted[i], rows[i].tokens, i))
        if "share" in layouts.savings:

            def price(rows_in_order: Sequence[int]) -> float:
                cuts = (rows_in_order[i : i + size] for i in range(0, len(rows), size))
                kept = ([rows[i] for i in cut if counted[i]] for cut in cuts)
                return sum(layouts.chosen(part, bucket_count(size))[1] for part in kept if part)

            order = min(order, grouped_order(rows, counted), key=price)
    return [order[i : i + size] for i in range(0, len(order), size)]
