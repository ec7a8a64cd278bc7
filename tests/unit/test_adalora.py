"""What `AdaLoRACallback` refuses, and PEFT's budget at the updates that the callback passes to it."""

from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from hf_effi.callbacks.adalora import AdaLoRACallback, adalora_of, check_gradients, check_plan
from hf_effi.errors import RefusedError


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x))


def adapter_of(**over):
    settings = {"init_r": 3, "target_r": 1, "total_step": 10, "tinit": 2, "tfinal": 3, "deltaT": 2}
    config = AdaLoraConfig(target_modules=["first", "second"], **{**settings, **over})
    return get_peft_model(TwoLayers(), config)


def test_budget_of_each_update():
    """Full for exactly tinit updates, cubic (paper, equation 12), and the target from total_step - tfinal on."""
    schedule = adalora_of(adapter_of()).rankallocator.budget_schedule
    budgets = [schedule(step)[0] for step in range(1, 11)]
    assert budgets[:2] == [6, 6]
    assert budgets[2:6] == [int(4 * (1 - done / 5) ** 3 + 2) for done in (1, 2, 3, 4)]
    assert budgets[6:] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda: TwoLayers(), "no PEFT model"),
        (lambda: get_peft_model(TwoLayers(), LoraConfig(target_modules=["first"])), "of type LoraModel"),
    ],
)
def test_a_model_without_adalora_is_refused(model, found):
    with pytest.raises(RefusedError, match=f"{found}.*AdaLoraConfig"):
        adalora_of(model())


def test_a_frozen_adapter_is_refused():
    with pytest.raises(RefusedError, match="is_trainable=True"):
        adalora_of(adapter_of(inference_mode=True))


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({}, 9, "total_step=10 and the run has 9 updates"),
        ({"init_r": 1}, 10, "init_r=1 must exceed target_r=1"),
        ({"init_r": 1, "target_r": 2}, 10, "must exceed"),
    ],
)
def test_a_plan_that_cannot_be_met_is_refused(settings, steps, message):
    with pytest.raises(ValueError, match=message):
        check_plan(adalora_of(adapter_of(**settings)), steps, set_total_step=False)


def test_set_total_step_writes_the_length_and_checks_the_phases_again():
    adapter = adalora_of(adapter_of())
    check_plan(adapter, 8, set_total_step=True)
    assert adapter.peft_config["default"].total_step == 8
    assert adapter.rankallocator.budget_schedule(5)[0] == 2
    with pytest.raises(ValueError, match="leave none of the 5 updates"):
        check_plan(adapter, 5, set_total_step=True)


def test_an_adapter_that_was_reduced_already_is_refused():
    adapter = adalora_of(adapter_of())
    adapter.resize_modules_by_rank_pattern({"first.lora_E.default": [True, False, True]}, "default")
    with pytest.raises(RefusedError, match="holds 5 ranks and its config starts from 6"):
        check_plan(adapter, 10, set_total_step=False)


def test_a_missing_gradient_is_named():
    adapter = adalora_of(adapter_of())
    with pytest.raises(RefusedError, match="first.lora_A.default has no gradient"):
        check_gradients(adapter)
    adapter(torch.ones(1, 4)).sum().backward()
    check_gradients(adapter)


@pytest.mark.parametrize("engine", [{"deepspeed": "ds.json", "fsdp": []}, {"deepspeed": None, "fsdp": ["full_shard"]}])
def test_sharded_engines_are_refused(engine):
    with pytest.raises(RefusedError, match="DeepSpeed, FSDP and tensor parallelism"):
        AdaLoRACallback().on_train_begin(SimpleNamespace(**engine), None, None, model=adapter_of())


def test_an_overflow_of_fp16_leaves_the_averages_alone():
    """The scaler skips the update; infinite gradients must not enter averages that never forget them."""
    callback, model = AdaLoRACallback(), adapter_of()
    state = SimpleNamespace(max_steps=10, global_step=0, log_history=[], stateful_callbacks={})
    callback.on_train_begin(SimpleNamespace(deepspeed=None, fsdp=[]), state, None, model=model)
    model(torch.ones(1, 4)).sum().mul(float("inf")).backward()
    callback.on_optimizer_step(None, state, None, optimizer=SimpleNamespace(step_was_skipped=True))
    assert model.base_model.rankallocator.exp_avg_ipt == {}
    # From total_step - tfinal on no gradient is read, and the budget is enforced on a skipped update as well.
    state.global_step = 5
    model.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    callback.on_optimizer_step(None, state, None, optimizer=SimpleNamespace(step_was_skipped=False))
    state.global_step = 6
    callback.on_optimizer_step(None, state, None, optimizer=SimpleNamespace(step_was_skipped=True))
    assert sum(callback.ranks().values()) <= 2


def test_a_callback_before_training():
    assert AdaLoRACallback().ranks() == {}
    with pytest.raises(ValueError, match="set_total_step=100 must be True or False"):
        AdaLoRACallback(set_total_step=100)
