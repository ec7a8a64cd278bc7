"""
Small measured questions about a loaded model: what a feature that promises equality asks once, when it is switched on.

A list of class names knows the models of its day. A probe runs the model itself on a few made-up tokens, twice, in two
ways that ought to be equal, and measures how far apart the results are. How it looks is chosen so that neither
rounding nor chance can be taken for an answer:

- In training mode, because that is the mode the promise is about: batch norm and capacity limits show themselves, and
  bitsandbytes does not repack its weights. Random operations have one fixed outcome (dropout keeps everything), so
  that the two runs can be compared at all. [`draws_random_numbers`] asks about the draws themselves.
- In double precision, operation by operation, whatever dtype the weights have: half precision rounds away an effect of
  one percent and makes equal things differ by as much. What does not run in double precision runs in single precision;
  a model that runs in half precision only is reported as one that could not be looked at.
- With parameters that are all zero filled, such as a fresh LoRA's `B`: they would hide what training will show.
- Without a trace: generators, buffers, attributes, gradients, flags and hooks are afterwards as they were
  (`untouched`).

Every question returns a [`Finding`]. A model that cannot be looked at is never called equal.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._draws import PinnedDraws
from ._finding import Finding, Results, gap_of, named_results, show_nothing
from ._generators import HeldGenerators, Level
from ._inputs import _CannotLook
from ._reach import dtypes_to_try, out_of_reach, precision_of
from ._wide import Wide
from .state import set_mode, untouched

#: parameters whose gradients are compared: all of a small model, of a large one the small ones of every layer
_GRADIENT_ELEMENTS = 2**25

ONLY_ZEROS = "all that the model gives is zero, which shows nothing"

Run = Callable[[nn.Module], Results]


@dataclass
class Look:
    """
    The probe that is running.

    Args:
        dtype (`torch.dtype`, *optional*): Of all operations; `None`: as they are.
        draws ([`PinnedDraws`]): The random operations that were met are in its `drawn`.
        others ([`HeldGenerators`]): Python's and numpy's generators.
        watched (`dict[str, nn.Parameter]`): Parameters whose gradients are results.
        embedded (`list[tuple[Tensor, Tensor]]`): Ids and embeddings of each call so far.
    """

    dtype: torch.dtype | None
    draws: PinnedDraws
    others: HeldGenerators
    watched: dict[str, nn.Parameter]
    embedded: list[tuple[Tensor, Tensor]] = field(default_factory=list)


_now: Look | None = None


def probing() -> bool:
    """Whether a probe is running: code that has a kernel for half precision only takes its reference then."""
    return _now is not None


@contextlib.contextmanager
def looking(
    model: nn.Module,
    dtype: torch.dtype | None,
    level: Level = "middle",
    training: bool = True,
    with_graph: bool = True,
) -> Iterator[Look]:
    """
    The conditions of a probe: draws at `level`, operations in `dtype`, no autocast; afterwards no trace.

    Args:
        model (`nn.Module`): The loaded model.
        dtype (`torch.dtype`, *optional*): Of all floating-point operations; `None`: as they are.
        level (`str`, *optional*, defaults to `"middle"`): What random operations give.
        training (`bool`, *optional*, defaults to `True`): The mode.
        with_graph (`bool`, *optional*, defaults to `True`): Whether there will be gradients; a graph takes memory.
    """
    global _now
    outer = _now
    device = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        look = Look(dtype, PinnedDraws(level), HeldGenerators(model), _watched(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(with_graph))  # leaving inference mode switches it on
        set_mode(model, training)
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.__dict__["gradient_checkpointing"] = False  # reentrant, it knows no `torch.autograd.grad`
        with contextlib.suppress(Exception):  # no embeddings, or none to be found: their gradient is left out
            wanted: Any = model  # modules of transformers have this method
            wanted.get_input_embeddings().register_forward_hook(functools.partial(_keep_embedded, look))
        _fill_zeros(model)
        look.others.hold(level)
        stack.enter_context(torch.autocast(device, enabled=False))
        if dtype is not None:
            _without_flash(model)
            look.watched = _in_place_of(model, look.watched, dtype)
            wide = Wide(dtype)
            stack.enter_context(wide.saving())
        stack.enter_context(look.draws)
        if dtype is not None:
            stack.enter_context(wide)
        _now = look
        try:
            yield look
        finally:
            _now = outer


def _without_flash(model: nn.Module) -> None:
    """Flash attention takes half precision only: what the model hands to it is asked of SDPA."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if "flash" in str(getattr(config, "_attn_implementation", None)):
            name = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
            vars(config)["_attn_implementation_internal"] = name


def _in_place_of(model: nn.Module, watched: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """
    Put other parameters in `dtype` in the place of the watched ones: in half precision a leaf rounds at each of its
    uses.

    The parameters themselves are left alone: a change of dtype by `.data` replaces the node that accumulates their
    gradient, and with it go the hooks by which DDP and ZeRO reduce it, without a word.
    """
    wide = {id(p): nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in watched.values() if p.dtype != dtype}
    for parameter in watched.values():
        if id(parameter) in wide:
            vars(wide[id(parameter)]).update(vars(parameter))
    for module in model.modules():
        for name, held in list(module._parameters.items()):
            if id(held) in wide:
                setattr(module, name, wide[id(held)])  # recurrent layers keep a list of them as well
    return {name: wide.get(id(p), p) for name, p in watched.items()}


@torch.no_grad()
def _fill_zeros(model: nn.Module) -> None:
    """
    Give parameters that are all zero other values, as training will: they switch off what is behind them.

    A fresh LoRA's `B`, or a gate that begins at zero, would hide dropout and positions alike.
    """
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
        if plain and 0 < parameter.numel() <= _GRADIENT_ELEMENTS and not parameter.any():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.data = (_directions(parameter) * scale).to(parameter.dtype)


def _directions(tensor: Tensor) -> Tensor:
    """Return fixed numbers in [-1, 1], in single precision and in the shape of a tensor."""
    places = torch.arange(1, tensor.numel() + 1, device=tensor.device, dtype=torch.float32)
    return torch.sin(places * 12.9898).view(tensor.shape)


def _watched(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters from the smallest on, as many as are cheap to have in double precision."""
    found = [(p.numel(), i, n, p) for i, (n, p) in enumerate(model.named_parameters()) if p.requires_grad]
    sizes = itertools.accumulate(size for size, *_ in sorted(found))
    chosen = [entry for entry, total in zip(sorted(found), sizes, strict=True) if total <= _GRADIENT_ELEMENTS]
    return {n: p for _, _, n, p in chosen if type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta}


def _keep_embedded(look: Look, module: nn.Module, args: Any, output: Any) -> Any:
    """
    Note what the tokens were embedded as: its gradient has run through the whole model, also where that is frozen.
    """
    if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and torch.is_grad_enabled()):
        return None
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    look.embedded.append((args[0], output))
    return output


def compare(
    model: nn.Module,
    one: Run,
    other: Run,
    *,
    level: Level = "middle",
    training: bool = True,
    with_graph: bool = True,
) -> Finding:
    """
    Measure how far two ways of running a model are apart.

    The first way is run twice: a model that does not give one answer to one question is not looked at. The gap of a
    result is `max |a - b| / max |a|`; names of results that only one of the two gives are a difference.

    Args:
        model (`nn.Module`): The loaded model.
        one, other (`Callable`): Called with `model`; each returns a tensor or tensors by name. Gradients are results,
            from [`gradients`]. [`_CannotLook`] ends the question with a reason.
        level (`str`, *optional*, defaults to `"middle"`): What random operations give: `"low"` shows dropout of which
            one of the two knows nothing.
        training (`bool`, *optional*, defaults to `True`): The mode.
        with_graph (`bool`, *optional*, defaults to `True`): `False` where no gradient is a result: it takes less
            memory.

    Returns:
        [`Finding`]: of the result that differs most.

    Example:
    ```python
    tokens = tiny_tokens(model, rows=2, length=12)
    found = compare(model, lambda m: m(input_ids=tokens).logits, lambda m: m(input_ids=tokens.flip(0)).logits.flip(0))
    if not found.equal:
        raise ValueError(f"Rows see each other: {found}.")
    ```
    """
    if reason := out_of_reach(model):
        return Finding(None, reason=reason)
    failure, unsteady = None, None
    for dtype in dtypes_to_try(model):
        failed, conditions = False, (dtype, level, training, with_graph)
        try:
            first, _ = _results(model, one, conditions)
            again, ran_out = _results(model, one, conditions)
            precision = precision_of(dtype, first)
            once_more = gap_of(first, again, precision)
            if not once_more.looked:
                return once_more
            if not once_more.equal:
                reason = f"the model does not give one answer, two runs of one and the same way differ in {once_more}"
                unsteady = Finding(None, reason=reason)
                continue
            del again  # gradients of a large model are large
            failed = True
            second, also_out = _results(model, other, conditions)
            found = gap_of(first, second, precision)
            if found.equal and show_nothing(first):
                return Finding(None, reason=ONLY_ZEROS)
            if not found.equal and unsteady is not None:
                return unsteady  # the two were the same by chance
            return _unless_drawn(found, [*ran_out, *also_out])
        except _CannotLook as error:
            return Finding(None, reason=str(error))
        except Exception as error:  # whatever a model raises on input that it was not made for
            running = "" if failed else "the model does not run on a few tokens: "
            failure = Finding(None, reason=f"{running}{said(error)}", failed=failed)
    return cast(Finding, unsteady or failure)  # there is always a dtype to try


def _results(model: nn.Module, run: Run, conditions: tuple[Any, ...]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the results of a run, and the generators whose numbers could not be held still in it."""
    with looking(model, *conditions) as look:
        return named_results(run(model)), look.others.ran_out()


def _unless_drawn(found: Finding, generators: Sequence[str]) -> Finding:
    """A difference may be one of the numbers that were drawn."""
    if found.equal or not generators:
        return found
    names = ", ".join(dict.fromkeys(generators))
    return Finding(None, reason=f"the model draws from {names}, other numbers in each of the two ways")


def said(error: Exception) -> str:
    """Return what an error says, with its kind where that is no message of ours."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error)[:400].split()).rstrip('.')}"


#: the answers so far, by model and question: once its weights are sharded, a model cannot be asked again
_answers: weakref.WeakKeyDictionary[nn.Module, dict[Any, Finding]] = weakref.WeakKeyDictionary()


def remembered(model: nn.Module, key: Any, ask: Callable[[], Finding]) -> Finding:
    """
    Ask, and keep the answer; where the model cannot be looked at, return what it was when it could.

    Args:
        model (`nn.Module`): The loaded model.
        key (hashable): The question, with all that the answer depends on.
        ask (`Callable`): Asks it.
    """
    found = ask()
    if found.looked:
        _answers.setdefault(model, {})[key] = found
    return found if found.looked else _answers.get(model, {}).get(key, found)


def gradients(model: nn.Module, loss: Tensor, also: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """
    Return gradients as results for [`compare`], inside of one of its runs; nothing is written to `.grad`.

    Those of the parameters (of a large model the smaller ones: norms, biases, routers, adapters, up to 32 million
    numbers) and that of the embedded tokens, added up for each token id, which does not depend on how rows are laid
    out.

    Args:
        model (`nn.Module`): Whose parameters.
        loss (`Tensor`): A scalar of the forward, or a tensor, which is contracted with fixed numbers.
        also (`Sequence[Tensor]`, *optional*): Leaves that get their gradient added to `.grad`, as a backward would.
    """
    look = _now
    if look is None:
        raise RuntimeError("gradients() belongs into a run of compare().")
    if not loss.requires_grad:
        return {}
    embedded = [(ids, values) for ids, values in look.embedded if values.requires_grad]
    watched = {name: p for name, p in look.watched.items() if p.requires_grad}  # a forward may freeze some
    inputs = [*watched.values(), *(values for _, values in embedded), *also]
    found = list(torch.autograd.grad(contract(loss), inputs, allow_unused=True)) if inputs else []
    for leaf, grad in zip(also, found[len(inputs) - len(also) :], strict=True):
        if grad is not None:
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
    of_weights, of_tokens = found[: len(watched)], found[len(watched) : len(inputs) - len(also)]
    results = {
        f"the gradient of {name}": torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(watched.items(), of_weights, strict=True)
    }
    parts = [(ids, grad) for (ids, _), grad in zip(embedded, of_tokens, strict=True) if grad is not None]
    if parts:
        ids = torch.cat([ids.reshape(-1) for ids, _ in parts])
        rows = torch.cat([grad.reshape(-1, grad.shape[-1]) for _, grad in parts])
        with torch._C.DisableTorchFunction():
            sums = torch.sparse_coo_tensor(ids[None], rows, (2**32, rows.shape[-1]), check_invariants=False).coalesce()
        results["the gradient of the embedded tokens"] = sums
    return results


def contract(tensor: Tensor) -> Tensor:
    """Return a scalar: the sum of a tensor's entries times fixed numbers in [-1, 1], so that every entry counts."""
    with torch._C.DisableTorchFunction():
        weights = _directions(tensor)
    return (tensor * weights.to(tensor.dtype)).sum()
