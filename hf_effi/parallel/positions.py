"""Which positions a model gives its tokens when it is told none: measured, because a shard cannot make them itself."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .groups import SequenceParallelError

PositionRule = Callable[[Tensor], Tensor]


def positions_by_column(mask: Tensor) -> Tensor:
    """
    Count columns, padding included: `p_j = j`.

    Args:
        mask (`Tensor`): `(rows, length)`, 1 on real tokens.

    Example:
    ```python
    >>> positions_by_column(torch.tensor([[0, 0, 1, 1]])).tolist()
    [[0, 1, 2, 3]]
    ```
    """
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape[0], -1)


def positions_by_token(mask: Tensor) -> Tensor:
    """
    Count real tokens: `p_j = max(sum_{i <= j} m_i - 1, 0)`; what padding gets does not matter.

    Example:
    ```python
    >>> positions_by_token(torch.tensor([[0, 0, 1, 1]])).tolist()
    [[0, 0, 0, 1]]
    ```
    """
    return ((mask != 0).long().cumsum(1) - 1).clamp(min=0)


_RULES = (positions_by_column, positions_by_token)
_LENGTH, _PADDING = 8, 3
_known: weakref.WeakKeyDictionary[nn.Module, PositionRule] = weakref.WeakKeyDictionary()


def position_rule(model: nn.Module) -> PositionRule:
    """
    Return the rule by which `model` numbers its tokens when no `position_ids` are given.

    A left-padded row is forwarded as it is, then with the positions of each rule; the rule with equal outputs is the
    model's. Measured once for each model instance: three forwards of 2 x 8 tokens, without gradients.

    Args:
        model (`nn.Module`): What is called with `input_ids` and `attention_mask`, whole (every rank calls it alike).

    Raises:
        SequenceParallelError: neither rule gives the model's own outputs, with the measured differences.
    """
    if model not in _known:
        _known[model] = _measure(model)
    return _known[model]


def _measure(model: nn.Module) -> PositionRule:
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(2 * _LENGTH, device=device) % max(size - 4, 1) + min(3, size - 1)).view(2, _LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    with quiet(model):
        own = _output(model, ids, mask)
        differences = [_difference(own, _output(model, ids, mask, rule(mask)), mask) for rule in _RULES]
    best = min(range(len(_RULES)), key=lambda index: differences[index])
    if differences[best] > (1e-4 if own.dtype in (torch.float32, torch.float64) else 2e-2):
        raise SequenceParallelError(
            f"{type(model).__name__} numbers its tokens in a way of its own, which a rank with a part of the sequence "
            f"cannot do: on a left-padded row its outputs differ by {differences[0]:.1e} (relative) from those with "
            f"positions counted by column, and by {differences[1]:.1e} from those counted by token."
        )
    return _RULES[best]


def _output(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
    told = {} if positions is None else {"position_ids": positions}
    return first_output(model(input_ids=ids, attention_mask=mask, use_cache=False, **told))


def first_output(outputs: Any) -> Tensor:
    """Return the logits, or whatever comes first: the hidden states of a backbone."""
    logits = getattr(outputs, "logits", None)
    return outputs[0] if logits is None else logits


def _difference(own: Tensor, other: Tensor, mask: Tensor) -> float:
    real = mask != 0
    return float((own - other)[real].abs().max() / own[real].abs().max().clamp(min=1e-30))


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients and without random numbers of the run; modes are put back."""
    training = {module: module.training for module in model.modules()}
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        model.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
