"""What is looked at, and mended, before a GRPO run begins."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import datasets
from transformers.trainer_utils import get_last_checkpoint

from .config import EffiGRPOConfig
from .host import Host


def default_config(model: Any) -> EffiGRPOConfig:
    """Return the config of a trainer that was given none, with TRL's name for its folder."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
    return EffiGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-GRPO")


def check_dataset(dataset: Any, environment: Any) -> None:
    """
    Say what is wrong with a dataset before a model is loaded. What is no dataset at all, TRL names.

    Args:
        environment: The `environment_factory` of the trainer; an environment may bring the prompts.

    Raises:
        ValueError: no rows, or no `prompt` column.
    """
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise ValueError("train_dataset is empty. GRPO needs at least one row with a `prompt` column.")
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns and environment is None:
        raise ValueError(
            f"train_dataset has no `prompt` column; its columns are {', '.join(map(str, columns))}. Rename the column "
            "that holds the prompts, e.g. dataset.rename_column('question', 'prompt')."
        )


def route_checkpointing_options(host: Host) -> None:
    """
    Let `every_n_layers` and `offload` survive a generation.

    TRL 1.16 turns checkpointing off to generate and on again with the raw options, of which transformers takes
    these two as arguments of their own: the stock trainer stops with `Unexpected keyword arguments` at step 1.
    """
    options = host.args.gradient_checkpointing_kwargs or {}
    if not host.args.gradient_checkpointing or not {"every_n_layers", "offload"} & set(options):
        return
    model = host.accelerator.unwrap_model(host.model)
    enable = model.gradient_checkpointing_enable

    @functools.wraps(enable)
    def routed(gradient_checkpointing_kwargs: dict[str, Any] | None = None, **extra: Any) -> Any:
        rest = dict(gradient_checkpointing_kwargs or {})
        extra |= {name: rest.pop(name) for name in ("every_n_layers", "offload") if name in rest}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old name is TRL's, not the user's
            return enable(gradient_checkpointing_kwargs=rest or None, **extra)

    model.gradient_checkpointing_enable = routed


def guard_vllm_server(host: Host, generation: Any) -> None:
    """
    Let a server that fails end the run with one sentence.

    Args:
        generation (`VLLMGeneration`): TRL's, whose client is wrapped. A `rollout_func` may talk to the server in ways
            of its own.
    """
    in_use = host.args.vllm_mode == "server" and host.rollout_func is None
    if not in_use or not host.accelerator.is_main_process:
        return
    from .vllm_server import GuardedClient  # needs `requests`, as TRL's client does

    def advice() -> str:
        return _how_to_go_on(host)

    generation.vllm_client = GuardedClient(generation.vllm_client, host.args.ddp_timeout, advice)


def _how_to_go_on(host: Host) -> str:
    folder, step = host.args.output_dir, host.state.global_step
    checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    again = "Its own log says why. Start it again with the same command, then"
    if checkpoint is None:
        return (
            f"{again} train from the start: step {step} was reached and no checkpoint saved (save_strategy="
            f"{host.args.save_strategy.value!r})."
        )
    return f"{again} trainer.train(resume_from_checkpoint=True) goes on from {checkpoint}; step {step} was reached."
