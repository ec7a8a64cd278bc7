"""A doctor sees a scheduler that is stepped twice, never, by batches, or for other weights."""

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)
from transformers import (
    TrainerCallback,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from tests.helpers import (
    compare_runs,
    run_distributed,
    tiny_qwen3,
)
from tests.training._doctor_runs import rules, silent, train, two_groups


class StepsAgain(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        kwargs["lr_scheduler"].step()


class NeverSteps(LambdaLR):
    def step(self, epoch=None):
        if not hasattr(self, "_last_lr"):
            super().step()  # the first one belongs to the constructor


def own_optimizer(scheduler=LambdaLR, updates=8, for_other_weights=False):
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduled = AdamW(tiny_qwen3(num_hidden_layers=1).parameters(), lr=1e-3) if for_other_weights else optimizer
    return model, (optimizer, scheduler(scheduled, lambda step: max(1 - step / updates, 0.0)))


def test_a_scheduler_that_somebody_steps_as_well(tmp_path):
    doctor = silent()
    train(tmp_path, StepsAgain(), doctor)
    assert "scheduler_rate" in rules(doctor)
    assert "8 steps in 4 updates, so the LR runs 2 times ahead" in doctor.findings[0].problem


def test_a_scheduler_that_never_steps(tmp_path):
    model, optimizers = own_optimizer(NeverSteps)
    doctor = silent()
    train(tmp_path, doctor, model=model, optimizers=optimizers)
    assert rules(doctor) == ["scheduler_rate"] and "0 steps in 4 updates" in doctor.findings[0].problem


def test_a_scheduler_of_another_optimizer(tmp_path):
    model, optimizers = own_optimizer(for_other_weights=True)
    doctor = silent()
    with pytest.warns(UserWarning, match="lr_scheduler.step"):  # torch has noticed something, and says it once
        train(tmp_path, doctor, model=model, optimizers=optimizers)
    assert rules(doctor) == ["lr_not_applied"]


def test_a_schedule_counted_in_batches(tmp_path):
    model, optimizers = own_optimizer(updates=8 * 4)
    doctor = silent()
    train(tmp_path, doctor, model=model, optimizers=optimizers, gradient_accumulation_steps=4)
    assert rules(doctor) == ["plan_too_long"] and "4 times the 8 updates" in doctor.findings[0].problem


TORCH_PLANS = {
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-4),
    "linear": lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.1, total_iters=steps),
    "polynomial": lambda optimizer, steps: PolynomialLR(optimizer, total_iters=steps, power=2.0),
    "one cycle": lambda optimizer, steps: OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps + 1),
    "sequential": lambda optimizer, steps: SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.1, 1.0, total_iters=2), CosineAnnealingLR(optimizer, T_max=steps - 2, eta_min=1e-4)],
        milestones=[2],
    ),
    "chained": lambda optimizer, steps: ChainedScheduler(
        [LinearLR(optimizer, 0.5, 1.0, total_iters=2), CosineAnnealingLR(optimizer, T_max=steps)]
    ),
    "stairs": lambda optimizer, steps: MultiStepLR(optimizer, [steps // 2, steps - 2]),
}


def run_of(folder, plan, length, *callbacks):
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    optimizers = (optimizer, TORCH_PLANS[plan](optimizer, length))
    return train(folder, *callbacks, model=model, optimizers=optimizers, gradient_accumulation_steps=4)


@pytest.mark.parametrize("plan", sorted(TORCH_PLANS))
def test_torchs_own_schedules_counted_in_batches(tmp_path, plan):
    """Made for the batches: found. Made for the updates: nothing to find."""
    for length, expected in ((8 * 4, ["plan_too_long"]), (8, [])):
        doctor = silent()
        run_of(tmp_path, plan, length, doctor)
        assert rules(doctor) == expected


def test_a_scheduler_that_was_looked_ahead_goes_on_as_before(tmp_path):
    compare_runs(run_of(tmp_path, "chained", 32), run_of(tmp_path, "chained", 32, silent()))


def test_a_cosine_with_a_floor_counted_in_batches(tmp_path):
    """What transformers builds from `lr_scheduler_type`, for four times the updates."""
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for length, expected in ((8 * 4, ["plan_too_long"]), (8, [])):
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 1, length, min_lr_rate=0.2)
        doctor = silent()
        train(tmp_path, doctor, model=model, optimizers=(optimizer, scheduler), gradient_accumulation_steps=4)
        assert rules(doctor) == expected


def test_a_second_group_of_weights_that_stands_still(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = two_groups(model, 1e-3, 0.0)
    doctor = silent()
    train(tmp_path, doctor, model=model, optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)))
    assert rules(doctor) == ["lr_zero"] and "parameter group 1" in doctor.findings[0].problem
    frozen = tiny_qwen3(num_hidden_layers=1)
    for weight in list(frozen.parameters())[3:]:
        weight.requires_grad_(False)
    optimizer = two_groups(frozen, 1e-3, 0.0)
    doctor = silent()
    train(tmp_path, doctor, model=frozen, optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)))
    assert rules(doctor) == []


def test_a_staircase_of_another_optimizer(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = StepLR(AdamW(tiny_qwen3(num_hidden_layers=1).parameters(), lr=1e-3), step_size=4)
    doctor = silent()
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        train(tmp_path, doctor, model=model, optimizers=(optimizer, scheduler))
    assert rules(doctor) == ["lr_not_applied"] and doctor.findings[0].step == 5
    doctor = silent()
    train(tmp_path, doctor, model=model, optimizers=(optimizer, StepLR(optimizer, step_size=4)))
    assert rules(doctor) == []


def prepared_by_accelerate(folder):
    """What a user of accelerate does: prepare the scheduler, which then steps once per process."""
    from accelerate.scheduler import AcceleratedScheduler

    torch.set_num_threads(1)
    model, (optimizer, scheduler) = own_optimizer()
    doctor = silent()
    wrapped = AcceleratedScheduler(scheduler, [])
    train(folder, doctor, model=model, optimizers=(optimizer, wrapped), ddp_find_unused_parameters=False)
    return [str(finding) for finding in doctor.findings]


def test_accelerates_scheduler_on_two_processes(tmp_path):
    first, second = run_distributed(prepared_by_accelerate, 2, str(tmp_path))
    assert any("8 steps in 4 updates" in sentence for sentence in first)
    assert second == []  # one process speaks
