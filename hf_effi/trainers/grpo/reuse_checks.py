"""What stands against the reuse of rollouts, said before the model is loaded where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from transformers.utils import logging

from ...errors import RefusedError
from ...functional.rollouts import GenerationLayout, SpeculativeReuse
from .host import Host
from .reuse_scores import check_model, check_sampling

logger = logging.get_logger(__name__)


def check_reuse(reuse: Any, args: Any, dataset: Any, given: dict[str, Any]) -> None:
    """
    Check the arguments of a trainer against `rollout_reuse`, before a model is loaded.

    Args:
        reuse ([`SpeculativeReuse`], *optional*): The argument; without it there is nothing to check.
        args: The config.
        dataset: The training dataset.
        given (`dict`): The other arguments of the trainer by name.

    Raises:
        TypeError: `rollout_reuse` is something else.
        RefusedError: a part of the run that reuse cannot work with yet.
        ValueError: no prompt comes twice, or no completion has a largest length.
    """
    if reuse is None:
        return
    if not isinstance(reuse, SpeculativeReuse):
        raise TypeError(
            f"rollout_reuse must be a hf_effi.functional.rollouts.SpeculativeReuse, got {type(reuse).__name__}."
        )
    if given.get("rollout_noise") is not None:
        raise RefusedError(
            "rollout_reuse verifies drafts with the weights that are trained, and rollout_noise lets completions be "
            "drawn from others. Drop one of the two."
        )
    names = ("tools", "environment_factory", "rollout_func")
    found = {name: given.get(name) for name in names}
    found |= {"use_vllm": args.use_vllm}
    found |= {"use_transformers_continuous_batching": args.use_transformers_continuous_batching}
    found |= {"sequence_parallel_size": getattr(args, "sequence_parallel_size", None) not in (None, 1)}
    for name, value in found.items():
        if value:
            raise RefusedError(f"rollout_reuse does not work with `{name}` yet. Drop one of the two.")
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        if columns := {"image", "images"} & set(dataset.column_names or ()):
            raise RefusedError(
                f"rollout_reuse does not work with images yet (column {min(columns)!r}). Drop one of the two."
            )
    if args.max_completion_length is None:
        raise ValueError("rollout_reuse needs a max_completion_length, which bounds the memory of a draft.")
    if args.max_steps <= 0 and args.num_train_epochs <= 1 and given.get("prompt_selector") is None:
        raise ValueError(
            f"rollout_reuse reuses the completions of the last pass, and num_train_epochs={args.num_train_epochs} is "
            "one pass. Train for two or more, or drop rollout_reuse."
        )


def check_run(host: Host, reuse: SpeculativeReuse) -> None:
    """
    Check sampling, model and memory of a trainer that is built.

    Raises:
        RefusedError: sampling or model cannot be reproduced in one forward.
        ValueError: `max_bytes` holds less than one generation.
    """
    check_sampling(host)
    check_model(host)
    length, layout = host.args.max_completion_length, GenerationLayout.of(host.args)
    capacity, mine = reuse.capacity(length), layout.generated_rows // layout.world_size
    bytes_of_one = reuse.draft_bytes(length)
    if capacity < mine:
        raise ValueError(
            f"max_bytes={reuse.max_bytes} holds {capacity} drafts of {length} tokens, and a generation has {mine} on "
            f"each process: none would be left for the next pass. Set max_bytes to {bytes_of_one * mine} or more for "
            "one generation, better for all prompts of the dataset, or lower stored_tokens."
        )
    if hasattr(host.train_dataset, "__len__"):
        rows = len(host.train_dataset) * host.num_generations
        if capacity * layout.world_size < rows and host.accelerator.is_main_process:
            logger.warning(
                f"rollout_reuse keeps {capacity * layout.world_size} drafts of up to {length} tokens, and a pass has "
                f"{rows} completions: the oldest are dropped before they can be reused. For all of them, set "
                f"max_bytes to {bytes_of_one * -(-rows // layout.world_size)}, or lower stored_tokens."
            )


def refuse_this_turn(images: Any, multimodal_fields: Any, around: Sequence[Any]) -> None:
    """
    Refuse what only a turn shows.

    Args:
        images, multimodal_fields: As TRL hands them to `_generate_single_turn`.
        around (`Sequence`): All that stands around the turn.

    Raises:
        RefusedError: inputs beside the tokens, or completions that are drawn from other weights than are trained.
    """
    if images is not None or multimodal_fields:
        what = "images" if images is not None else ", ".join(multimodal_fields)
        raise RefusedError(f"rollout_reuse does not work with inputs beside tokens yet ({what}). Drop rollout_reuse.")
    if noisy := [type(step).__name__ for step in around if getattr(step, "changes_weights", False)]:
        raise RefusedError(
            f"rollout_reuse verifies drafts with the weights that are trained, and {noisy[0]} lets completions be "
            "drawn from others. Drop one of the two."
        )
