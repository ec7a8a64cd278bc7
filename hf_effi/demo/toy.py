"""Everything a snippet needs to run on a laptop in seconds: a tiny random policy, prompts, a reward."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from .policy import PolicySettings, build_policy
from .task import build_tokenizer, sample_problem


@dataclass(frozen=True)
class Toy:
    """
    What [`toy`] returns.

    Args:
        model: A Qwen3 model of about 40 000 parameters with random weights.
        tokenizer: One token per character.
        prompts (`datasets.Dataset`): Columns `prompt` (e.g. `"7-3+9="`) and `answer`.
        texts (`datasets.Dataset`): Column `text`, for language modelling.
        tokens (`list[dict]`): The same, tokenized, with `input_ids` and `labels` of one length, for a plain `Trainer`.
        reward: [`even_ending_reward`], which a random model often meets: groups differ, and there is a gradient.
        cpu_args (`dict`): Arguments that any trainer config needs for a few quiet steps on a CPU.
    """

    model: Any
    tokenizer: Any
    prompts: Any
    texts: Any
    tokens: list[dict[str, list[int]]]
    reward: Any
    cpu_args: dict[str, Any]

    @property
    def grpo_args(self) -> dict[str, Any]:
        """The same with short completions, for a GRPO config."""
        return {**self.cpu_args, "max_completion_length": 16}


def toy(size: int = 64, seed: int = 0) -> Toy:
    """
    Return a tiny model and data for trying things out. Nothing is downloaded and nothing useful is learned.

    Args:
        size (`int`, *optional*, defaults to `64`): Rows of the datasets.
        seed (`int`, *optional*, defaults to `0`): Seed of weights and data.
    """
    from datasets import Dataset

    rng, tokenizer = random.Random(seed), build_tokenizer()
    problems = [sample_problem(rng, 2, 4) for _ in range(size)]
    texts = [problem.prompt + problem.worked for problem in problems]
    ids = [(tokenizer(text)["input_ids"] * 24)[:24] for text in texts]
    settings = PolicySettings(hidden_size=32, num_layers=2, intermediate_size=64)
    return Toy(
        model=build_policy(settings, tokenizer),
        tokenizer=tokenizer,
        prompts=Dataset.from_dict(
            {"prompt": [problem.prompt for problem in problems], "answer": [problem.answer for problem in problems]}
        ),
        texts=Dataset.from_dict({"text": texts}),
        tokens=[{"input_ids": row, "labels": row} for row in ids],
        reward=even_ending_reward,
        cpu_args={
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
        },
    )


def even_ending_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """
    Reward function for `GRPOTrainer`: 1.0 where a completion ends in an even digit, else 0.0.

    Example:
    ```python
    >>> even_ending_reward(["7+9=16", "3+4=7", ""])
    [1.0, 0.0, 0.0]
    ```
    """
    return [float(text.endswith(tuple("02468"))) for text in completions]


def logged(trainer: Any, name: str) -> list[float]:
    """
    Return what a trainer logged under a name, in order.

    Example:
    ```python
    >>> from types import SimpleNamespace
    >>> state = SimpleNamespace(log_history=[{"loss": 2.0}, {"eval_loss": 3.0}, {"loss": 1.5}])
    >>> trainer = SimpleNamespace(state=state)
    >>> logged(trainer, "loss")
    [2.0, 1.5]
    ```
    """
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]
