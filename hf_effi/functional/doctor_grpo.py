"""What ails a GRPO run: the rules of [`hf_effi.functional.doctor`], and those of rewards, completions and entropy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from . import metrics
from .doctor import TRAIN_RULES
from .findings import Finding, GRPOLimits, Rule, RunFacts, Trace, latest, step_of


def all_truncated(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """Nearly every completion hits the length limit."""
    values = latest(trace, "completions/clipped_ratio", limits.group_logs)
    if not values or min(values) < limits.truncated:
        return None
    effect = "answers are scored unfinished"
    if facts.mask_truncated:
        effect = "mask_truncated_completions leaves next to nothing in the loss"
    return Finding(
        "all_truncated",
        step_of(trace, facts),
        f"{statistics.fmean(values):.0%} of the completions are cut at max_completion_length="
        f"{facts.max_completion_length}, so {effect}",
        "raise max_completion_length, or check that the chat template and the EOS token let the model stop",
    )


def _rewards(trace: Trace, limits: GRPOLimits, count: int) -> tuple[list[float], list[float]]:
    return latest(trace, "reward", count), latest(trace, "reward_std", count)


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
                step_of(trace, facts),
                f"{key} was None or NaN for every completion of the last {count} log entries",
                "`hf-effi check-reward` calls the function on right, wrong and empty answers; it must return a "
                "number, and None only where it does not apply",
            )
    return None


def reward_never_varies(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """The reward is one and the same number for every completion, up to noise."""
    means, spreads = _rewards(trace, limits, limits.constant_logs)
    if not means or not spreads or _vary(means, spreads, limits):
        return None
    return Finding(
        "reward_never_varies",
        step_of(trace, facts),
        f"The reward was {means[-1]:g} for every completion of the last {len(means)} log entries, so nothing is "
        "learned",
        "it may not find the answer in the completion; `hf-effi check-reward` calls it on right, wrong and empty "
        "answers",
    )


def zero_variance(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """Nearly every group has equal rewards, though the reward itself varies."""
    values = latest(trace, "frac_reward_zero_std", limits.group_logs)
    means, spreads = _rewards(trace, limits, limits.group_logs)
    if not values or min(values) < limits.zero_std or not means or not _vary(means, spreads, limits):
        return None
    return Finding(
        "zero_variance",
        step_of(trace, facts),
        f"In {statistics.fmean(values):.0%} of the groups all rewards are equal, so they carry no gradient",
        "choose prompts that the model solves sometimes (difficulty_range of EffiGRPOConfig), raise num_generations "
        "or the temperature, or give partial rewards",
    )


def no_loss_tokens(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """Rewards differ within groups, but not where a token is in the loss. (Only `EffiGRPOTrainer` logs it.)"""
    dead = latest(trace, metrics.FRAC_ZERO_VAR_GROUPS, limits.group_logs)
    equal = latest(trace, "frac_reward_zero_std", limits.group_logs)
    means, _ = _rewards(trace, limits, limits.group_logs)
    if not means or not dead or not equal or min(dead) < limits.zero_std or min(equal) >= limits.zero_std:
        return None
    return Finding(
        "no_loss_tokens",
        step_of(trace, facts),
        f"In {statistics.fmean(dead):.0%} of the groups no completion has both an advantage and a token in the loss, "
        "so they carry no gradient",
        "raise max_completion_length, or turn off mask_truncated_completions",
    )


def entropy_collapse(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """The policy has become nearly deterministic."""
    own = [entry["entropy"] for entry in trace if isinstance(entry.get("entropy"), (int, float))]
    first = [*facts.entropies, *own][:3]
    last = latest(trace, "entropy", limits.entropy_logs)
    if len(first) < 3 or not last or max(last) >= limits.entropy_ratio * statistics.fmean(first):
        return None
    return Finding(
        "entropy_collapse",
        step_of(trace, facts),
        f"The entropy fell from {statistics.fmean(first):.3g} to {last[-1]:.3g} nats per token, so completions of a "
        "prompt become copies",
        "lower the LR, raise epsilon_high or the temperature, or set entropy_coef or beta",
    )


def length_without_reward(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """Completions grow while their reward falls."""
    lengths = latest(trace, "completions/mean_length", limits.trend_logs)
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
        step_of(trace, facts),
        f"Completions grew by {grew:.0%} while the reward fell by {fell:.3g}",
        "use loss_type='dr_grpo' or 'dapo', penalise or mask truncated completions, and read a few completions",
    )


def loss_zero_is_fine(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """A loss of 0 with a gradient: expected on the first pass over a batch without a KL term."""
    losses = latest(trace, "loss", limits.zero_loss_logs)
    norms = latest(trace, "grad_norm", limits.zero_loss_logs)
    if facts.beta != 0 or facts.num_iterations != 1 or not losses or not norms:
        return None
    if max(map(abs, losses)) > limits.zero_loss or min(norms) <= 0:
        return None
    return Finding(
        "loss_zero_is_fine",
        step_of(trace, facts),
        "The loss is 0 and that is fine, because advantages cancel within a group while their gradients do not",
        "watch `reward` instead",
        "note",
    )


def contaminated_evaluation(trace: Trace, facts: RunFacts, limits: GRPOLimits) -> Finding | None:
    """The policy answers the prompts that it is evaluated on as it answers those that it was trained on."""
    found = facts.contamination
    if found is None or min(found.scored, found.reference) < limits.contamination_prompts:
        return None
    if not (found.auc >= limits.contamination_auc and found.low > 0.5):
        return None
    return Finding(
        "contaminated_evaluation",
        step_of(trace, facts),
        f"The policy answers the prompts of the probe along one path, as if it had been trained on them: {found}",
        "look for these prompts, also reworded, in train_dataset and in the data of the model before; the probe ranks "
        "and proves nothing, so run it on the model before training too, and report a set that nobody trained on",
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
    contaminated_evaluation,
)
