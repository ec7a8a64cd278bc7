"""The smallest GRPO run that exercises the whole path on a CPU."""

from __future__ import annotations

import contextlib
import copy
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
    with _measured_once():
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


_measured: dict[Any, Any] = {}


def _name_of(model: nn.Module) -> Any:
    """
    Return what tells one untouched model of transformers from another, `None` for one that somebody has changed.

    Of two models of one architecture, config, dtype and attention, any weights give the same answers.
    """
    heads = []
    for module in model.modules():
        own = [
            module.__dict__.get(f"_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre")
        ]
        if any(own) or not type(module).__module__.startswith(("transformers.", "torch.nn.", "peft.")):
            return None
        if (forward := module.__dict__.get("forward")) is not None:
            code = getattr(getattr(forward, "__func__", None), "__code__", None)
            if code is None or Path(code.co_filename).parts[-3:-1] != ("trl", "trainer"):
                return None
            heads.append(code.co_name)  # TRL's own head
    kinds = {(weight.dtype, weight.device, weight.requires_grad) for weight in model.parameters()}
    config: Any = model.config
    return repr(model), config.to_json_string(), config._attn_implementation, model.training, frozenset(kinds), *heads


@contextlib.contextmanager
def _measured_once() -> Iterator[None]:
    """
    Let a model that nobody has changed be measured once in a process: its answers are the same each time.

    Hundreds of trainers are made with a few tiny models, and asking one takes longer than its training.
    """
    from hf_effi.trainers.grpo import reuse_checks, savings

    places = [(savings, name) for name in ("measured_reasons", "flat_reasons", "shortest_window")]
    asked = {name: getattr(module, name) for module, name in places}
    check = reuse_checks.check_model

    def remembered(name: str) -> Any:
        ask = asked[name]

        def answer(model: nn.Module, *args: Any) -> Any:
            if (known := _name_of(model)) is None:
                return ask(model, *args)
            key = (ask, known, *args)
            if key not in _measured:
                _measured[key] = ask(model, *args)
            return copy.copy(_measured[key])

        return answer

    def checked(host: Any) -> None:
        known = _name_of(host.accelerator.unwrap_model(host.model))
        if known is None or (check, known) not in _measured:
            check(host)  # a refusal is not remembered
            _measured[check, known] = None

    for module, name in places:
        setattr(module, name, remembered(name))
    reuse_checks.check_model = checked
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, asked[name])
        reuse_checks.check_model = check
