"""Every rule fires on a trace that is broken on purpose, and none on a healthy one."""

import dataclasses
import math
import re

import pytest

from hf_effi.functional.data import ContaminationReport
from hf_effi.functional.doctor import TRAIN_RULES, diagnose
from hf_effi.functional.doctor_grpo import GRPO_RULES
from hf_effi.functional.findings import Finding, GRPOLimits, RunFacts, TrainLimits
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
        "data_wait_fraction": 0.02,
        "data_wait_seconds": 0.01,
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


def layers(*sizes):
    return {f"effi/causes/gradient/layer/{number}": constant(size) for number, size in enumerate(sizes)}


STRAGGLER = {"effi/straggler/ratio": 1.3, "effi/straggler/rank": 1.0, "effi/straggler/persistence": 0.9}

BROKEN = {
    "not_finite": ({"grad_norm": constant(math.nan)}, {}),
    "no_gradient": ({"loss": constant(0.0), "grad_norm": constant(0.0)}, {}),
    "lr_zero": ({"learning_rate": constant(0.0)}, {}),
    "scheduler_rate": ({"scheduler_steps": lambda s: 2 * s}, {}),
    "lr_not_applied": ({"optimizer_lr": constant(1e-3)}, {}),
    "plan_too_long": ({}, {"plan": lambda step: max(1 - step / 800, 0.0)}),
    "always_clipped": ({"grad_norm": constant(3.0)}, {}),
    "optimizer_restarted": ({}, {"start_step": 50, "scheduler_start": 50, "optimizer_steps": 0}),
    "mostly_padding": ({"pad_ratio": constant(0.71)}, {}),
    "loader_waits": ({"data_wait_fraction": constant(0.6), "data_wait_seconds": constant(0.3)}, {}),
    "documents_mix": ({}, {"leak": 0.2}),
    "data_repeats": ({}, {"passes": 4.1, "weight_decay": 0.1}),
    "layer_gradient_high": (layers(20.0, 1.0, 1.0), {}),
    "layer_dead": (layers(1.0, 1e-6, 1.0), {}),
    "last_layer_dominates": (layers(0.1, 0.1, 1.0), {}),
    "quantization_will_hurt": ({"effi/causes/kurtosis/layer/0": constant(30.0)}, {}),
    "effective_lr_collapse": ({"effi/causes/effective_lr_factor": constant(0.01)}, {}),
    "straggler": ({name: constant(value) for name, value in STRAGGLER.items()}, {}),
    "lr_over_sharpness": ({"effi/sharpness/rho": constant(1.5)}, {}),
    "all_truncated": ({"completions/clipped_ratio": constant(1.0)}, {}),
    "reward_missing": ({"reward": constant(None), "reward_std": constant(None)}, {}),
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
    "contaminated_evaluation": ({}, {"contamination": ContaminationReport(0.8, 0.7, 0.9, 50, 50)}),
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
        ("loader_waits", {"data_wait_fraction": constant(0.6), "data_wait_seconds": constant(1e-3)}, {}),  # tiny steps
        ("loader_waits", {"data_wait_fraction": lambda s: 0.6 if s % 5 else 0.1}, {}),  # now and then
        ("documents_mix", {}, {"leak": 1e-6}),
        ("reward_never_varies", {"reward": constant(0.5), "reward_std": constant(0.5)}, {}),
        ("zero_variance", {"frac_reward_zero_std": lambda s: 1.0 if s % 4 else 0.5}, {}),
        ("length_without_reward", {"completions/mean_length": lambda s: 100.0 + 5 * s}, {}),
        ("reward_missing", {"reward": lambda s: None if s % 2 else 0.3, "reward_std": constant(0.4)}, {}),
        ("reward_missing", {"rewards/rare/mean": lambda s: 1.0 if s % 15 == 0 else None}, {}),
        ("no_gradient", {"grad_norm": lambda s: 0.0 if s % 3 else 0.5}, {}),
        ("no_gradient", {"grad_norm": constant(0.0), "frac_reward_zero_std": constant(1.0)}, {}),  # dead groups
        ("no_gradient", {"grad_norm": constant(0.0), "reward": constant(None)}, {}),
        ("lr_not_applied", {"optimizer_lr": constant(5e-4), "learning_rate": constant(1e-3)}, {}),  # a multiplier
        ("entropy_collapse", {"entropy": constant(0.05)}, {}),  # a model that starts like that
        ("loss_zero_is_fine", {"loss": constant(0.0)}, {"beta": 0.04}),
        ("lr_over_sharpness", {"effi/sharpness/rho": constant(1.0)}, {}),  # at the edge, and not above
        ("lr_over_sharpness", {"effi/sharpness/rho": lambda s: 9.0 if s in (20, 40) else 0.5}, {}),  # twice in 60
        ("lr_over_sharpness", {"effi/sharpness/rho": constant(9.0), "learning_rate": lambda s: 1e-5 * s}, {}),
        ("lr_over_sharpness", {"effi/sharpness/rho": constant(9.0), "learning_rate": constant(None)}, {}),
        ("loss_zero_is_fine", {"loss": constant(0.0), "grad_norm": constant(0.0)}, {}),
    ],
)
def test_what_only_looks_alike_is_left_alone(rule, over, facts):
    facts = dataclasses.replace(FACTS, **facts)
    assert rule not in found(trace(start=facts.start_step, **over), facts)


def test_the_doctor_of_any_trainer_reads_rewards_too():
    def rules(**over):
        return set(found(trace(grad_norm=constant(0.0), **over), limits=TrainLimits(), rules=TRAIN_RULES))

    assert rules() == {"no_gradient"}
    assert rules(frac_reward_zero_std=constant(1.0)) == set()


def test_a_group_of_weights_at_lr_zero_is_named():
    groups = {"scheduler_lrs": constant({0: 1e-3, 1: 0.0}), "optimizer_lrs": constant({0: 1e-3, 1: 0.0})}
    finding = found(trace(**groups))["lr_zero"]
    assert "The LR of parameter group 1 has been 0" in finding.problem and "requires_grad_" in finding.advice


def staircase(step):
    return 1e-3 * 0.1 ** ((step - 1) // 20)


def test_a_staircase_that_the_optimizer_does_not_follow():
    over = {"learning_rate": staircase, "scheduler_lrs": lambda s: {0: staircase(s), 1: staircase(s)}}
    followed = {"optimizer_lr": staircase, "optimizer_lrs": lambda s: {0: staircase(s), 1: staircase(s)}}
    second = {"optimizer_lr": staircase, "optimizer_lrs": lambda s: {0: staircase(s), 1: 1e-3}}
    assert found(trace(60, **over, **followed)) == {}
    assert found(trace(21, **over, **second)) == {}, "the step has just been made"
    finding = found(trace(22, **over, **second))["lr_not_applied"]
    assert "says LR 0.0001 of parameter group 1 and the optimizer keeps 0.001" in finding.problem


def floor_at(length, floor):
    return lambda step: max(1 - step / length, floor)


def cosine_at(length, floor):
    return lambda step: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / length))


@pytest.mark.parametrize(
    ("plan", "factor"),
    [
        (floor_at(800, 0.1), 4),
        (lambda step: 0.6 + 0.4 * max(1 - step / 800, 0), 4),
        (cosine_at(400, 0.1), 2),  # and rises again behind its end, like those of transformers and torch
        (cosine_at(1600, 0.2), 8),
        (lambda step: max(1 - step / 800, 0) ** 3, 4),
        (lambda step: 1.0 if step < 720 else 0.0, 4),  # a plateau, and a short decay at its end
        (lambda step: 0.1 ** sum(step >= mark for mark in (250, 500, 750)), 4),  # three stairs
        (lambda step: min(step / 50, 1.0) * max(1 - step / 800, 0.05), 4),  # with a warm-up from 0
        (floor_at(200, 0.3), None),
        (cosine_at(200, 0.1), None),
        (floor_at(210, 0.0), None),  # by less than `plan_end`
        (lambda step: 1 / math.sqrt(step + 1), None),
        (lambda step: 0.99**step, None),
        (lambda step: 0.995**step, None),
        (lambda step: 0.999**step, None),
        (lambda step: 0.5 ** (step // 60), None),  # stairs without an end
        (lambda step: abs(1 - step % 80 / 40), None),  # a triangular wave, high at 200, low at 400 and 800
        (lambda step: 0.5 * (1 + math.cos(math.pi * (step % 150) / 150)), None),  # warm restarts
        (lambda step: min(step / 1000, 1.0), None),  # a warm-up longer than the run is no end
    ],
)
def test_plans_of_all_shapes(plan, factor):
    findings = found([], dataclasses.replace(FACTS, plan=plan))
    assert set(findings) == (set() if factor is None else {"plan_too_long"})
    if factor is not None:
        assert f"made for {factor} times the 200 updates" in findings["plan_too_long"].problem


@pytest.mark.parametrize("noise", [1e-8, 1e-5])
@pytest.mark.parametrize("level", [0.0, -3.0, 1000.0])
def test_noise_on_a_dead_reward_is_no_reward(noise, level):
    # Three thousandths of single precision are noise on a thousand.
    scale = max(1.0, abs(level) / 20)
    over = {
        "reward": lambda s: level + noise * scale * math.sin(s),
        "reward_std": lambda s: noise * scale,
        "frac_reward_zero_std": constant(0.0),
    }
    assert set(found(trace(**over))) == {"reward_never_varies"}
    live = {**over, "reward_std": constant(0.01)}
    assert found(trace(**live)) == {}


def test_missing_rewards_of_one_function_are_named():
    finding = found(trace(30, **{"rewards/format/mean": constant(None), "rewards/right/mean": constant(0.5)}))
    assert "rewards/format/mean was None or NaN" in finding["reward_missing"].problem
    nan = found(trace(**{"reward": constant(math.nan), "reward_std": constant(math.nan)}))
    assert set(nan) == {"not_finite", "reward_missing"}


def test_every_label_masked_is_told_apart():
    over = {"loss": constant(0.0), "grad_norm": constant(0.0)}
    assert "every label is -100" in found(trace(labels_in_loss=constant(0.0), **over))["no_gradient"].problem
    assert "nothing of the loss" in found(trace(labels_in_loss=constant(0.5), **over))["no_gradient"].problem
    late = {**over, "frac_reward_zero_std": lambda s: 1.0 if s < 50 else 0.4}
    assert "no_gradient" in found(trace(60, **late)) and "no_gradient" not in found(trace(49, **late))


def test_entropy_that_had_collapsed_before_a_resume():
    facts = dataclasses.replace(FACTS, start_step=50, optimizer_steps=50, scheduler_start=50)
    after = trace(10, start=50, entropy=constant(0.02))
    assert found(after, facts) == {}
    finding = found(after, dataclasses.replace(facts, entropies=(1.2, 1.3, 1.1)))["entropy_collapse"]
    assert "from 1.2 to 0.02" in finding.problem
    assert found(after, dataclasses.replace(facts, entropies=(0.03, 0.02, 0.02))) == {}


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
    """With several updates per generation, TRL logs rewards only with some of them; a value may be None."""
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
