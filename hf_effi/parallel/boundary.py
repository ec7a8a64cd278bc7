"""Where a model's inputs are split and its outputs joined: temporary hooks on the model that a trainer calls."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import RefusedError
from ..functional.sequence import LAYOUT, shard_sequence
from .checks import attention_layers
from .exchange import GatherGradient
from .groups import SequenceGroup
from .layout import SequenceLayout, split_batch
from .positions import PositionRule, position_rule


@contextlib.contextmanager
def sharded_forward(model: nn.Module, layout: SequenceLayout) -> Iterator[None]:
    """
    Let `model`, called with the shard that `split_batch` made, attend over the whole sequence.

    Outputs stay local: the caller's loss must be a sum over distinct tokens divided by a global count.
    """

    rule = position_rule(model)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        return (), _model_inputs(layout, _named(module, args, kwargs), rule)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _check_entered(module, layout)

    with _hooks([model], before, after):
        yield


@contextlib.contextmanager
def gathered_forward(models: Iterable[nn.Module], group: SequenceGroup, gradient: GatherGradient) -> Iterator[None]:
    """
    Let each model, called with the whole batch, compute on its shard and return the whole outputs.

    Args:
        models (`Iterable[nn.Module]`): Policy and reference models, unwrapped; one that is named twice counts once. A
            sequence classifier is split at its backbone: its head pools over whole hidden states.
        group ([`SequenceGroup`]): The ranks of the sequence, which call with the same batch.
        gradient (`str`): `"sum"` for replicated batches, `"slice"` for rounds; see [`gather_sequence`].
    """
    points = [(model, split_point(model)) for model in {id(model): model for model in models}.values()]
    rules = {
        point: position_rule(point) for _, point in points
    }  # before the hooks, which these forwards must not meet
    if gradient == "slice" and torch.is_grad_enabled() and any(point is not model for model, point in points):
        raise RefusedError(
            "A sequence classifier cannot be trained in rounds: its head runs on whole hidden states, so that every "
            "rank would add the whole gradient of the head in every round. Use sequence_parallel_mode='replicated'."
        )
    open_calls: list[tuple[SequenceLayout, int]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        inputs = _named(module, args, kwargs)
        fused = bool(inputs.get("fused_lm_head"))
        if inputs.get("labels") is not None and not fused:
            raise RefusedError(
                "The model was called with labels and returns their mean loss, which cannot be joined from shards. "
                "Use sequence_parallel_mode='token' for such a trainer."
            )
        layout, shard = split_batch(inputs, group)
        # TRL scores all positions of pre-shifted labels; called with labels it returns one column less.
        open_calls.append((layout, layout.length - 1 if fused and "labels" in shard else layout.length))
        return (), _model_inputs(layout, shard, rules[module])

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        layout, length = open_calls.pop()
        _check_entered(module, layout)
        return layout.gather(output, gradient, length)

    with _hooks([point for _, point in points], before, after):
        yield


def split_point(model: nn.Module) -> nn.Module:
    """Return the module whose inputs and outputs are per token: the model, or a sequence classifier's backbone."""
    wrapped: Any = model
    base: Any = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model if type(base).__name__.endswith("ForSequenceClassification") else model


@contextlib.contextmanager
def _hooks(modules: Iterable[nn.Module], before: Any, after: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _model_inputs(layout: SequenceLayout, shard: dict[str, Any], rule: PositionRule) -> dict[str, Any]:
    if layout.padding_mask is not None:
        positions = rule(layout.padding_mask)
        shard = {**shard, "position_ids": shard_sequence(positions, layout.group.size, layout.group.rank)}
    # transformers passes a 4-d mask through as it is, and so builds none for the shard; the dispatcher ignores it.
    stub = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=layout.documents.device)
    layout.inputs |= set(shard)
    return {**shard, "attention_mask": stub, "use_cache": False, LAYOUT: layout}


def _check_entered(module: nn.Module, layout: SequenceLayout) -> None:
    missed = [name for name, layer in attention_layers(module).items() if id(layer) not in layout.entered]
    if missed:
        raise RefusedError(
            f"Sequence parallelism is not active in {', '.join(missed[:3])} ({len(missed)} layers): their attention "
            "did not go through transformers' attention interface, so each rank would attend to its own part only."
        )
