"""Is a split forward the whole one? Asked once of the loaded model, by all ranks, before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import RefusedError
from ..patching import length_dependent_positions, output_of, tiny_tokens
from .attention import attention_scope
from .boundary import gathered_forward, sharded_forward, split_point
from .checks import implementation_of
from .groups import SequenceGroup
from .layout import split_batch
from .positions import as_it_is_or_wide, difference

_PADDING = 3


def prove_split(models: Sequence[nn.Module], group: SequenceGroup, with_loss: bool) -> None:
    """
    Forward a few tokens whole and split, and compare: every rank calls it with its own instances of the same models.

    Two rows, one of them left-padded, of a length that the ranks do not divide. What this finds needs no name: state
    that runs along the sequence (recurrences, convolutions), positions of a kind of their own, extra terms of the
    loss.

    Args:
        models (`Sequence[nn.Module]`): Policy and reference models, unwrapped.
        group ([`SequenceGroup`]): The ranks of a sequence.
        with_loss (`bool`): Whether the trainer sums the model's own loss over the ranks (mode `"token"`).

    Raises:
        RefusedError: a difference, on whatever rank it showed; all ranks raise.
    """
    for model in models:
        _check_rotation(model)
        ids = tiny_tokens(model, 2, 4 * group.size + 1)
        mask = torch.ones_like(ids)
        mask[1, :_PADDING] = 0
        with as_it_is_or_wide(model) as allowed, attention_scope([implementation_of(model)]):
            found = {"outputs": _outputs_apart(model, group, ids, mask)}
            if with_loss:
                found["losses"] = _losses_apart(model, group, ids, mask)
        what = max(found, key=lambda name: found[name])
        worst = torch.tensor([found[what]], device=ids.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group.process_group)
        if float(worst) > allowed:
            raise RefusedError(
                f"{type(model).__name__} split over {group.size} ranks is not the whole model: on a few left-padded "
                f"tokens its {what} differ by {float(worst):.1e} (relative). Something in it passes along the "
                "sequence outside of its attention (a convolution, a recurrence, positions of its own)."
            )


def _check_rotation(model: nn.Module) -> None:
    """A few tokens are too short to show it, so the modules that embed positions are asked themselves."""
    found = length_dependent_positions(model)
    if found.looked and not found.equal:
        raise RefusedError(
            f"{type(model).__name__}: {found} between a short and a long call, and each rank sees only its own part. "
            "Use a rope_type with fixed frequencies, such as 'linear', 'yarn' or 'llama3'."
        )


def _outputs_apart(model: nn.Module, group: SequenceGroup, ids: Tensor, mask: Tensor) -> float:
    point = split_point(model)
    whole = output_of(point(input_ids=ids, attention_mask=mask, use_cache=False))
    with gathered_forward([model], group, "sum"):
        split = output_of(point(input_ids=ids, attention_mask=mask))
    return difference(whole, split, mask)


def _losses_apart(model: nn.Module, group: SequenceGroup, ids: Tensor, mask: Tensor) -> float:
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, _PADDING] = -100  # or padding would predict it
    count = int((labels[:, 1:] != -100).sum())
    whole = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
    layout, shard = split_batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, group)
    with sharded_forward(model, layout):
        parts = model(**shard, num_items_in_batch=count).loss.detach().clone()
    dist.all_reduce(parts, group=group.process_group)
    return difference(whole[None], parts[None], torch.ones(1))
