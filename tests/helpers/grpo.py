"""The smallest GRPO run that exercises the whole path on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from trl import GRPOConfig

from .data import binary_hash_reward, prompt_dataset
from .models import tiny_qwen3
from .tokenizer import tiny_tokenizer


def grpo_args(tmp_path: str | Path, cls: type = GRPOConfig, **over: Any) -> Any:
    """
    Return the minimal fast CPU arguments: 3 steps of 4 rows (2 groups of 2, or 1 of 4 by `num_generations=4`).

    Args:
        tmp_path (`str` or `Path`):
            Output directory.
        cls (`type`, *optional*, defaults to `GRPOConfig`):
            The config class, such as `EffiGRPOConfig`.
        over:
            Fields of the config; they win over the defaults here.
    """
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "ddp_find_unused_parameters": False,
        "seed": 7,
    }
    return cls(**{**settings, **over})


def run_grpo(
    trainer_cls: type,
    args: Any,
    *,
    model: Any = None,
    reward_funcs: Any = binary_hash_reward,
    train_dataset: Any = None,
    processing_class: Any = None,
    resume_from_checkpoint: bool | str | None = None,
    train: bool = True,
    **kwargs: Any,
) -> Any:
    """
    Build the trainer, call `train()`, return the trainer.

    Args:
        trainer_cls (`type`):
            `GRPOTrainer` or a subclass.
        args:
            From [`grpo_args`].
        model (*optional*):
            A fresh model; training changes it. Defaults to `tiny_qwen3(end_tokens=10)`, whose completions are ragged.
        reward_funcs, train_dataset, processing_class (*optional*):
            Default to `binary_hash_reward`, `prompt_dataset(16)` and the shared tokenizer.
        train (`bool`, *optional*, defaults to `True`):
            With `False` the trainer is returned untrained.
        kwargs:
            Further arguments of the trainer.
    """
    with _measured_once() if model is None and "peft_config" not in kwargs else contextlib.nullcontext():
        trainer = trainer_cls(
            model=tiny_qwen3(end_tokens=10) if model is None else model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=prompt_dataset(16) if train_dataset is None else train_dataset,
            processing_class=tiny_tokenizer() if processing_class is None else processing_class,
            **kwargs,
        )
    if train:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


_measured: dict[Any, dict[str, str]] = {}


@contextlib.contextmanager
def _measured_once() -> Iterator[None]:
    """
    Let the default model of this module be measured once in a process: its answers are the same each time.

    Hundreds of trainers are made with it, and asking it takes longer than its training.
    """
    from hf_effi.trainers.grpo import savings

    ask = savings.measured_reasons

    def answer(model: nn.Module, names: Any, longest: int | None, pad_token_id: int) -> dict[str, str]:
        key = (ask, names, longest, pad_token_id, repr(model), model.config.to_json_string())
        if key not in _measured:
            _measured[key] = ask(model, names, longest, pad_token_id)
        return dict(_measured[key])

    savings.measured_reasons = answer
    try:
        yield
    finally:
        savings.measured_reasons = ask
