"""What ails a training run: pure rules from a trace of logs to findings; what they read and return: `findings.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .advice import WEIGHT_DECAY_GRID
from .doctor_causes import CAUSE_RULES
from .doctor_loader import loader_waits
from .doctor_sharpness import SHARPNESS_RULES
from .findings import Finding, GRPOLimits, Rule, RunFacts, Trace, TrainLimits, latest, step_of
from .lr_watch import group_at_zero, group_that_ignores, of_group, overlong_factor

# --- any trainer ---------------------------------------------------------------------------------------------------


def not_finite(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """
    NaN or infinity in loss, gradient norm or reward. (The Trainer's `logging_nan_inf_filter` hides it in the loss.)
    """
    for key in ("loss", "grad_norm", "reward"):
        value = trace[-1].get(key) if trace else None
        if isinstance(value, float) and not math.isfinite(value):
            return Finding(
                "not_finite",
                step_of(trace, facts),
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
        equal = latest(trace, "frac_reward_zero_std", 1)
        dead = limits.zero_std if isinstance(limits, GRPOLimits) else GRPOLimits.zero_std
        if trace[-1].get("reward", 0.0) is None or not equal or equal[0] >= dead:
            return None
    masked = all(entry.get("labels_in_loss") == 0 for entry in trace[-limits.no_gradient_logs :])
    why = "every label is -100" if masked else "nothing of the loss reaches the weights"
    return Finding(
        "no_gradient",
        step_of(trace, facts),
        f"The gradient has been exactly 0 for {len(norms)} log entries: {why}",
        "print the labels of one batch: a completion cut off by max_length, a chat template without generation marks "
        "or a wrong response template leaves nothing to learn",
    )


def lr_zero(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The LR of a parameter group is 0 long before the end."""
    group = group_at_zero(trace, limits.lr_zero_logs)
    if group is None or step_of(trace, facts) > 0.9 * facts.max_steps:
        return None
    return Finding(
        "lr_zero",
        step_of(trace, facts),
        f"The LR{of_group(group)} has been 0 for {limits.lr_zero_logs} log entries, so the weights do not move",
        "check learning_rate, and that the scheduler is stepped and its warm-up and length are counted in updates"
        + ("; what shall stay as it is gets requires_grad_(False)" if group else ""),
    )


def scheduler_rate(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The scheduler does not step once per update."""
    done = step_of(trace, facts) - facts.start_step
    if facts.scheduler_start is None or not trace or done < limits.scheduler_updates:
        return None
    steps = trace[-1].get("scheduler_steps")
    if steps is None or limits.scheduler_low < (steps - facts.scheduler_start) / done < limits.scheduler_high:
        return None
    steps -= facts.scheduler_start
    effect = "the LR stays where it was" if steps < done else f"the LR runs {steps / done:.3g} times ahead of its plan"
    return Finding(
        "scheduler_rate",
        step_of(trace, facts),
        f"The LR scheduler made {steps} steps in {done} updates, so {effect}",
        "pass the Trainer a plain scheduler, not one prepared by accelerate (which steps once per process), and step "
        "it nowhere else",
    )


def lr_not_applied(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """The scheduler moves an LR that the optimizer does not use."""
    found = group_that_ignores(trace, limits.lr_frozen_logs)
    if found is None:
        return None
    group, planned, used = found
    return Finding(
        "lr_not_applied",
        step_of(trace, facts),
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
        step_of(trace, facts),
        f"The LR schedule was made for {found[0]} times the {facts.max_steps} updates of this run, which ends at "
        f"{found[1]:.0%} of the highest LR",
        "count its steps in updates: divide by gradient_accumulation_steps and by the number of processes",
    )


def always_clipped(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """Every logged gradient norm exceeds the clipping threshold."""
    norms = latest(trace, "grad_norm", limits.clip_logs)
    if facts.max_grad_norm <= 0 or not norms or min(norms) <= facts.max_grad_norm:
        return None
    return Finding(
        "always_clipped",
        step_of(trace, facts),
        f"The gradient was clipped in each of the last {len(norms)} log entries (median norm "
        f"{statistics.median(norms):.3g}, max_grad_norm {facts.max_grad_norm:g})",
        "raise max_grad_norm above the usual norm so that it only cuts spikes, or lower the LR if the loss is not "
        "falling",
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
        f"The run resumed at step {facts.start_step} with an optimizer that has counted {facts.optimizer_steps} "
        "updates" + schedule,
        "resume from a checkpoint with optimizer.pt and scheduler.pt (save_only_model=False), or expect a jump in the "
        "loss",
    )


def mostly_padding(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """Most forwarded tokens are padding."""
    values = latest(trace, "pad_ratio", limits.padding_logs)
    if not values or min(values) <= limits.padding:
        return None
    return Finding(
        "mostly_padding",
        step_of(trace, facts),
        f"{values[-1]:.0%} of the forwarded tokens are padding",
        "group rows by length (train_sampling_strategy='group_by_length'), pack them, or for GRPO use "
        "EffiGRPOTrainer, which trims and sorts",
    )


def documents_mix(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """Packed documents see each other."""
    if facts.leak is None or facts.leak <= limits.leak:
        return None
    return Finding(
        "documents_mix",
        step_of(trace, facts),
        f"Packed documents see each other: changing one changed the logits of the next by {facts.leak:.1%}",
        "use a FlashAttention implementation, drop the attention mask beside the position_ids, or turn packing off",
    )


def data_repeats(trace: Trace, facts: RunFacts, limits: TrainLimits) -> Finding | None:
    """
    Most weights are trained many times on the same rows at the weight decay of a single pass.

    Source: Pre-training under infinite compute (2025), about pre-training; adapters and frozen models are left out.
    """
    if facts.passes is None or facts.passes <= limits.passes or facts.trained_share < 0.5:
        return None
    if facts.weight_decay is None or facts.weight_decay >= limits.passes_decay:
        return None
    grid = ", ".join(f"{value:g}" for value in WEIGHT_DECAY_GRID)
    return Finding(
        "data_repeats",
        step_of(trace, facts),
        f"The run goes {facts.passes:.3g} times over its rows with a weight decay of {facts.weight_decay:g}",
        f"compare weight decays {grid} on held-out rows (in pre-training the best was 30 times the usual 0.1), or "
        "make fewer passes",
    )


# --- GRPO ----------------------------------------------------------------------------------------------------------


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
    loader_waits,
    documents_mix,
    data_repeats,
    *CAUSE_RULES,
    *SHARPNESS_RULES,
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
