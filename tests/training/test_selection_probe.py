"""The curve of a probe is that of a fixed set of prompts, while selectors choose what is trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.selection import PCL, GainRL, ShuffledPrompts, split_probe
from tests.helpers import grpo_args, prompt_dataset, run_grpo


class Spy(EffiGRPOTrainer):
    """Remembers the prompts that were scored, in training and in evaluation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.trained: list[str] = []
        self.measured: list[list[str]] = []
        super().__init__(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.measured.append([])
        return super().evaluate(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, *args: Any) -> Any:
        (self.trained if self.model.training else self.measured[-1]).extend(prompts)
        return super()._calculate_rewards(inputs, prompts, *args)


def by_prompt(prompts: list[str], **kwargs: Any) -> list[float]:
    """A reward that only the choice of prompts can change."""
    return [float(int(text.split(":")[0]) % 2) for text in prompts]


@pytest.mark.parametrize("make", [ShuffledPrompts, PCL, GainRL])
def test_probe_rewards_are_those_of_a_fixed_set(tmp_path: Path, make: Any) -> None:
    data, probe = split_probe(prompt_dataset(20), rows=5, seed=3)
    args = grpo_args(
        tmp_path,
        EffiGRPOConfig,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=2,
    )
    trainer = run_grpo(
        Spy, args, reward_funcs=by_prompt, train_dataset=data, eval_dataset=probe, prompt_selector=make(len(data))
    )
    assert len(trainer.measured) == 3
    for prompts in trainer.measured:
        assert Counter(prompts) == dict.fromkeys(probe["prompt"], 2)
    assert trainer.trained and not set(trainer.trained) & set(probe["prompt"])
    curve = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    expected = sum(by_prompt(list(probe["prompt"]))) / 5
    assert curve == pytest.approx([expected] * 3)
