"""A doctor of GRPO sees dead rewards, cut completions and collapsed entropy."""

import functools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)
from trl import GRPOTrainer

from hf_effi import EffiGRPOTrainer
from hf_effi.callbacks.doctor import GRPODoctor
from hf_effi.errors import RefusedError
from tests.helpers import (
    TableReward,
    compare_runs,
    grpo_args,
    length_reward,
    run_grpo,
)
from tests.training._doctor_runs import rules, silent, train


def grpo(folder, doctor, trainer=GRPOTrainer, reward=None, **over):
    kwargs = {} if reward is None else {"reward_funcs": reward}
    args = grpo_args(folder, **{"max_steps": 6, "max_grad_norm": 100.0, **over})
    return run_grpo(trainer, args, callbacks=[doctor], **kwargs)


@functools.cache
def never(value):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


@pytest.mark.parametrize("trainer", [GRPOTrainer, EffiGRPOTrainer])
def test_grpo_reward_that_never_varies(tmp_path, trainer):
    doctor = silent(GRPODoctor)
    grpo(tmp_path, doctor, trainer, reward=never(0.0))
    assert rules(doctor) == ["reward_never_varies"]


def missing(value):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


@pytest.mark.parametrize("trainer", [GRPOTrainer, EffiGRPOTrainer])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_grpo_reward_that_is_never_a_number(tmp_path, trainer, value):
    doctor = silent(GRPODoctor)
    trained = grpo(tmp_path, doctor, trainer, reward=missing(value))
    assert trained.state.log_history[0]["reward"] is None
    assert rules(doctor) == ["reward_missing"]


def test_grpo_one_function_that_never_applies(tmp_path):
    doctor = silent(GRPODoctor, trend_logs=5)
    grpo(tmp_path, doctor, reward=[length_reward, missing(None)])
    assert [str(finding) for finding in doctor.findings if finding.rule == "reward_missing"]


def test_grpo_noise_on_a_dead_reward(tmp_path):
    """TRL sees no group of equal rewards, and divides the noise by itself plus 1e-4."""

    def reward(completions, **kwargs):
        return [1e-5 * value for value in length_reward(completions)]

    doctor = silent(GRPODoctor)
    trained = grpo(tmp_path, doctor, reward=reward)
    assert max(entry["frac_reward_zero_std"] for entry in trained.state.log_history[:6]) < 1
    assert "reward_never_varies" in rules(doctor)


def test_grpo_entropy_that_had_collapsed_before_a_resume(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    grpo(tmp_path, silent(GRPODoctor), **save)
    checkpoint = str(tmp_path / "checkpoint-4")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.norm.weight *= 300
    model.save_pretrained(checkpoint)
    doctor = silent(GRPODoctor)
    args = grpo_args(tmp_path, **{"max_grad_norm": 100.0, **save})
    run_grpo(GRPOTrainer, args, callbacks=[doctor], resume_from_checkpoint=checkpoint)
    assert "entropy_collapse" in rules(doctor)


def test_grpo_groups_without_variance(tmp_path):
    doctor = silent(GRPODoctor)
    grpo(tmp_path, doctor, reward=TableReward([[1, 1], [0, 0]]))
    assert rules(doctor) == ["zero_variance"]


def test_grpo_everything_truncated(tmp_path):
    doctor = silent(GRPODoctor)
    grpo(tmp_path, doctor, max_completion_length=4, generation_kwargs={"min_new_tokens": 4})
    assert "all_truncated" in rules(doctor)
    assert "max_completion_length=4" in doctor.findings[rules(doctor).index("all_truncated")].problem


def test_grpo_loss_of_zero_is_fine(tmp_path):
    doctor = silent(GRPODoctor)
    grpo(tmp_path, doctor, loss_type="grpo", reward=length_reward)
    assert rules(doctor) == ["loss_zero_is_fine"] and doctor.findings[0].severity == "note"


def test_grpo_healthy(tmp_path):
    doctor = silent(GRPODoctor)
    watched = grpo(tmp_path, doctor)
    assert doctor.findings == []
    compare_runs(run_grpo(GRPOTrainer, grpo_args(tmp_path, max_steps=6, max_grad_norm=100.0)), watched)


def test_grpo_longer_and_worse(tmp_path):
    """Within a group the longer completion wins; from step to step all rewards fall."""

    def reward(completions, trainer_state, **kwargs):
        return [value - 0.3 * trainer_state.global_step for value in length_reward(completions)]

    doctor = silent(GRPODoctor, trend_logs=9)
    grpo(tmp_path, doctor, reward=reward, max_steps=14, learning_rate=3e-3, max_completion_length=24)
    assert "length_without_reward" in rules(doctor)


def test_grpo_entropy_collapse(tmp_path):
    """A much too high LR on a reward for writing one character."""

    def reward(completions, **kwargs):
        return [text.count("1") / 8 + text.count("2") / 16 - len(set(text)) / 16 for text in completions]

    doctor = silent(GRPODoctor)
    many = {"per_device_train_batch_size": 8, "num_generations": 8}
    grpo(tmp_path, doctor, reward=reward, max_steps=40, learning_rate=1e-2, **many)
    assert "entropy_collapse" in rules(doctor)


def test_grpo_doctor_on_another_trainer_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="Use TrainDoctor"):
        train(tmp_path, GRPODoctor())
