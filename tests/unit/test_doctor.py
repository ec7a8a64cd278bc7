"""Every rule fires on a trace that is broken on purpose, and none on a healthy one."""

import dataclasses
import math
import re

import pytest

from hf_effi.functional.doctor import (
    GRPO_RULES,
    TRAIN_RULES,
    Finding,
    GRPOLimits,
    RunFacts,
    TrainLimits,
    diagnose,
)
from tests.contract._sources import ROOT


def entry(step, **over):
    """A log entry of a run in good health."""
    return {
        "step": step,
        "loss": 0.02 * (-1) ** step,
        "grad_norm": 0.4 if step % 3 else 1.4,
        "learning_rate": 1e-3 * (1 - step / 200),
        "scheduler_steps": step,
        "optimizer_lr": 1e-3 * (1 - step / 200),
        "pad_ratio": 0.3,
        "reward": 0.3 + 0.002 * step,
        "reward_std": 0.4,
        "frac_reward_zero_std": 0.4,
        "entropy": 1.2 - 0.003 * step,
        "completions/mean_length": 100.0 + step,
        "completions/clipped_ratio": 0.2,
        **over,
    }


FACTS = RunFacts(
    max_steps=200,
    max_grad_norm=1.0,
    scheduler_start=0,
    optimizer_steps=0,
    plan=lambda step: max(1 - step / 200, 0.0),
    factors=(2, 4, 8),
    max_completion_length=256,
)


def trace(steps=60, start=0, **over):
    """`over` maps a key to a function of the step."""
    return [entry(s, **{key: f(s) for key, f in over.items()}) for s in range(start + 1, start + steps + 1)]


def found(entries, facts=FACTS, limits=None, rules=GRPO_RULES):
    return {finding.rule: finding for finding in diagnose(entries, facts, limits or GRPOLimits(), rules)}


def constant(value):
    return lambda step: value


BROKEN = {
    "not_finite": ({"grad_norm": constant(math.nan)}, {}),
    "lr_zero": ({"learning_rate": constant(0.0)}, {}),
    "scheduler_rate": ({"scheduler_steps": lambda s: 2 * s}, {}),
    "lr_not_applied": ({"optimizer_lr": constant(1e-3)}, {}),
    "plan_too_long": ({}, {"plan": lambda step: max(1 - step / 800, 0.0)}),
    "always_clipped": ({"grad_norm": constant(3.0)}, {}),
    "optimizer_restarted": ({}, {"start_step": 50, "scheduler_start": 50, "optimizer_steps": 0}),
    "mostly_padding": ({"pad_ratio": constant(0.71)}, {}),
    "documents_mix": ({}, {"leak": 0.2}),
    "all_truncated": ({"completions/clipped_ratio": constant(1.0)}, {}),
    "reward_never_varies": (
        {"reward": constant(0.0), "reward_std": constant(0.0), "frac_reward_zero_std": constant(1.0)},
        {},
    ),
    "zero_variance": ({"frac_reward_zero_std": constant(1.0)}, {}),
    "no_loss_tokens": ({"effi/frac_zero_var_groups": constant(1.0)}, {}),
    "entropy_collapse": ({"entropy": lambda s: 1.2 * 0.9**s}, {}),
    "length_without_reward": (
        {"completions/mean_length": lambda s: 100.0 + 5 * s, "reward": lambda s: 1 - 0.01 * s},
        {},
    ),
    "loss_zero_is_fine": ({"loss": constant(1e-8)}, {}),
}


def test_every_rule_has_a_broken_trace():
    assert set(BROKEN) == {rule.__name__ for rule in GRPO_RULES}
    assert set(TRAIN_RULES) <= set(GRPO_RULES)


@pytest.mark.parametrize("rule", sorted(BROKEN))
def test_a_rule_fires_alone_on_its_own_trace(rule):
    over, facts = BROKEN[rule]
    facts = dataclasses.replace(FACTS, **facts)
    findings = found(trace(start=facts.start_step, **over), facts)
    assert set(findings) == {rule}
    finding = findings[rule]
    assert str(finding).endswith(".") and "\n" not in str(finding)


def test_a_healthy_trace_has_no_finding():
    assert found(trace(200)) == {}
    assert found([]) == {}
    assert found(trace(1)) == {}


def test_cut_completions_are_unfinished_answers_or_no_longer_in_the_loss():
    entries = trace(**{"completions/clipped_ratio": constant(1.0)})
    assert "answers are scored unfinished" in found(entries)["all_truncated"].problem
    masked = dataclasses.replace(FACTS, mask_truncated=True)
    assert "mask_truncated_completions leaves next to nothing" in found(entries, masked)["all_truncated"].problem


def test_what_has_been_said_is_not_said_again():
    entries = trace(pad_ratio=constant(0.9))
    assert diagnose(entries, FACTS, GRPOLimits(), GRPO_RULES, said=["mostly_padding"]) == []


@pytest.mark.parametrize(
    ("rule", "over", "facts"),
    [
        ("lr_zero", {"learning_rate": lambda s: 0.0 if s == 1 else 1e-3}, {}),  # the first update of a warm-up
        ("scheduler_rate", {"scheduler_steps": lambda s: s - 1}, {}),  # one update skipped by the loss scaler
        ("scheduler_rate", {"scheduler_steps": constant(None)}, {}),  # driven by a metric
        ("lr_not_applied", {"optimizer_lr": constant(1e-3), "learning_rate": constant(1e-3)}, {}),  # a constant LR
        ("plan_too_long", {}, {"plan": constant(1.0)}),  # a constant LR ends nowhere
        ("always_clipped", {"grad_norm": constant(3.0)}, {"max_grad_norm": 0.0}),  # clipping is off
        ("optimizer_restarted", {}, {"start_step": 50, "scheduler_start": 50, "optimizer_steps": 49}),
        ("optimizer_restarted", {}, {"start_step": 50, "scheduler_start": 50, "optimizer_steps": None}),  # SGD
        ("documents_mix", {}, {"leak": 1e-6}),
        ("reward_never_varies", {"reward": constant(0.5), "reward_std": constant(0.5)}, {}),
        ("zero_variance", {"frac_reward_zero_std": lambda s: 1.0 if s % 4 else 0.5}, {}),
        ("length_without_reward", {"completions/mean_length": lambda s: 100.0 + 5 * s}, {}),
        ("loss_zero_is_fine", {"loss": constant(0.0)}, {"beta": 0.04}),
        ("loss_zero_is_fine", {"loss": constant(0.0), "grad_norm": constant(0.0)}, {}),
    ],
)
def test_what_only_looks_alike_is_left_alone(rule, over, facts):
    facts = dataclasses.replace(FACTS, **facts)
    assert rule not in found(trace(start=facts.start_step, **over), facts)


def test_lr_zero_at_the_end_of_a_decay_is_the_plan():
    assert found(trace(200, learning_rate=lambda s: 0.0 if s > 185 else 1e-3)) == {}


def test_the_smallest_factor_is_named():
    """A plan of 4 times the run is also over after 8 times; only 4 says why."""
    finding = found([], dataclasses.replace(FACTS, plan=lambda step: max(1 - step / 800, 0.0)))["plan_too_long"]
    assert "4 times the 200 updates" in finding.problem and "75%" in finding.problem


def test_a_restarted_schedule_is_told_with_the_optimizer():
    facts = dataclasses.replace(FACTS, start_step=50, scheduler_start=0)
    assert "the LR schedule starts over" in found([], facts)["optimizer_restarted"].problem


def test_scheduler_that_never_steps():
    finding = found(trace(scheduler_steps=constant(0)))["scheduler_rate"]
    assert "0 steps in 60 updates, so the LR stays" in finding.problem


def test_entries_without_a_key_are_passed_over():
    """With several updates a generation, TRL logs rewards only with some of them; a value may be None."""
    entries = [e if i % 2 else {"step": e["step"], "loss": 0.1, "reward": None} for i, e in enumerate(trace())]
    assert found(entries) == {}


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "3", True, 2.5])
def test_bad_limits_are_named(value):
    with pytest.raises(ValueError, match="clip_logs=.* must be a whole number"):
        TrainLimits(clip_logs=value)


def test_a_limit_moves_its_rule():
    entries = trace(pad_ratio=constant(0.5))
    assert set(found(entries, limits=GRPOLimits(padding=0.4))) == {"mostly_padding"}


def test_the_page_lists_every_rule_with_its_limits():
    page = (ROOT / "docs" / "doctors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(BROKEN)
    for field in dataclasses.fields(GRPOLimits):
        assert f"`{field.name}` {field.default:g}" in page, f"docs/doctors.md does not give {field.name}"


def test_a_finding_is_plain_data():
    finding = Finding("lr_zero", 3, "The LR is 0", "set it")
    assert Finding(**dataclasses.asdict(finding)) == finding
