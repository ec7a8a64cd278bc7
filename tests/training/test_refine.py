"""PDR as a `rollout_func`, through stock TRL's trainer and ours."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import with_workspace
from hf_effi.recipes import pdr_rollout_func
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, binary_hash_reward, grpo_args, run_grpo, tiny_tokenizer, weights_of

PROMPTS = [f"{number}+{number}=" for number in range(8)]
TRAINERS = pytest.mark.parametrize("trainer", [GRPOTrainer, EffiGRPOTrainer])


def short(prompt: str, workspace: str) -> str:
    return f"{prompt}|{workspace}|"


class Kept:
    """A reward that remembers what it was told."""

    __name__ = "kept"

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def __call__(self, prompts: Any, completions: Any, workspace: Any, **kwargs: Any) -> list[float]:
        self.rows += zip(prompts, completions, workspace, strict=True)
        return binary_hash_reward(completions)


def data(mode: Any = lambda place: ("plain", "pdr")[place % 2], prompts: Any = PROMPTS) -> Dataset:
    return Dataset.from_dict({"prompt": prompts, "mode": [mode(place) for place in range(len(prompts))]})


def train(folder: Any, trainer: type, rollout_func: Any, reward: Any = None, dataset: Any = None, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2}
    kwargs = {name: over.pop(name) for name in ("train", "resume_from_checkpoint", "callbacks") if name in over}
    kind = {"cls": EffiGRPOConfig} if issubclass(trainer, EffiGRPOTrainer) else {}
    args = grpo_args(folder, **kind, **{**settings, **over})
    more = {} if rollout_func is None else {"rollout_func": rollout_func}
    return run_grpo(
        trainer,
        args,
        reward_funcs=reward or binary_hash_reward,
        train_dataset=data() if dataset is None else dataset,
        **more,
        **kwargs,
    )


@TRAINERS
def test_all_plain_is_the_trainer_without_it_to_the_bit(tmp_path, trainer):
    plain = data(lambda place: "plain")
    stock = train(tmp_path, trainer, None, dataset=plain)
    ours = train(tmp_path, trainer, pdr_rollout_func(join=short), dataset=plain)
    assert_bitwise_equal(stock.model, ours.model)


@TRAINERS
@pytest.mark.parametrize("distil", ["top_k", "random_k", "summary", max])
def test_a_group_reads_one_workspace(tmp_path, trainer, distil):
    """And the tokens that are trained on are those of the last call."""
    reward, batches = Kept(), []
    rollouts = pdr_rollout_func(drafts=3, distil=distil, k=1, max_workspace_tokens=5, join=short)

    class Spy(trainer):
        def _generate_and_score_completions(self, inputs):
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

    train(tmp_path, Spy, rollouts, reward)
    tokenizer, modes = tiny_tokenizer(), dict(zip(PROMPTS, data()["mode"], strict=True))
    read = [
        tokenizer.decode(ids[mask.bool()])
        for batch in batches
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    assert len(reward.rows) == len(read) == 16
    for first in range(0, 16, 4):
        prompt, _, workspace = reward.rows[first]
        assert {row[2] for row in reward.rows[first : first + 4]} == {workspace}
        assert bool(workspace) == (modes[prompt] == "pdr") and len(workspace) <= 5
        if trainer is GRPOTrainer:  # ours sorts its rows
            expected = short(prompt, workspace) if workspace else prompt
            assert set(read[first : first + 4]) == {expected}
    assert any(row[2] for row in reward.rows)
    assert 0 < rollouts.sequential_tokens < rollouts.total_tokens


@pytest.mark.parametrize("over", [{}, {"temperature": 0.7, "top_k": 5}])
def test_log_probs_are_exact(tmp_path, over):
    trainer = train(tmp_path, GRPOTrainer, pdr_rollout_func(join=short), train=False, **over)
    trainer.model.train()
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(4)]
    found = trainer.rollout_func(prompts, trainer)
    assert len({len(row) for row in found["completion_ids"]}) > 1, "ragged completions show the padding"
    for ids, made, logps in zip(found["prompt_ids"], found["completion_ids"], found["logprobs"], strict=True):
        whole = torch.tensor([ids + made])
        with torch.no_grad():
            expected, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, whole, torch.ones_like(whole), len(made)
            )
        assert logps == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_messages(tmp_path):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    seen: list[str] = []

    def reward(prompts, completions, workspace, **kwargs):
        seen.extend(workspace)
        return binary_hash_reward(completions)

    for distil in ("top_k", "summary"):
        train(tmp_path, GRPOTrainer, pdr_rollout_func(distil=distil), reward, data(prompts=chats), max_steps=1)
    assert any(seen) and not all(seen)


def test_filtering_refills_through_it(tmp_path):
    reward = Kept()
    trainer = train(
        tmp_path,
        EffiGRPOTrainer,
        pdr_rollout_func(join=short, max_workspace_tokens=4),
        reward,
        difficulty_range=(0.0, 1.0),
        difficulty_max_rounds=3,
    )
    assert trainer.state.global_step == 2 and len(reward.rows) % 4 == 0
    for first in range(0, len(reward.rows), 4):
        assert len({row[2] for row in reward.rows[first : first + 4]}) == 1


def test_resumed_is_uninterrupted(tmp_path):
    def run(folder, **over):
        rollouts = pdr_rollout_func(distil="random_k", k=1, join=short, max_workspace_tokens=4)
        return train(
            tmp_path / folder, GRPOTrainer, rollouts, save_strategy="steps", save_steps=1, max_steps=3, **over
        )

    whole = run("whole")
    resumed = run("whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_bitwise_equal(whole.model, resumed.model)
    start = train(tmp_path / "start", GRPOTrainer, None, train=False)
    assert any(
        not torch.equal(weights_of(whole.model)[name], value) for name, value in weights_of(start.model).items()
    )


@pytest.mark.parametrize(
    ("dataset", "error", "match"),
    [
        (Dataset.from_dict({"prompt": PROMPTS}), RefusedError, "column 'mode' of train_dataset"),
        (data(lambda place: "long"), ValueError, "'long' must be 'plain' or 'pdr'"),
        (data(prompts=["1+1="] * 8), ValueError, "has both values"),
    ],
)
def test_a_column_that_does_not_say(tmp_path, dataset, error, match):
    with pytest.raises(error, match=match):
        train(tmp_path, GRPOTrainer, pdr_rollout_func(), dataset=dataset)


def test_what_is_refused(tmp_path):
    trainer = train(tmp_path, GRPOTrainer, pdr_rollout_func(mode=None), train=False)
    trainer.model.train()
    rollouts = trainer.rollout_func
    for prompts in (PROMPTS[:3], [*PROMPTS[:2], *PROMPTS[:2]]):
        with pytest.raises(RefusedError, match="no whole groups of 4"):
            rollouts(prompts, trainer)
    trainer.num_generations = 2
    with pytest.raises(RefusedError, match="generated in parts"):
        rollouts(PROMPTS[:1] * 2, trainer)
    trainer.num_generations = 4
    for name in ("use_vllm", "tools", "_is_vlm"):
        before = getattr(trainer, name)
        setattr(trainer, name, True)
        with pytest.raises(RefusedError, match="does not work with"):
            rollouts(PROMPTS[:1] * 4, trainer)
        setattr(trainer, name, before)
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+1="}]}]
    with pytest.raises(RefusedError, match="has parts"):
        rollouts._joined(parts, "a workspace")
    with pytest.raises(ValueError, match="drafts=0"):
        pdr_rollout_func(drafts=0)


def test_it_pickles():
    again = pickle.loads(pickle.dumps(pdr_rollout_func(drafts=2, distil="random_k")))
    assert (again.drafts, again.distil, again.join) == (2, "random_k", with_workspace)
