"""
What rules for a training run read and return: a trace of logs, facts, limits, and findings of one sentence.

A trace is the list of log entries so far, each a dict with `step` and what was logged. [`RunFacts`] holds what logs do
not say. A rule reads both and returns a [`Finding`] or `None`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .advice import MOST_PASSES, WEIGHT_DECAY_GRID

if TYPE_CHECKING:
    from .data import ContaminationReport

Trace = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """
    One thing that is wrong (or looks wrong and is not), said once.

    Args:
        rule (`str`): Name of the rule.
        step (`int`): Finished updates when it was found.
        problem, advice (`str`): What is wrong, and what to try.
        severity (`str`): `"problem"`, or `"note"` for what needs no action.

    Example:
    ```python
    >>> print(Finding("lr_zero", 30, "The LR is 0", "set learning_rate"))
    step 30: The LR is 0: set learning_rate.
    ```
    """

    rule: str
    step: int
    problem: str
    advice: str
    severity: Literal["problem", "note"] = "problem"

    def __str__(self) -> str:
        return f"step {self.step}: {self.problem}: {self.advice}."


@dataclass(frozen=True)
class TrainLimits:
    """
    When a rule for any trainer speaks. Counts are in log entries (`logging_steps` updates each) unless said otherwise.

    Args:
        lr_zero_logs: Successive entries with an LR of exactly 0, before the last tenth of the run.
        no_gradient_logs: Successive entries with a gradient of exactly 0.
        scheduler_updates: Updates before the scheduler's steps are counted against them.
        scheduler_low, scheduler_high: Scheduler steps per update below and above which the schedule is off.
        lr_frozen_logs: Entries over which the scheduler's LR moves and the optimizer's does not.
        plan_end: Share of its peak by which a schedule may be above its own end when the run ends.
        clip_logs: Successive entries with a gradient norm above `max_grad_norm`.
        resume_fraction: Least share of the finished updates that a resumed optimizer must have counted.
        padding: Share of padding among the forwarded tokens.
        padding_logs: Successive entries above it.
        leak: Relative change of a packed document's logits when only its neighbour changes.
        waiting: Share of the time in which updates wait for their batches.
        waiting_seconds: Seconds for which each of them waits.
        waiting_logs: Successive entries above both.
        passes: Times that a run goes over its training rows before they count as repeated.
        passes_decay: Weight decay that is strong enough for repeated rows.
        cause_probes: Successive readings of `CausesCallback` in which a cause must be seen.
        layer_gradient: Gradient of one layer over the median of all layers, above which it is too large.
        dead_layer: Gradient of one layer over the median of all layers, below which it learns nothing.
        last_layer: Share of the squared gradient of all layers that the last one may have.
        kurtosis: Mean excess kurtosis of a layer's hidden states that 4 bits do not hold well.
        massive_tokens: Share of tokens with a massive activation that 4 bits do not hold well.
        effective_lr: What a gradient step is worth, as a share of what it was at the start, below which growing
            weights have taken the learning rate away; the norm has then grown by one over its root.
        straggler: Time of the slowest process over the mean of all.
        straggler_share: Share of the updates of a report in which it must be the slowest one.
        straggler_logs: Successive reports that name the same process.
        sharpness: LR over what the curvature of the loss stands, above which updates overshoot.
        sharpness_probes: Probes after warm-up in which it must be above.
    """

    lr_zero_logs: int = 3
    no_gradient_logs: int = 3
    scheduler_updates: int = 4
    scheduler_low: float = 0.5
    scheduler_high: float = 1.5
    lr_frozen_logs: int = 5
    plan_end: float = 0.05
    clip_logs: int = 20
    resume_fraction: float = 0.5
    padding: float = 0.6
    padding_logs: int = 3
    leak: float = 1e-3
    waiting: float = 0.3
    waiting_seconds: float = 0.02
    waiting_logs: int = 5
    passes: float = MOST_PASSES
    passes_decay: float = WEIGHT_DECAY_GRID[0]
    cause_probes: int = 2
    layer_gradient: float = 10.0
    dead_layer: float = 1e-3
    last_layer: float = 0.9
    kurtosis: float = 20.0
    massive_tokens: float = 1e-3
    effective_lr: float = 0.04
    straggler: float = 1.15
    straggler_share: float = 0.5
    straggler_logs: int = 3
    sharpness: float = 1.0
    sharpness_probes: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
            if wrong or (isinstance(field.default, int) and not isinstance(value, int)):
                kind = "a whole number of at least 1" if isinstance(field.default, int) else "a number above 0"
                raise ValueError(f"{field.name}={value!r} must be {kind}; the default is {field.default}.")


@dataclass(frozen=True)
class GRPOLimits(TrainLimits):
    """
    When a rule for GRPO speaks; see [`TrainLimits`] for the others.

    Args:
        truncated: Share of completions that end at `max_completion_length`.
        zero_std: Share of groups whose rewards are all equal.
        group_logs: Successive entries above either.
        constant_logs: Entries over which the mean reward is one and the same number, or no number at all.
        constant_spread: Standard deviation of rewards that count as equal; TRL adds 1e-4 to it before it divides.
        entropy_ratio: Entropy as a share of what it was in the first three entries of the whole run.
        entropy_logs: Successive entries below it.
        trend_logs: Entries over which trends of length and reward are taken, first third against last.
        length_growth: Relative growth of the mean length.
        reward_fall: Fall of the mean reward, as a share of its standard deviation within a step.
        zero_loss: Size of a loss that a progress bar shows as 0.0000.
        zero_loss_logs: Successive entries below it.
        contamination_auc: AUC of the prompts of a probe against its reference, where its interval is above 0.5 too.
        contamination_prompts: Fewest prompts with a score on each side of the probe.
    """

    truncated: float = 0.95
    zero_std: float = 0.95
    group_logs: int = 5
    constant_logs: int = 5
    constant_spread: float = 1e-4
    entropy_ratio: float = 0.1
    entropy_logs: int = 3
    trend_logs: int = 21
    length_growth: float = 0.2
    reward_fall: float = 0.25
    zero_loss: float = 5e-5
    zero_loss_logs: int = 3
    contamination_auc: float = 0.6
    contamination_prompts: int = 8


@dataclass(frozen=True)
class RunFacts:
    """
    What the logs do not say.

    Args:
        max_steps: Updates of the whole run.
        start_step: Finished updates at the beginning of this `train()`; above 0 after a resume.
        start_probes: How many of them a search has tried and undone, in the optimizer's memory too.
        max_grad_norm: Where gradients are clipped; 0 is off.
        scheduler_start: The scheduler's own count at the beginning; `None` if it has none.
        optimizer_steps: Updates that the optimizer had counted at the beginning; `None` if it counts none.
        plan: Finished updates -> share of the base LR; `None` if the scheduler cannot say. The first parameter group.
        factors: Whole numbers by which a plan is often too long: gradient accumulation, processes, both.
        leak: Measured relative change of a packed document when its neighbour changes; `None` if not packed.
        passes: Times that the whole run goes over its training rows; `None` if their number is not known, or where the
            trainer generates what it trains on.
        weight_decay: The largest of the optimizer's groups; `None` if they have none.
        trained_share: Share of the model's weights that are trained.
        max_completion_length, beta, num_iterations: Of GRPO.
        mask_truncated: Whether GRPO takes completions that were cut off out of the loss.
        entropies: Up to three, logged first by the run that this one resumes.
        contamination: What the probe of a doctor found after training; `None` without one.
    """

    max_steps: int
    start_step: int = 0
    start_probes: int = 0
    max_grad_norm: float = 0.0
    scheduler_start: int | None = None
    optimizer_steps: int | None = None
    plan: Callable[[int], float] | None = None
    factors: tuple[int, ...] = ()
    leak: float | None = None
    passes: float | None = None
    weight_decay: float | None = None
    trained_share: float = 1.0
    max_completion_length: int = 0
    beta: float = 0.0
    num_iterations: int = 1
    mask_truncated: bool = False
    entropies: tuple[float, ...] = ()
    contamination: ContaminationReport | None = None


Rule = Callable[[Trace, RunFacts, Any], Finding | None]


def latest(trace: Trace, key: str, count: int) -> list[float]:
    """Return the last `count` finite values of `key`, or an empty list where there are fewer."""
    values = [
        float(entry[key]) for entry in trace if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
    ]
    return values[-count:] if len(values) >= count else []


def step_of(trace: Trace, facts: RunFacts) -> int:
    return trace[-1]["step"] if trace else facts.start_step
