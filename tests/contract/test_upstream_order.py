"""In which order upstream calls what we override, makes, loads and saves."""

from __future__ import annotations

import inspect

import torch

from tests.contract._seams import EVENTS, GRPO, TRAINER
from tests.contract._upstream import calls_in_order, resolve


def test_log_probs_come_before_rewards_in_stock():
    """Why rows are chosen after `super()` and their old log-probs are deferred."""
    calls = calls_in_order(f"{GRPO}._generate_and_score_completions")
    order = [calls.index(n) for n in ("_generate", "_get_per_token_logps_and_entropies", "_calculate_rewards")]
    assert order == sorted(order), f"the order of {GRPO}._generate_and_score_completions changed: {order}"


def test_scheduler_is_made_before_the_checkpoint_is_loaded():
    calls = calls_in_order(f"{TRAINER}._prepare_for_training")
    assert calls.index("create_scheduler") < calls.index("_load_optimizer_and_scheduler")


def test_a_checkpoint_is_pushed_after_the_random_states_and_before_on_save():
    """Why resume files are written with the random states, and those of callbacks when a push begins."""
    saved = calls_in_order(f"{TRAINER}._save_checkpoint")
    order = [saved.index(name) for name in ("save_model", "_save_rng_state", "_push_from_checkpoint")]
    assert order == sorted(order)
    calls = calls_in_order(f"{TRAINER}._maybe_log_save_evaluate")
    assert calls.index("_save_checkpoint") < calls.index("callback_handler.on_save")
    source = inspect.getsource(resolve(f"{TRAINER}._save_checkpoint"))
    assert source.index("save_to_json") < source.index("_push_from_checkpoint")
    source = inspect.getsource(resolve(f"{TRAINER}._push_from_checkpoint"))
    assert source.index("callback_handler.on_push_begin") < source.index("upload_folder")
    source = inspect.getsource(resolve(f"{EVENTS}:CallbackHandler.on_save"))
    assert "control.should_save = False" in source, (
        "`should_save` tells a push inside a save from one of a finished model"
    )


def test_a_lambda_scheduler_restores_these_and_keeps_slots_and_functions_out_of_its_state():
    from hf_effi.trainers.mixins.schedule import FollowedLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = FollowedLR(optimizer)
    assert set(scheduler.state_dict()) >= {"base_lrs", "last_epoch", "_step_count", "_last_lr", "lr_lambdas"}
    assert scheduler.state_dict()["lr_lambdas"] == [None] and "earlier" not in scheduler.state_dict()
    assert optimizer.param_groups[0]["initial_lr"] == 1.0, "from which the next scheduler takes its base LR"


def test_deepspeed_wraps_a_scheduler_as_this_attribute():
    from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    inner = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    wrapper = DeepSpeedSchedulerWrapper(inner, optimizer)
    wrapper.step()
    assert wrapper.scheduler is inner and inner.last_epoch == 0 and wrapper.get_last_lr() == [1.0]
