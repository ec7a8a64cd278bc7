"""
The questions themselves: padding, the length of a call, a cache, packed documents, chance, rows that see each other.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._finding import ALLOWED, Finding, Results
from ._generators import Level
from ._inputs import _CannotLook, output_of, tiny_tokens
from ._reach import out_of_reach
from .probe import ONLY_ZEROS, Look, compare, contract, gradients, looking, said

#: `(prompt tokens, completion tokens)` of the rows of a probe: all offsets differ, and so do all lengths
_ROWS = ((3, 9), (8, 4), (5, 12))
#: settings that limit how far a token sees; on the tokens of a probe they would never show
_REACH = re.compile(r"(^|_)(window|chunk|capacity|topk)(_|$)")
#: how far beyond a model's own limit a call is tried, where the run sets none
_BEYOND = 4

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain_forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return what a model computes from tokens and a padding mask, as a Trainer calls it: no positions, no cache."""
    return output_of(call(model, input_ids, attention_mask))


def call(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
    """
    Return the outputs of a model for tokens, without a cache; an encoder-decoder gets the same tokens on both sides.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **more}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "labels" not in more:
        inputs["decoder_input_ids"] = input_ids
    taken = inspect.signature(model.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        inputs = {name: value for name, value in inputs.items() if name in taken or name == "input_ids"}
    if "input_ids" not in taken and "kwargs" not in taken:  # a module of its own, with names of its own
        return model(inputs.pop("input_ids"), **inputs)
    return model(**inputs)


#: models that ran with a label for each token: an error of such a one is an error
_took_labels: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def loss_and_gradients(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any
) -> Results:
    """
    Return the loss that a model computes itself (a router's included), its logits, and the gradients of the loss.

    Inside of a run of [`compare`]. Models without a loss of that kind give their outputs and the gradients of these.
    """
    labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    try:
        outputs = call(model, input_ids, attention_mask, labels=labels, **more)
        _took_labels.add(model)
    except Exception:  # no labels, or others: one per row, as classifiers have them
        if model in _took_labels:
            raise
        outputs = call(model, input_ids, attention_mask, **more)
    logits = output_of(outputs)
    loss = getattr(outputs, "loss", None)
    if loss is None:
        return {"the logits": logits, **gradients(model, contract(logits))}
    # Of the loss alone: beside all logits the share of a router's loss would be small.
    return {"the loss": loss, "the logits": logits, **gradients(model, loss)}


def loss_by_item_count(model: nn.Module) -> Finding:
    """
    Ask whether the loss of a model is a sum over tokens divided by `num_items_in_batch`: twice the number halves it.

    A model may take the number, among its keywords, and average over each call all the same.

    Args:
        model (`nn.Module`): The loaded model.
    """
    ids = tiny_tokens_or_none(model, 2, 6)
    if isinstance(ids, Finding):
        return ids

    def loss(model: nn.Module, count: int) -> Tensor:
        outputs = call(model, ids, labels=ids, num_items_in_batch=torch.tensor(count, device=ids.device))
        named = isinstance(outputs, Mapping)
        found = outputs.get("loss") if named else outputs[0] if isinstance(outputs, tuple) else None
        if found is None:
            raise _CannotLook(f"{type(model).__name__} returns no loss for labels")
        return found

    return compare(model, lambda m: {"the loss": loss(m, 7)}, lambda m: {"the loss": 2 * loss(m, 14)})


def moved_in_padding(model: nn.Module, forward: Forward = plain_forward, pad_token_id: int = 0) -> Finding:
    """
    Ask whether a row gives the same where it stands in a padded batch and on its own, at the left edge.

    Rows `[pad.. prompt completion pad..]`, as TRL lays them out, against the same tokens alone and without padding.
    Positions that count columns, states that run over padding, batch norm and capacity limits give another result.

    Args:
        model (`nn.Module`): A causal language model.
        forward (`Callable`, *optional*): `(model, input_ids, attention_mask)` to values `(rows, columns, ...)` by
            token.
        pad_token_id (`int`, *optional*, defaults to 0): What fills the padding.
    """
    prompts, completions = (max(part) for part in zip(*_ROWS, strict=True))
    lengths = [sum(row) for row in _ROWS]
    tokens = tiny_tokens_or_none(model, len(_ROWS), max(lengths))
    if isinstance(tokens, Finding):
        return tokens
    ids = torch.full((len(_ROWS), prompts + completions), pad_token_id, device=tokens.device)
    mask = torch.zeros_like(ids)
    places = []
    for row, ((prompt, _), length) in enumerate(zip(_ROWS, lengths, strict=True)):
        place = slice(prompts - prompt, prompts - prompt + length)
        ids[row, place], mask[row, place] = tokens[row, :length], 1
        places.append(place)

    def together(model: nn.Module) -> Results:
        with short_reach(model, max(lengths) // 2):
            out = forward(model, ids, mask)
        return _with_gradients(model, torch.cat([out[row, place] for row, place in enumerate(places)]))

    def alone(model: nn.Module) -> Results:
        with short_reach(model, max(lengths) // 2):
            rows = [tokens[row : row + 1, :length] for row, length in enumerate(lengths)]
            out = [forward(model, row, torch.ones_like(row))[0] for row in rows]
        return _with_gradients(model, torch.cat(out))

    return compare(model, together, alone)


def rows_see_each_other(model: nn.Module, forward: Forward = plain_forward) -> Finding:
    """
    Ask whether a row gives the same alone and among other rows (batch norm, the capacity of experts, outlier columns).

    Rows are of one length and without padding, so that nothing else is different.

    Args:
        model (`nn.Module`): The loaded model.
        forward (`Callable`, *optional*): As in [`moved_in_padding`].
    """
    tokens = tiny_tokens_or_none(model, 3, 10)
    if isinstance(tokens, Finding):
        return tokens

    def together(model: nn.Module) -> Results:
        with short_reach(model, 4):
            return _with_gradients(model, forward(model, tokens, torch.ones_like(tokens)))

    def alone(model: nn.Module) -> Results:
        with short_reach(model, 4):
            rows = [forward(model, row[None], torch.ones_like(row[None])) for row in tokens]
        return _with_gradients(model, torch.cat(rows))

    return compare(model, together, alone)


def _with_gradients(model: nn.Module, values: Tensor) -> Results:
    return {"the results by token": values, **gradients(model, values)}


def tiny_tokens_or_none(model: nn.Module, rows: int, length: int) -> Tensor | Finding:
    """Return token ids, or why there are none."""
    try:
        return tiny_tokens(model, rows, length)
    except _CannotLook as error:
        return Finding(None, reason=str(error))


@contextlib.contextmanager
def short_reach(model: nn.Module, tokens: int) -> Iterator[None]:
    """
    Let limits that a few tokens never meet (windows, chunks, capacities) be `tokens`, so that a short row shows them.

    The settings are integers called `...window...`, `...chunk...`, `...capacity...` or `...topk...` in configs and
    modules.
    """
    owners: dict[int, Any] = {
        id(o): o for m in model.modules() for o in (m, getattr(m, "config", None)) if hasattr(o, "__dict__")
    }
    for owner in list(owners.values()):
        text = owner.get_text_config() if hasattr(owner, "get_text_config") else owner
        owners[id(text)] = text
    changed = []
    for owner in owners.values():
        for name, value in list(vars(owner).items()):
            if type(value) is int and value > tokens and _REACH.search(name) and not name.startswith("max_"):
                changed.append((owner, name, value))
                vars(owner)[name] = tokens
    try:
        yield
    finally:
        for owner, name, value in changed:
            vars(owner)[name] = value


# --- positions that depend on the call -------------------------------------------------------------------------------


def length_dependent_positions(model: nn.Module, longest: int | None = None) -> Finding:
    """
    Ask whether the embedding of a position depends on how long the call is (dynamic NTK, longrope).

    The modules that embed positions are those that, in a tiny forward, are called with the positions and return
    floats. Each is called with a few positions alone, and with positions up to `longest` behind them.

    Args:
        model (`nn.Module`): The loaded model.
        longest (`int`, *optional*): Longest row of the run. By default 4 times what the model's config allows.
    """
    if reason := out_of_reach(model):
        return Finding(None, reason=reason)
    tokens = tiny_tokens(model, 1, 8)
    longest = longest or _BEYOND * max(_stated_lengths(model), default=2**15)
    worst = Finding(0.0, "the embeddings of positions", ALLOWED[torch.float32])
    try:
        with looking(model, None, with_graph=False):
            calls = _position_calls(model, tokens)
        for name, module, args, kwargs in calls:
            # A copy, on the CPU: a position past the end of a table would stop a GPU for good.
            args, kwargs = _on_cpu((args, kwargs))
            with torch.no_grad():
                worst = worst.worst(_length_gap(name, copy.deepcopy(module).to("cpu"), args, kwargs, longest))
    except _CannotLook as error:
        return Finding(None, reason=str(error))
    except Exception as error:  # whatever a model raises on input that it was not made for
        return Finding(None, reason=f"the model does not run on a few tokens: {said(error)}")
    return worst


def longest_exact_call(model: nn.Module) -> int | None:
    """
    Return up to how many tokens of a call the embeddings of positions stay what they are; `None`: for all that are
    tried.
    """
    low, high = 8, _BEYOND * max(_stated_lengths(model), default=2**15)
    if length_dependent_positions(model, high).equal:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if length_dependent_positions(model, middle).equal else (low, middle)
    return low


def _stated_lengths(model: nn.Module) -> list[int]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return [v for name in names if isinstance(v := getattr(text, name, None), int) and 0 < v < 2**22]


def _position_calls(model: nn.Module, tokens: Tensor) -> list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Return the modules that take the positions of a forward and return floats, with their arguments."""
    length = tokens.shape[1]
    found: dict[str, tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def is_positions(value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and not value.is_floating_point()
            and not value.is_complex()
            and value.dtype != torch.bool
            and value.shape[-1:] == (length,)
            and bool((value.reshape(-1, length) == torch.arange(length, device=value.device)).all())
        )

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            parts = output if isinstance(output, (tuple, list)) else [output]
            floats = parts and all(isinstance(p, Tensor) and (p.is_floating_point() or p.is_complex()) for p in parts)
            given = [*args, *kwargs.values()]
            hidden = [v for v in given if isinstance(v, Tensor) and v.is_floating_point()]
            if floats and any(map(is_positions, given)) and len(hidden) <= 1 and not list(module.children()):
                found[f"{name}({sorted((k, str(v)) for k, v in kwargs.items() if not isinstance(v, Tensor))})"] = (
                    name, module, args, kwargs,
                )  # fmt: skip

        return hook

    hooks = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in model.named_modules() if n]
    try:
        plain_forward(model, tokens, torch.ones_like(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (tuple, list)):
        return type(value)(_on_cpu(part) for part in value)
    return {key: _on_cpu(part) for key, part in value.items()} if isinstance(value, dict) else value


def _length_gap(name: str, module: nn.Module, args: Any, kwargs: Any, longest: int) -> Finding:
    """Compare the first positions of calls of several lengths."""

    def call(length: int, far: int | None = None) -> list[Tensor]:
        def longer(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            if value.is_floating_point():  # hidden states: asked for their dtype, their device, at most their length
                row = value.reshape(-1, value.shape[-1])[:1]
                return row.expand(value.shape[0], length, -1) if value.dim() == 3 else value
            positions = torch.arange(length, device=value.device, dtype=value.dtype)
            if far is not None:
                positions[-1] = far
            return positions.expand(*value.shape[:-1], length)

        out = module(*map(longer, args), **{key: longer(value) for key, value in kwargs.items()})
        return list(out) if isinstance(out, (tuple, list)) else [out]

    short = call(8)
    worst = 0.0
    calls = [(length, None) for length in (16, 2**10, 2**13) if length <= longest] + [(9, longest - 1)]
    for length, far in calls:
        try:
            longer_call = call(length, far)
        except Exception:  # past the end of a table, where the model itself would not run
            continue
        for a, b in zip(short, longer_call, strict=True):
            axis = next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)
            b = b if axis is None else b.narrow(axis, 0, a.shape[axis])
            a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
            worst = max(worst, ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item())
    return Finding(worst, f"the embeddings of the same positions ({name}) in calls of 8 and of up to {longest} tokens",
                   ALLOWED[torch.float32])  # fmt: skip


# --- chance ----------------------------------------------------------------------------------------------------------


def draws_random_numbers(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor] | None = None,
    within: Iterable[nn.Module] | None = None,
) -> Finding:
    """
    Ask whether two runs in training mode can differ: dropout in any form, layers that are skipped, noise in a router.

    All random operations of torch, Python's and numpy's generators, and those that modules own, are pushed to the low
    and to the high end of their range; a rate of zero makes no difference then, and any other does.

    Args:
        model (`nn.Module`): The loaded model.
        forward (`Callable`, *optional*): `model` to the result; by default the logits of a few tokens.
        within (`Iterable[nn.Module]`, *optional*): Ask for draws inside of these modules only.
    """
    within = None if within is None else list(within)
    if reason := out_of_reach(model):
        return Finding(None, reason=reason)
    if forward is None:
        tokens = tiny_tokens(model, 2, 12)

        def forward(model: nn.Module) -> Tensor:
            return output_of(call(model, tokens, torch.ones_like(tokens)))

    try:
        results: list[Tensor] = []
        drawn: dict[str, None] = {}
        for level in ("low", "high"):
            with looking(model, None, level if within is None else "middle", with_graph=False) as look:
                inside = None if within is None else _pin_within(look, within, level)
                results.append(forward(model).double())
                drawn |= dict.fromkeys([*look.draws.drawn, *look.others.moved()]) if inside is None else inside
    except _CannotLook as error:
        return Finding(None, reason=str(error))
    except Exception as error:  # whatever a model raises on input that it was not made for
        return Finding(None, reason=f"the model does not run on a few tokens: {said(error)}")
    one, other = results
    scale = torch.maximum(one.abs(), other.abs()).nan_to_num(0, 0, 0).max().item()
    gap = (one - other).abs().max().item()
    if not scale and not gap:
        return Finding(None, reason=ONLY_ZEROS)
    gap = gap / scale if scale and gap == gap else float(gap != 0)
    names = f" (random operations: {', '.join(drawn)})" if drawn else ""
    # The same operations on the same numbers: only kernels that add in any order leave a rest.
    allowed = 0.0 if one.device.type == "cpu" else 1e-2
    return Finding(gap, f"the results of two runs in training mode{names}", allowed, drawn=tuple(drawn))


def named_draws(model: nn.Module) -> dict[str, float]:
    """
    Return settings that look like a rate of dropout or noise, for a message; [`draws_random_numbers`] is what decides.
    """
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    for name, owner in [("config", getattr(model, "config", None)), *model.named_modules()]:
        for key, value in (vars(owner) if hasattr(owner, "__dict__") else {}).items():
            if isinstance(value, float) and 0 < value <= 1 and re.search("drop|jitter|noise", key):
                found.setdefault(f"{name}.{key}" if name else key, value)
    return dict(itertools.islice(found.items(), 6))


def _pin_within(look: Look, modules: Iterable[nn.Module], level: Level) -> dict[str, None]:
    """Push draws to `level` while one of the modules runs; return what will be the names of those draws."""
    drawn: dict[str, None] = {}

    def enter(module: nn.Module, args: Any) -> None:
        look.draws.level, look.draws.drawn = level, drawn
        look.others.hold(level)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        drawn.update(dict.fromkeys(look.others.moved()))
        look.draws.level, look.draws.drawn = "middle", {}
        look.others.hold("middle")

    for module in modules:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    return drawn
