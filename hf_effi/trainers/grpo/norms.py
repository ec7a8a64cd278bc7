"""Which parameters of a model scale a normalised input: measured, since norms have as many names as models."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import RefusedError
from ...patching import call, looking, out_of_reach, tiny_tokens

#: rows and tokens of the forward that shows what a layer is given
_ROWS, _TOKENS = 2, 16
#: what two equal results may differ by, relative to their size: a norm adds an epsilon to the mean square
_TOLERANCE = 1e-3


def find_norms(model: nn.Module, head_norms: bool = False) -> dict[str, nn.Parameter]:
    """
    Return the scales of the normalisation layers that a model runs through, by name, each parameter once.

    A layer counts where its output is `scale * n(x) + rest`, with `n(x)` the input, or the input minus its mean,
    divided by its size: RMSNorm, LayerNorm with or without a bias, norms with the scale `1 + weight`. It is asked by
    calls on a made-up input, under a copy of its weights. Hidden states are what most norms of the model are given in
    one forward, of those without an axis of heads.

    Args:
        model (`nn.Module`): Loaded and whole, not sharded; adapters may be on it.
        head_norms (`bool`, *optional*, defaults to `False`): Also norms that are given something else than the hidden
            states: of queries and keys (`(rows, heads, tokens, width)`), or of a low-rank projection.

    Raises:
        RefusedError: sharded weights, a model that does not run on a few tokens, or no such layer.
    """
    if reason := out_of_reach(model):
        raise RefusedError(f"the normalisation layers cannot be measured: {reason}. Use DDP or ZeRO-2.")
    try:
        with looking(model, None, with_graph=False):
            scales = {name: (module, scale) for name, module in model.named_modules() if (scale := scale_of(module))}
            seen = _shapes_seen(model, {name: module for name, (module, _) in scales.items()})
    except Exception as error:  # whatever a model says of a few tokens
        raise RefusedError(
            f"the normalisation layers of {type(model).__name__} cannot be measured: it does not run on {_TOKENS} "
            f"tokens ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Drop rollout_noise=."
        ) from error
    # Hidden states have no axis of heads, and more norms are given them than a projection of another width.
    flat = {name: {shape[-1] for shape in shapes} for name, shapes in seen.items() if max(map(len, shapes)) <= 3}
    hidden = {width for width, _ in Counter(itertools.chain(*flat.values())).most_common(1)}
    found: dict[str, nn.Parameter] = {}
    for name, (module, scale) in scales.items():
        parameter = dict(module.named_parameters(recurse=False))[scale]
        wanted = name in seen and (head_norms or flat.get(name) == hidden)
        if wanted and not any(parameter is other for other in found.values()):
            found[f"{name}.{scale}"] = parameter
    if not found:
        raise RefusedError(
            f"{type(model).__name__} has no layer that scales its normalised hidden states by a parameter, so that "
            "there is nothing to add the noise to. Drop rollout_noise="
            + ("." if head_norms else ", or use head_norms=True.")
        )
    return found


def _shapes_seen(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes of what layers are given in one forward; one that is not called is absent."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    names = {id(module): name for name, module in modules.items()}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None:
            seen.setdefault(names[id(module)], set()).add(tuple(given.shape))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules.values()]
    try:
        tokens = tiny_tokens(model, _ROWS, _TOKENS)
        call(model, tokens, torch.ones_like(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def scale_of(module: nn.Module) -> str | None:
    """
    Return the name of the parameter by which a layer scales its normalised input, or `None` for another layer.

    With `f_w(x)` the layer under weight `w`, the slope `n = f_{w+1}(x) - f_w(x)` must not depend on `w`, must be the
    same for `4 x`, and must point along `x` or along `x - mean(x)` in each row.

    Example:
    ```python
    >>> scale_of(nn.LayerNorm(8)), scale_of(nn.RMSNorm(8)), scale_of(nn.Linear(8, 1)), scale_of(nn.PReLU(8))
    ('weight', 'weight', None, None)
    ```
    """
    own = dict(module.named_parameters(recurse=False))
    if not own or next(module.children(), None) is not None:
        return None
    if any(p.dim() != 1 or p.is_meta or not p.is_floating_point() for p in own.values()):
        return None
    widths = {p.numel() for p in own.values()}
    if len(widths) != 1 or (width := widths.pop()) < 4:
        return None
    values = {name: p.detach().float() for name, p in own.items()}
    places = torch.arange(1, 6 * width + 1, dtype=torch.float32, device=next(iter(own.values())).device)
    inputs = 16 * torch.sin(places * 12.9898).view(2, 3, width) + 4
    for name in own:
        with contextlib.suppress(Exception):  # a layer that takes something else is no norm
            if _scales(module, values, name, inputs):
                return name
    return None


@torch.no_grad()
def _scales(module: nn.Module, values: dict[str, Tensor], name: str, inputs: Tensor) -> bool:
    def slope(inputs: Tensor, by: float = 1.0) -> Tensor:
        moved = functional_call(module, {**values, name: values[name] + by}, (inputs,))
        return (moved - functional_call(module, values, (inputs,))) / by

    found = slope(inputs)
    if found.shape != inputs.shape or not bool(found.isfinite().all()) or not bool(found.any()):
        return False
    size = float(found.abs().max())
    others = (slope(4 * inputs), slope(inputs, by=2.0))
    same = [bool((other - found).abs().max() <= _TOLERANCE * size) for other in others]
    along = [
        bool((F.cosine_similarity(found, direction, dim=-1) > 1 - _TOLERANCE).all())
        for direction in (inputs, inputs - inputs.mean(-1, keepdim=True))
    ]
    return all(same) and any(along)
