"""Settings of RL papers, through stock TRL's trainer and ours."""

from __future__ import annotations

import pickle

import pytest
from trl import GRPOTrainer

from hf_effi.errors import RewardError
from hf_effi.recipes import VerifiedReward, ml_engineering, rlvr
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import binary_hash_reward, grpo_args, run_grpo, save_tiny, tiny_qwen3, tiny_tokenizer
from tests.helpers.tokenizer import EOS_ID


def never(completions, **kwargs):
    return [None for _ in completions]


def half(completions, **kwargs):
    return [0.5 for _ in completions]


def test_rewards_by_hand() -> None:
    reward = VerifiedReward(lambda completions, **kwargs: [1.0, 0.0, None, float("nan")])
    assert reward(completions=[""] * 4) == [10.0, 0.0, None, None]
    ended = VerifiedReward(half, scale=2.0, end_token_ids=[9], no_end=-3.0)
    assert ended(completions=["a", "b", ""], completion_ids=[[1, 9], [9, 1], []]) == [1.0, -3.0, -3.0]
    with pytest.raises(RewardError, match="which were not passed"):
        ended(completions=["a"])
    with pytest.raises(RewardError, match="1 rewards for 2 completions"):
        VerifiedReward(lambda completions, **kwargs: [1.0])(completions=["a", "b"])
    assert pickle.loads(pickle.dumps(VerifiedReward(half))).__name__ == "verified_half"


def test_milestones_by_hand() -> None:
    texts = ["", "step 0 step 3 step 5", "step 1"]
    patterns = [rf"step {number}" for number in range(7)]
    assert ml_engineering(patterns, never).reward_funcs[0](completions=texts) == pytest.approx([-1.0, -0.7, -0.9])
    unscaled = ml_engineering(patterns, never, scale_rewards="none")
    assert unscaled.reward_funcs[0](completions=texts) == pytest.approx([-10.0, -9.7, -9.9])
    assert unscaled.config == {"learning_rate": 1e-5, "scale_rewards": "none"}
    lower = ml_engineering(patterns, half, higher_is_better=False).reward_funcs[0]
    assert lower(completions=texts) == [-0.5] * 3 and pickle.loads(pickle.dumps(lower))(completions=[""]) == [-0.5]
    printed = ml_engineering(patterns, never, read=lambda completions, **kwargs: ["step 6"] * 3).reward_funcs[0]
    assert printed(completions=texts) == pytest.approx([-0.9] * 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: rlvr(half, "3b"), "size='3b'"),
        (lambda: rlvr(half, scale=0.0), "scale=0.0"),
        (lambda: rlvr(half, end_token_ids=[]), "end_token_ids is empty"),
        (lambda: rlvr(None), "reward=None"),
        (lambda: ml_engineering(["a"], half, scale_rewards="batch"), "scale_rewards='batch'"),
        (lambda: ml_engineering(["a"], half, higher_is_better=1), "higher_is_better=1"),
        (lambda: ml_engineering(["a"], None, higher_is_better=False), "final=None"),
        (lambda: ml_engineering([], half), "list of 1 to 256"),
    ],
)
def test_what_is_refused(make, match) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("trainer", [GRPOTrainer, EffiGRPOTrainer])
@pytest.mark.parametrize("name", ["rlvr", "ml_engineering"])
def test_a_trainer_takes_them(tmp_path, trainer, name) -> None:
    preset = {
        "rlvr": lambda: rlvr(binary_hash_reward, "70b", end_token_ids=[EOS_ID]),
        "ml_engineering": lambda: ml_engineering(["1", "2"], never),
    }[name]()
    config = {"cls": EffiGRPOConfig} if trainer is EffiGRPOTrainer else {}
    args = grpo_args(tmp_path, **config, **{**preset.config, "max_completion_length": 8, "max_steps": 2})
    model = save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")  # beta needs a reference
    trained = run_grpo(trainer, args, model=model, reward_funcs=preset.reward_funcs)
    assert trained.args.learning_rate == preset.config["learning_rate"]
    if name == "rlvr":
        assert (trained.beta, trained.num_iterations, trained.args.temperature) == (0.07, 4, 1.0)
        assert any(entry["reward"] < 0 for entry in trained.state.log_history if "reward" in entry)  # few end in 8
