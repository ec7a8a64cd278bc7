"""
What ails a training run: pure rules from a trace of logs to findings of one sentence.

A trace is the list of log entries so far, each a dict with `step` and what was logged. [`RunFacts`] holds what logs do not
say. A rule reads both and returns a [`Finding`] or `None`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .lr_watch import group_at_zero, group_that_ignores, of_group, overlong_factor

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
        max_completion_length, beta, num_iterations: Of GRPO.
        mask_truncated: Whether GRPO takes completions that were cut off out of the loss.
        entropies: Up to three, logged first by the run that this one resumes.
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
    max_completion_length: int = 0
    beta: float = 0.0
    num_iterations: int = 1
    mask_truncated: bool = False
    entropies: tuple[float, ...] = ()


Rule = Callable[[Trace, RunFacts, Any], Finding | None]


def _latest(trace: Trace, key: str, count: int) -> list[float]:
    """Return the last `count` finite values of `key`, or an empty list where there are fewer."""
    values = [
        float(entry[key]) for entry in trace if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
    ]
    return values[-count:] if len(values) >= count else []


def _step(trace: Trace, facts: RunFacts) -> int:
    return trace[-1]["step"] if trace else facts.start_step


# --- any trainer ---------------------------------------------------------------------------------------------------


def not_finite(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """NaN or infinity in loss, gradient norm or reward. (The Trainer's `logging_nan_inf_filter` hides it in the loss.)"""
    for key in ("loss", "grad_norm", "reward"):
        value = trace[-1].get(key) if trace else None
        if isinstance(value, float) and not math.isfinite(value):
            return Finding(
                "not_finite",
                _step(trace, facts),
                f"{key} is {value}",
                "stop and go back to the last good checkpoint, lower the LR or lengthen the warm-up, use bf16 or fp32 "
                "instead of fp16, and look for empty or fully masked rows",
            )
    return None


def no_gradient(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The gradient is exactly 0, and no group of equal rewards explains it."""
    norms = [entry.get("grad_norm") for entry in trace[-limits.no_gradient_logs :]]
    if len(norms) < limits.no_gradient_logs or any(norm != 0 for norm in norms):
        return None
    if any("reward" in entry for entry in trace):
        # Of GRPO: dead groups and missing rewards have rules of their own.
        equal = _latest(trace, "frac_reward_zero_std", 1)
        dead = limits.zero_std if isinstance(limits, GRPOLimits) else GRPOLimits.zero_std
        if trace[-1].get("reward", 0.0) is None or not equal or equal[0] >= dead:
            return None
    masked = all(entry.get("labels_in_loss") == 0 for entry in trace[-limits.no_gradient_logs :])
    why = "every label is -100" if masked else "nothing of the loss reaches the weights"
    return Finding(
        "no_gradient",
        _step(trace, facts),
        f"The gradient has been exactly 0 for {len(norms)} log entries: {why}",
        "print the labels of one batch: a completion cut off by max_length, a chat template without generation marks or a "
        "wrong response template leaves nothing to learn",
    )


def lr_zero(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The LR of a parameter group is 0 long before the end."""
    group = group_at_zero(trace, limits.lr_zero_logs)
    if group is None or _step(trace, facts) > 0.9 * facts.max_steps:
        return None
    return Finding(
        "lr_zero",
        _step(trace, facts),
        f"The LR{of_group(group)} has been 0 for {limits.lr_zero_logs} log entries, so the weights do not move",
        "check learning_rate, and that the scheduler is stepped and its warm-up and length are counted in updates"
        + ("; what shall stay as it is gets requires_grad_(False)" if group else ""),
    )


def scheduler_rate(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The scheduler does not step once per update."""
    done = _step(trace, facts) - facts.start_step
    if facts.scheduler_start is None or not trace or done < limits.scheduler_updates:
        return None
    steps = trace[-1].get("scheduler_steps")
    if steps is None or limits.scheduler_low < (steps - facts.scheduler_start) / done < limits.scheduler_high:
        return None
    steps -= facts.scheduler_start
    effect = "the LR stays where it was" if steps < done else f"the LR runs {steps / done:.3g} times ahead of its plan"
    return Finding(
        "scheduler_rate",
        _step(trace, facts),
        f"The LR scheduler made {steps} steps in {done} updates, so {effect}",
        "pass the Trainer a plain scheduler, not one prepared by accelerate (which steps once per process), and step it "
        "nowhere else",
    )


def lr_not_applied(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The scheduler moves an LR that the optimizer does not use."""
    found = group_that_ignores(trace, limits.lr_frozen_logs)
    if found is None:
        return None
    group, planned, used = found
    return Finding(
        "lr_not_applied",
        _step(trace, facts),
        f"The scheduler says LR {planned:.3g}{of_group(group)} and the optimizer keeps {used:.3g}",
        "build the scheduler on the optimizer that is passed with it: optimizers=(optimizer, scheduler)",
    )


def plan_too_long(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The schedule ends only after a multiple of the run."""
    if facts.plan is None:
        return None
    found = overlong_factor(facts.plan, facts.max_steps, facts.factors, limits.plan_end)
    if found is None:
        return None
    return Finding(
        "plan_too_long",
        _step(trace, facts),
        f"The LR schedule was made for {found[0]} times the {facts.max_steps} updates of this run, which ends at "
        f"{found[1]:.0%} of the highest LR",
        "count its steps in updates: divide by gradient_accumulation_steps and by the number of processes",
    )


def always_clipped(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """Every logged gradient norm exceeds the clipping threshold."""
    norms = _latest(trace, "grad_norm", limits.clip_logs)
    if facts.max_grad_norm <= 0 or not norms or min(norms) <= facts.max_grad_norm:
        return None
    return Finding(
        "always_clipped",
        _step(trace, facts),
        f"The gradient was clipped in each of the last {len(norms)} log entries (median norm "
        f"{statistics.median(norms):.3g}, max_grad_norm {facts.max_grad_norm:g})",
        "raise max_grad_norm above the usual norm so that it only cuts spikes, or lower the LR if the loss is not falling",
    )


def optimizer_restarted(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """A resumed run whose optimizer does not remember the updates before."""
    if facts.start_step == 0 or facts.optimizer_steps is None:
        return None
    if facts.optimizer_steps >= limits.resume_fraction * (facts.start_step - facts.start_probes):
        return None
    schedule = " and the LR schedule starts over" if facts.scheduler_start == 0 else ""
    return Finding(
        "optimizer_restarted",
        facts.start_step,
        f"The run resumed at step {facts.start_step} with an optimizer that has counted {facts.optimizer_steps} updates"
        + schedule,
        "resume from a checkpoint with optimizer.pt and scheduler.pt (save_only_model=False), or expect a jump in the loss",
    )


def mostly_padding(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """Most forwarded tokens are padding."""
    values = _latest(trace, "pad_ratio", limits.padding_logs)
    if not values or min(values) <= limits.padding:
        return None
    return Finding(
        "mostly_padding",
        _step(trace, facts),
        f"{values[-1]:.0%} of the forwarded tokens are padding",
        "group rows by length (train_sampling_strategy='group_by_length'), pack them, or for GRPO use EffiGRPOTrainer, "
        "which trims and sorts",
    )


def documents_mix(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """Packed documents see each other."""
    if facts.leak is None or facts.leak <= limits.leak:
        return None
    return Finding(
        "documents_mix",
        _step(trace, facts),
        f"Packed documents see each other: changing one changed the logits of the next by {facts.leak:.1%}",
        "use a FlashAttention implementation, drop the attention mask beside the position_ids, or turn packing off",
    )


# --- GRPO ----------------------------------------------------------------------------------------------------------


def all_truncated(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """Nearly every completion hits the length limit."""
    values = _latest(trace, "completions/clipped_ratio", limits.group_logs)
    if not values or min(values) < limits.truncated:
        return None
    effect = "answers are scored unfinished"
    if facts.mask_truncated:
        effect = "mask_truncated_completions leaves next to nothing in the loss"
    return Finding(
        "all_truncated",
        _step(trace, facts),
        f"{statistics.fmean(values):.0%} of the completions are cut at max_completion_length="
        f"{facts.max_completion_length}, so {effect}",
        "raise max_completion_length, or check that the chat template and the EOS token let the model stop",
    )


def _rewards(trace: Trace, limits: GRPOLimits, count: int) -> tuple[list[float], list[float]]:
    return _latest(trace, "reward", count), _latest(trace, "reward_std", count)


def _vary(values: Sequence[float], spreads: Sequence[float], limits: GRPOLimits) -> bool:
    """Whether rewards differ by more than noise: between entries, or within one by their logged deviation."""
    equal = max(limits.constant_spread, 1e-6 * max(map(abs, values)))
    return max(values) - min(values) > equal or (bool(spreads) and max(spreads) > equal)


def reward_missing(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """No completion gets a number, in all or from one function. (TRL logs None where all are None or NaN.)"""
    means = [key for key in (trace[-1] if trace else {}) if key.startswith("rewards/") and key.endswith("/mean")]
    for key, count in [("reward", limits.constant_logs), *((key, limits.trend_logs) for key in means)]:
        values = [entry[key] for entry in trace if key in entry][-count:]
        if len(values) == count and all(value is None or value != value for value in values):
            return Finding(
                "reward_missing",
                _step(trace, facts),
                f"{key} was None or NaN for every completion of the last {count} log entries",
                "call the reward function on a completion: it must return a number, None only where it does not apply",
            )
    return None


def reward_never_varies(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """The reward is one and the same number for every completion, up to noise."""
    means, spreads = _rewards(trace, limits, limits.constant_logs)
    if not means or not spreads or _vary(means, spreads, limits):
        return None
    return Finding(
        "reward_never_varies",
        _step(trace, facts),
        f"The reward was {means[-1]:g} for every completion of the last {len(means)} log entries, so nothing is learned",
        "call the reward function on one right and one wrong answer: it may not find the answer in the completion",
    )


def zero_variance(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """Nearly every group has equal rewards, though the reward itself varies."""
    values = _latest(trace, "frac_reward_zero_std", limits.group_logs)
    means, spreads = _rewards(trace, limits, limits.group_logs)
    if not values or min(values) < limits.zero_std or not means or not _vary(means, spreads, limits):
        return None
    return Finding(
        "zero_variance",
        _step(trace, facts),
        f"In {statistics.fmean(values):.0%} of the groups all rewards are equal, so they carry no gradient",
        "choose prompts that the model solves sometimes (difficulty_range of EffiGRPOConfig), raise num_generations or "
        "the temperature, or give partial rewards",
    )


def no_loss_tokens(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """Rewards differ within groups, but not where a token is in the loss. (Only `EffiGRPOTrainer` logs it.)"""
    dead = _latest(trace, "effi/frac_zero_var_groups", limits.group_logs)
    equal = _latest(trace, "frac_reward_zero_std", limits.group_logs)
    means, _ = _rewards(trace, limits, limits.group_logs)
    if not means or not dead or not equal or min(dead) < limits.zero_std or min(equal) >= limits.zero_std:
        return None
    return Finding(
        "no_loss_tokens",
        _step(trace, facts),
        f"In {statistics.fmean(dead):.0%} of the groups no completion has both an advantage and a token in the loss, so "
        "they carry no gradient",
        "raise max_completion_length, or turn off mask_truncated_completions",
    )


def entropy_collapse(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """The policy has become nearly deterministic."""
    own = [entry["entropy"] for entry in trace if isinstance(entry.get("entropy"), (int, float))]
    first = [*facts.entropies, *own][:3]
    last = _latest(trace, "entropy", limits.entropy_logs)
    if len(first) < 3 or not last or max(last) >= limits.entropy_ratio * statistics.fmean(first):
        return None
    return Finding(
        "entropy_collapse",
        _step(trace, facts),
        f"The entropy fell from {statistics.fmean(first):.3g} to {last[-1]:.3g} nats per token, so completions of a prompt "
        "become copies",
        "lower the LR, raise epsilon_high or the temperature, or set entropy_coef or beta",
    )


def length_without_reward(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """Completions grow while their reward falls."""
    lengths = _latest(trace, "completions/mean_length", limits.trend_logs)
    means, spreads = _rewards(trace, limits, limits.trend_logs)
    if not lengths or not means or not spreads:
        return None
    third = max(limits.trend_logs // 3, 1)

    def change(values: Sequence[float]) -> float:
        return statistics.fmean(values[-third:]) - statistics.fmean(values[:third])

    grew = change(lengths) / max(statistics.fmean(lengths[:third]), 1e-9)
    fell = -change(means)
    if grew < limits.length_growth or fell <= limits.reward_fall * statistics.fmean(spreads):
        return None
    return Finding(
        "length_without_reward",
        _step(trace, facts),
        f"Completions grew by {grew:.0%} while the reward fell by {fell:.3g}",
        "use loss_type='dr_grpo' or 'dapo', penalise or mask truncated completions, and read a few completions",
    )


def loss_zero_is_fine(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """A loss of 0 with a gradient: expected on the first pass over a batch without a KL term."""
    losses = _latest(trace, "loss", limits.zero_loss_logs)
    norms = _latest(trace, "grad_norm", limits.zero_loss_logs)
    if facts.beta != 0 or facts.num_iterations != 1 or not losses or not norms:
        return None
    if max(map(abs, losses)) > limits.zero_loss or min(norms) <= 0:
        return None
    return Finding(
        "loss_zero_is_fine",
        _step(trace, facts),
        "The loss is 0 and that is fine, because advantages cancel within a group while their gradients do not",
        "watch `reward` instead",
        "note",
    )


TRAIN_RULES: tuple[Rule, ...] = (
    not_finite,
    optimizer_restarted,
    no_gradient,
    lr_zero,
    scheduler_rate,
    lr_not_applied,
    plan_too_long,
    always_clipped,
    mostly_padding,
    documents_mix,
)
GRPO_RULES: tuple[Rule, ...] = (
    *TRAIN_RULES,
    all_truncated,
    reward_missing,
    reward_never_varies,
    zero_variance,
    no_loss_tokens,
    entropy_collapse,
    length_without_reward,
    loss_zero_is_fine,
)


def diagnose(
    trace: Trace, facts: RunFacts, limits: TrainLimits, rules: Sequence[Rule], said: Sequence[str] = ()
) -> list[Finding]:
    """
    Return what the rules find in the trace so far.

    Args:
        trace (`Sequence[Mapping]`): Log entries in order, each with `step`.
        limits ([`TrainLimits`]): [`GRPOLimits`] for the rules of GRPO.
        said (`Sequence[str]`): Names of rules that have spoken; they stay silent.

    Example:
    ```python
    >>> trace = [{"step": step, "learning_rate": 0.0} for step in (10, 20, 30)]
    >>> [finding.rule for finding in diagnose(trace, RunFacts(max_steps=100), TrainLimits(), TRAIN_RULES)]
    ['lr_zero']
    ```
    """
    found = (rule(trace, facts, limits) for rule in rules if rule.__name__ not in said)
    return [finding for finding in found if finding is not None]
