"""Is a split forward the whole one? Asked once of the loaded model, by all ranks, before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .attention import attention_scope
from .boundary import gathered_forward, sharded_forward, split_point
from .checks import implementation_of
from .groups import SequenceGroup, SequenceParallelError
from .layout import split_batch
from .positions import first_output, quiet

_PADDING = 3


def prove_split(models: Sequence[nn.Module], group: SequenceGroup, with_loss: bool) -> None:
    """
    Forward a few tokens whole and split, and compare: every rank calls it with its own instances of the same models.

    Two rows, one of them left-padded, of a length that the ranks do not divide. What this finds needs no name: state that
    runs along the sequence (recurrences, convolutions), positions of a kind of their own, extra terms of the loss.

    Args:
        models (`Sequence[nn.Module]`): Policy and reference models, unwrapped.
        group ([`SequenceGroup`]): The ranks of a sequence.
        with_loss (`bool`): Whether the trainer sums the model's own loss over the ranks (mode `"token"`).

    Raises:
        SequenceParallelError: a difference, on whatever rank it showed; all ranks raise.
    """
    for model in models:
        difference, what = _difference(model, group, with_loss)
        tolerance = 1e-4 if _is_precise(model) else 5e-2
        # NaN would be lost in a maximum.
        worst = torch.tensor([difference], device=_device(model)).nan_to_num(nan=torch.inf)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group.process_group)
        if not float(worst) <= tolerance:
            raise SequenceParallelError(
                f"{type(model).__name__} split over {group.size} ranks is not the whole model: on a few left-padded tokens "
                f"its {what} differ by {float(worst):.1e} (relative; at most {tolerance:.0e} is rounding). Something in it "
                "passes along the sequence outside of its attention (a convolution, a recurrence, positions of its own)."
            )


def _difference(model: nn.Module, group: SequenceGroup, with_loss: bool) -> tuple[float, str]:
    ids, mask = _tokens(model, 4 * group.size + 1)
    real = mask != 0
    point = split_point(model)
    with quiet(model), attention_scope([implementation_of(model)]):
        whole = first_output(point(input_ids=ids, attention_mask=mask, use_cache=False))
        with gathered_forward([model], group, "sum"):
            split = first_output(point(input_ids=ids, attention_mask=mask))
        found = float((split - whole)[real].abs().max() / whole[real].abs().max().clamp(min=1e-30)), "outputs"
        if not with_loss:
            return found
        labels = ids.masked_fill(~real, -100)
        labels[1, _PADDING] = -100  # or padding would predict it
        count = int((labels[:, 1:] != -100).sum())
        whole_loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
        layout, shard = split_batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, group)
        with sharded_forward(model, layout):
            part = model(**shard, num_items_in_batch=count).loss.detach().float()
        dist.all_reduce(part, group=group.process_group)
        loss = float((part - whole_loss).abs() / whole_loss.abs().clamp(min=1e-30)), "losses"
        return max(found, loss)


def _tokens(model: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(2 * length, device=_device(model)) % max(size - 4, 1) + min(3, size - 1)).view(2, length)
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    return ids, mask


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _is_precise(model: nn.Module) -> bool:
    return all(w.dtype in (torch.float32, torch.float64) for w in model.parameters() if w.is_floating_point())
