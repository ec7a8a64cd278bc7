"""Random layerwise token dropping as a patch: middle layers process a random subset of the tokens in training."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .._compat import CACHE_ARGUMENTS
from ..errors import RefusedError
from ..functional.probes import is_probed
from ..functional.random_ltd import draw_kept, layer_tokens, uniform_scores
from ..patching.handle import PatchHandle

#: how the masks of these can be cut: a 4D mask, or none at all for plain causal attention
_ATTENTION = ("sdpa", "eager")


class TokenDropping:
    """
    What the patched layers of one model share: the tokens to keep and the key of the draw, moved by the training loop.

    The subset is a function of `(seed, step, micro_step, layer, rank)`, so that a resumed run draws as the
    uninterrupted one and a layer that is recomputed in the backward pass sees the same tokens.

    Args:
        seed (`int`): Seed of all draws.
        rank (`int`, *optional*, defaults to `0`): The process; each draws its own subsets.

    Attributes:
        kept (`int` or `None`): Tokens of a sequence that a middle layer processes; `None` for all.
        step (`int`): The update in progress.
        micro_step (`int`): The micro-batch of that update.
        layer_tokens (`int`): Layer-tokens that this process has trained on.
        full_layer_tokens (`int`): The same if nothing had been dropped.
    """

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed, self.rank = seed, rank
        self.kept: int | None = None
        self.step = self.micro_step = 0
        self.layer_tokens = self.full_layer_tokens = 0

    def count(self, batch: int, length: int, num_layers: int) -> None:
        """Add a forward pass to the counters."""
        kept = length if self.kept is None else self.kept
        self.layer_tokens += layer_tokens(batch, length, kept, num_layers, num_layers - 2)
        self.full_layer_tokens += batch * length * num_layers

    def draw(self, layer: int, hidden_states: Tensor, real: Tensor | None) -> Tensor:
        """Return the kept positions in `layer`, of shape `(batch, kept)`."""
        batch, length = hidden_states.shape[:2]
        scores = uniform_scores(batch, length, self.seed, self.step, self.micro_step, layer, self.rank)
        kept = cast(int, self.kept)  # a layer draws only while tokens are dropped
        return draw_kept(scores.to(hidden_states.device), kept, real)


def drop_layer_tokens(model: nn.Module, dropping: TokenDropping) -> PatchHandle:
    """
    Let all layers of `model` but the first and the last process the tokens that `dropping` keeps, in training mode.

    The other tokens pass by: `y = x; y[kept] = layer(x[kept])`, with the attention mask and the position embeddings of
    the kept tokens. Nothing changes in evaluation mode, or where a sequence has no more than `dropping.kept` tokens.

    Random-LTD, arXiv:2211.11586.

    Args:
        model (`nn.Module`): A model of transformers with one stack of at least 3 layers and `sdpa` or `eager`
            attention.
        dropping ([`TokenDropping`]): Set `kept`, `step` and `micro_step` on it before each forward pass.

    Returns:
        [`~hf_effi.patching.handle.PatchHandle`]: Its `revert()` undoes the patch exactly.

    Raises:
        RefusedError: the model has another number of stacks, too few layers, another attention or a router loss.

    Example:
    ```python
    dropping = TokenDropping(seed=42)
    with drop_layer_tokens(model, dropping):
        dropping.kept = 512
        model(**batch).loss.backward()
    ```
    """
    name, layers = _layer_stack(model)
    _check_config(model)
    _check_layers(layers)
    handle = PatchHandle("drop_layer_tokens")
    for index in range(1, len(layers) - 1):
        forward = functools.partial(_forward, layers[index], index, len(layers), dropping)
        handle.replace(f"{name}.{index}", layers[index], "forward", forward)
    return handle


def _layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(stacks) != 1:
        found = ", ".join(name for name, _ in stacks) or "none"
        raise RefusedError(
            f"random-LTD needs a model of transformers with one stack of layers; {type(model).__name__} has {found}."
        )
    if len(stacks[0][1]) < 3:
        raise RefusedError(
            f"random-LTD leaves the first and the last layer alone, and {type(model).__name__} has only "
            f"{len(stacks[0][1])}. At least 3 are needed."
        )
    return stacks[0]


def _check_config(model: nn.Module) -> None:
    config: Any = next(module.config for module in model.modules() if hasattr(module, "config"))
    if config._attn_implementation not in _ATTENTION:
        raise RefusedError(
            f"random-LTD cuts the mask of {' or '.join(_ATTENTION)} attention, and this model uses "
            f"{config._attn_implementation!r}, which reads boundaries from positions. Set attn_implementation='sdpa'."
        )
    if getattr(config, "output_router_logits", False):
        raise RefusedError(
            "output_router_logits=True: the router loss expects every token in every layer. Set it to False in the "
            "config."
        )


def _check_layers(layers: nn.ModuleList) -> None:
    for kind in dict.fromkeys(map(type, layers)):
        names = list(inspect.signature(cast(type[nn.Module], kind).forward).parameters)
        if "hidden_states" not in names:
            raise RefusedError(
                f"{kind.__name__} takes {', '.join(names[1:])}, and random-LTD cuts the hidden_states of a layer."
            )


def _forward(layer: nn.Module, index: int, num_layers: int, dropping: TokenDropping, *args: Any, **kwargs: Any) -> Any:
    # The class's forward, so that checkpointing stays inside of it and does not repeat the draw.
    forward = type(layer).forward
    if not layer.training:
        return forward(layer, *args, **kwargs)
    names = list(inspect.signature(forward).parameters)[1:]
    call = dict(zip(names, args, strict=False)) | kwargs
    hidden_states = call.pop("hidden_states")
    batch, length = hidden_states.shape[:2]
    if index == 1 and not is_probed(layer):
        dropping.count(batch, length, num_layers)
    if dropping.kept is None or dropping.kept >= length:
        return forward(layer, *args, **kwargs)
    kept = dropping.draw(index, hidden_states, _real_tokens(call.get("attention_mask"), batch))
    rows = kept.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
    output = forward(layer, hidden_states.gather(1, rows), **{k: _cut(k, v, kept, length) for k, v in call.items()})
    if not isinstance(output, Tensor):
        raise RefusedError(f"{type(layer).__name__} returns a {type(output).__name__}; random-LTD needs one tensor.")
    return hidden_states.scatter(1, rows, output)


def _real_tokens(mask: Tensor | None, batch: int) -> Tensor | None:
    """Return which tokens may see themselves, `(batch, length)`: padding may not. `None` where there is no mask."""
    if mask is None:
        return None
    if mask.ndim != 4:
        raise RefusedError(f"an attention mask of {mask.ndim} dimensions; random-LTD cuts masks of 4.")
    diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(batch, -1)
    return diagonal if mask.dtype == torch.bool else diagonal == 0


def _cut(name: str, value: Any, kept: Tensor, length: int) -> Any:
    """Return one argument of the layer for the kept tokens only."""
    if name in CACHE_ARGUMENTS and value is not None:
        raise RefusedError("random-LTD cannot fill a KV cache with missing tokens. Train with use_cache=False.")
    if name == "attention_mask" and value is not None:
        return _cut_mask(value, kept)
    if name == "position_embeddings" and isinstance(value, tuple):
        return tuple(_cut_rows(part, kept) for part in value)
    if name == "position_ids" and value is not None:
        return _cut_rows(value, kept)
    if isinstance(value, (tuple, list, dict)) or (isinstance(value, Tensor) and value.ndim > 0):
        raise RefusedError(
            f"a layer is given {name}, and random-LTD does not know which part of it belongs to which of {length} "
            "tokens. With packed rows, pass position_ids and leave sequence boundaries (cu_seq_lens) out."
        )
    return value


def _cut_rows(value: Tensor, kept: Tensor) -> Tensor:
    """Return `value[b, kept[b]]` of `(batch or 1, length, ...)`."""
    value = value.expand(len(kept), *value.shape[1:])
    return value[torch.arange(len(kept), device=kept.device).unsqueeze(1), kept]


def _cut_mask(mask: Tensor, kept: Tensor) -> Tensor:
    """Return rows and columns `kept[b]` of a mask of shape `(batch or 1, heads or 1, length, length)`."""
    batch, count = kept.shape
    mask = mask.expand(batch, *mask.shape[1:])
    heads, length = mask.shape[1], mask.shape[3]
    mask = mask.gather(2, kept[:, None, :, None].expand(batch, heads, count, length))
    return mask.gather(3, kept[:, None, None, :].expand(batch, heads, count, count))
