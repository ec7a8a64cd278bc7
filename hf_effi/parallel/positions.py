"""Which positions a model gives its tokens when it is told none: measured, because a shard cannot make them itself."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from ..patching import ALLOWED, dtypes_to_try, looking, out_of_reach, output_of, tiny_tokens

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
    model's. Measured once for each model instance: at most three forwards of 2 x 8 tokens, without gradients.

    Args:
        model (`nn.Module`): What is called with `input_ids` and `attention_mask`, whole (every rank calls it alike).

    Raises:
        RefusedError: neither rule gives the model's own outputs, with the measured differences.
    """
    if model not in _known:
        _known[model] = _measure(model)
    return _known[model]


def _measure(model: nn.Module) -> PositionRule:
    ids = tiny_tokens(model, 2, _LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    differences = []
    with as_it_is_or_wide(model) as allowed:
        own = _output(model, ids, mask)
        for rule in _RULES:
            differences.append(difference(own, _output(model, ids, mask, rule(mask)), mask))
            if differences[-1] <= allowed:
                return rule
    raise RefusedError(
        f"{type(model).__name__} numbers its tokens in a way of its own, which a rank with a part of the sequence "
        f"cannot do: on a left-padded row its outputs differ by {differences[0]:.1e} (relative) from those with "
        f"positions counted by column, and by {differences[1]:.1e} from those counted by token."
    )


def _output(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
    told = {} if positions is None else {"position_ids": positions}
    return output_of(model(input_ids=ids, attention_mask=mask, use_cache=False, **told))


@contextlib.contextmanager
def as_it_is_or_wide(model: nn.Module) -> Iterator[float]:
    """
    The conditions of a probe, without gradients: in double precision; single where weights are packed; as they are,
    sharded.

    Yields:
        `float`: The largest relative difference that is rounding.
    """
    dtypes = {weight.dtype for weight in model.parameters()}
    # Sharded weights are whole only inside of the forward, in whatever dtype they have there.
    dtype = None if out_of_reach(model) is not None else dtypes_to_try(model)[0]
    if dtype is None:
        allowed = 5e-2 if dtypes & {torch.float16, torch.bfloat16} else 1e-4
    else:
        allowed = ALLOWED[dtype]
    with looking(model, dtype, with_graph=False):
        yield allowed


def difference(own: Tensor, other: Tensor, mask: Tensor) -> float:
    """
    Return the largest difference on real tokens, relative to the largest output; infinity where one is not finite.
    """
    real = mask != 0
    gap = (own - other)[real].abs().max() / own[real].abs().max().clamp(min=1e-30)
    return float(gap.nan_to_num(nan=torch.inf))
