"""`train_sampler=` on the Effi trainers, beside their other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_effi.samplers import QualityAscendingSampler
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from hf_effi.trainers.sft import EffiSFTConfig, EffiSFTTrainer
from hf_effi.trainers.trainer import EffiTrainer, EffiTrainingArguments
from tests.helpers import (
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    lm_dataset,
    prompt_dataset,
    run_grpo,
    sft_dataset,
    tiny_llama,
    tiny_tokenizer,
)

#: these tests look at the order; what it is worth under a decay is the business of tests/training/test_recipes.py
pytestmark = pytest.mark.filterwarnings("ignore::hf_effi.errors.DecayToZeroWarning")

QUALITY = [float((7 * row) % 16) for row in range(16)]
RISING = sorted(range(16), key=QUALITY.__getitem__)
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}


def sampler() -> QualityAscendingSampler:
    return QualityAscendingSampler(QUALITY)


@pytest.mark.parametrize("over", [{}, {"prune_rate": 0.5}], ids=["plain", "allocation"])
def test_grpo_generates_in_the_order_of_the_sampler(tmp_path: Path, over: dict[str, Any]) -> None:
    data, served = prompt_dataset(16), []
    place = {row["prompt"]: i for i, row in enumerate(data)}

    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        served.extend(place[prompt] for prompt in prompts[::2])
        return binary_hash_reward(completions)

    args = grpo_args(tmp_path, EffiGRPOConfig, max_steps=-1, num_train_epochs=1, **over)
    trainer = run_grpo(EffiGRPOTrainer, args, reward_funcs=reward, train_dataset=data, train_sampler=sampler())
    assert served == RISING
    assert trainer.state.max_steps == (4 if over else 8)


def test_grpo_resumes_in_the_middle_of_the_second_epoch(tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> Any:
        args = grpo_args(
            tmp_path / folder, EffiGRPOConfig, max_steps=-1, num_train_epochs=2, save_strategy="steps", save_steps=1,
            num_iterations=2, difficulty_range=(0, 1),
        )  # fmt: skip
        return run_grpo(
            EffiGRPOTrainer,
            args,
            train_dataset=prompt_dataset(16),
            train_sampler=sampler(),
            resume_from_checkpoint=resume,
        )

    whole = run("whole")
    stop = whole.state.max_steps // 2 + 3
    resumed = run("resumed", str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_bitwise_equal(whole.model, resumed.model)


def test_plain_and_sft_trainers_take_a_sampler_beside_a_schedule(tmp_path: Path) -> None:
    schedule = {"lr_schedule": "wsd", "lr_schedule_kwargs": {"decay_steps": 1}}
    plain = EffiTrainer(
        tiny_llama(),
        EffiTrainingArguments(str(tmp_path / "plain"), num_train_epochs=1, **CPU, **schedule),
        train_dataset=lm_dataset(16),
        train_sampler=sampler(),
    )
    assert list(plain._get_train_sampler()) == RISING
    plain.train()
    sft = EffiSFTTrainer(
        tiny_llama(),
        EffiSFTConfig(str(tmp_path / "sft"), num_train_epochs=1, gradient_checkpointing=False, **CPU, **schedule),
        train_dataset=sft_dataset(16),
        processing_class=tiny_tokenizer(),
        train_sampler=sampler(),
    )
    assert list(sft._get_train_sampler()) == RISING
    sft.train()
    assert plain.state.global_step == sft.state.global_step == 4
