"""The hidden states of one forward, read by hooks: what the LM head is given, or the MLP of the last decoder layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RefusedError

#: largest difference, relative to the largest output, that counts as rounding where one token of another row changes
_ROUNDING = 1e-2
#: of the sequence that is forwarded once to find the MLP
PROBE_TOKENS = 4

#: Forwards token ids `(1, tokens)` through the policy.
Run = Callable[[Tensor], Any]


@contextlib.contextmanager
def captured_input(module: nn.Module, cut: Tensor | None = None) -> Iterator[list[Tensor]]:
    """
    Collect the first tensor that a module is called with, for each call.

    Args:
        cut (`torch.Tensor`, *optional*): Give the module itself only this position of each row, shape `(rows,)`: an LM
            head then makes no logits of the others.
    """
    found: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = _first_tensor(args, kwargs)
        if place is None:
            return None
        value = args[place] if isinstance(place, int) else kwargs[place]
        found.append(value)
        if cut is None or value.ndim != 3:
            return None
        kept = value[torch.arange(len(value), device=value.device), cut].unsqueeze(1)
        if isinstance(place, int):
            return (*args[:place], kept, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: kept}

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def lm_head(model: nn.Module) -> nn.Module:
    """
    Return the module that turns hidden states into logits.

    Raises:
        RefusedError: the model does not say which it is.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise RefusedError(
            f"{type(model).__name__} has no output embedding (get_output_embeddings() gives {head!r}), so that what "
            "its head reads cannot be found. Choose prompts by what was seen of them, e.g. with MoPPS."
        )
    return head


def last_mlp(model: nn.Module, run: Run, token_ids: Tensor) -> nn.Module:
    """
    Return the MLP of the last decoder layer: the part of it with two or more weight matrices that gives each token an
    output of the size of its input, and no token anything of another one. Found by two small forwards.

    Args:
        run (`Callable`): Forwards token ids without a gradient; every rank must call it equally often.
        token_ids (`torch.Tensor`): Any four of the vocabulary, shape `(1, 4)`.

    Raises:
        RefusedError: no part, or several, are like that.
    """
    layer = _last_layer(model)
    parts = {name: part for name, part in layer.named_children() if _matrices(part) >= 2}
    fitting = [name for name, part in parts.items() if _is_token_wise(part, run, token_ids)]
    if len(fitting) != 1:
        raise RefusedError(
            f"the MLP of the last layer of {type(model).__name__} ({type(layer).__name__}) was not found: of its "
            f"parts {', '.join(name for name, _ in layer.named_children()) or 'none'}, {len(fitting)} have weights "
            "and treat each token alone, and it must be one. Read layer='last', or give scores of your own as a "
            "column of the dataset."
        )
    return parts[fitting[0]]


def _last_layer(model: nn.Module) -> nn.Module:
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not stacks:
        raise RefusedError(f"{type(model).__name__} has no list of layers, so that its last MLP cannot be found.")
    found = max(stacks, key=lambda stack: sum(_size(weight) for weight in stack.parameters()))[-1]
    # What wraps a layer holds it as its only part.
    while len(children := list(found.children())) == 1 and not list(found.parameters(recurse=False)):
        found = children[0]
    return found


def _size(weight: Tensor) -> int:
    return int(getattr(weight, "ds_numel", weight.numel()))  # ZeRO-3 leaves an empty tensor on each rank


def _matrices(part: nn.Module) -> int:
    return sum(len(getattr(weight, "ds_shape", weight.shape)) >= 2 for weight in part.parameters())


def _is_token_wise(part: nn.Module, run: Run, token_ids: Tensor) -> bool:
    """Compare what the part gives with what it gives when its input of the first token alone is another one."""
    outputs: list[Any] = []
    shapes: list[Any] = []
    changed = False

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = _first_tensor(args, kwargs)
        if place is None:
            return None
        value = args[place] if isinstance(place, int) else kwargs[place]
        shapes.append(tuple(value.shape))
        if not changed:
            return None
        other = value.clone()
        other.reshape(-1, value.shape[-1])[0] = value.reshape(-1, value.shape[-1])[0].roll(1) + 1.0
        if isinstance(place, int):
            return (*args[:place], other, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: other}

    def after(_: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        outputs.append(first.detach().float().clone() if isinstance(first, Tensor) else None)

    handles = [part.register_forward_pre_hook(before, with_kwargs=True), part.register_forward_hook(after)]
    try:
        run(token_ids)
        changed = True  # from here on `before` moves the first token
        run(token_ids)
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != 2 or len(shapes) != 2 or any(output is None for output in outputs):
        return False
    one, two = outputs
    width = shapes[0][-1]
    if one.numel() != token_ids.numel() * width or one.shape != two.shape or one.shape[-1] != width:
        return False
    one, two = one.reshape(-1, width), two.reshape(-1, width)
    moved = float((one - two)[1:].abs().max())
    return moved <= _ROUNDING * float(one.abs().max()) and not torch.equal(one[0], two[0])


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Return the place of the first tensor of floating point numbers among the arguments of a call."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    return None
