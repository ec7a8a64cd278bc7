"""Image entries of a batch, which are indexed by patch, tile or image, as entries that have one part for each row."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from ...errors import RefusedError

#: as wide as prompt and completion together
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
#: what TRL puts into a batch for images
VISION_KEYS = frozenset(
    (*_TOKEN_TYPES, "num_images", "num_tiles")
    + ("pixel_values", "image_grid_thw", "image_position_ids", "pixel_attention_mask", "spatial_shapes", "image_sizes")
)
#: the halves of token types, which are padded as prompts and completions are
HALVES = frozenset(f"{side}_{name}" for side in ("prompt", "completion") for name in _TOKEN_TYPES)


def by_rows_of_all(batch: dict[str, Any]) -> dict[str, Any]:
    """
    Return [`by_rows`], or raise on all ranks what one of them would. One collective.

    Raises:
        RefusedError: some ranks have images and others none, so that rows could not move between them.
        ValueError: as in [`by_rows`].
    """
    found, problem = batch, ""
    try:
        found = by_rows(batch)
    except ValueError as error:
        problem = str(error)
    everybodys = gather_object([(sorted(VISION_KEYS & set(batch)), problem)])
    if problems := [text for _, text in everybodys if text]:
        raise ValueError(problems[0])
    if any(names != everybodys[0][0] for names, _ in everybodys):
        raise RefusedError(
            "some processes have prompts with images in this generation and others have none, so that rows cannot "
            "move between them. Give every prompt an image, or turn filters, pruning and prompt selection off."
        )
    return found


def by_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """
    Return a batch whose rows can be picked: image entries are lists with one tensor for each row, cut by TRL's own
    rules.

    Args:
        batch (`dict`): As TRL's generation returns it.
    """
    if not VISION_KEYS & set(batch):
        return batch
    rows, prompt = batch["prompt_ids"].shape
    found: dict[str, Any] = split_pixel_values_by_grid(batch)
    for name in sorted(VISION_KEYS & set(found)):
        value = found[name]
        if name in _TOKEN_TYPES:
            found = {key: entry for key, entry in found.items() if key != name}
            found[f"prompt_{name}"], found[f"completion_{name}"] = value[:, :prompt], value[:, prompt:]
        elif isinstance(value, Tensor):  # padded to one entry per row; other rounds may be padded otherwise
            if value.size(0) != rows:
                raise ValueError(
                    f"the batch has {name} of {value.size(0)} entries for {rows} rows, and nothing that says which "
                    "belong to which row. Turn filters, pruning and prompt selection off for this model."
                )
            found = {**found, name: list(value.split(1))}
    return found


def merged(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what [`by_rows`] was given, for the rows that are there now."""
    if not (VISION_KEYS | HALVES) & set(batch):
        return batch
    found = dict(batch)
    for name in _TOKEN_TYPES:
        if f"prompt_{name}" in found:
            halves = [found.pop(f"{side}_{name}") for side in ("prompt", "completion")]
            found[name] = torch.cat(halves, dim=1)
    for name in sorted(VISION_KEYS & set(found)):
        value = found[name]
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            found[name] = _alike(value)
    whole: dict[str, Any] = unsplit_pixel_values_by_grid(found)
    return whole


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """Return parts with equal shapes behind the first dimension, padded at the end by 0."""
    shapes = [tuple(part.shape[1:]) for part in parts]
    if len(set(shapes)) == 1:
        return parts
    widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for part in parts:
        gaps = [
            gap
            for want, have in zip(reversed(widest), reversed(part.shape[1:]), strict=True)
            for gap in (0, want - have)
        ]
        padded.append(functional.pad(part, gaps))
    return padded
