"""
Small measured questions about a loaded model: what a feature that promises equality asks once, when it is switched on.

A list of class names knows the models of its day. A probe runs the model itself on a few made-up tokens, twice, in two ways
that ought to be equal, and measures how far apart the results are. How it looks is chosen so that neither rounding nor chance
can be taken for an answer:

- In training mode, because that is the mode the promise is about: batch norm and capacity limits show themselves, and
  bitsandbytes does not repack its weights. Random operations have one fixed outcome (dropout keeps everything), so that the
  two runs can be compared at all. [`draws_random_numbers`] asks about the draws themselves.
- In double precision, operation by operation, whatever dtype the weights have: half precision rounds away an effect of one
  percent and makes equal things differ by as much. What does not run in double precision runs in single precision; a model
  that runs in half precision only is reported as one that could not be looked at.
- With parameters that are all zero filled, such as a fresh LoRA's `B`: they would hide what training will show.
- Without a trace: generators, buffers, attributes, gradients, flags and hooks are afterwards as they were (`untouched`).

Every question returns a [`Finding`]. A model that cannot be looked at is never called equal.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ._draws import Level, PinnedDraws, pin_other_generators
from ._state import set_mode, untouched
from ._wide import Wide

#: largest relative difference that is rounding, by the dtype that the model could be run in
ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-3}
#: parameters whose gradients are compared: all of a small model, of a large one the small ones of every layer
_GRADIENT_ELEMENTS = 2**25

Results = Tensor | Mapping[str, Tensor]
Run = Callable[[nn.Module], Results]


class CannotLook(Exception):
    """Raised by a run that finds out that its question cannot be asked of this model; the message says why."""


@dataclass(frozen=True)
class Finding:
    """
    The answer to a question.

    Args:
        gap (`float`, *optional*): Largest relative difference of the two runs; `None` where it could not be measured.
        what (`str`): Which result that is, such as `"the logits"`.
        allowed (`float`): What rounding may be responsible for.
        reason (`str`): Why it could not be measured.
        drawn (`tuple[str, ...]`): Names of the random operations that were met, where the question is about them.
        failed (`bool`): Whether the model ran in the first way and not in the second.
    """

    gap: float | None
    what: str = ""
    allowed: float = 0.0
    reason: str = ""
    drawn: tuple[str, ...] = ()
    failed: bool = False

    @property
    def looked(self) -> bool:
        """Whether there is a measurement."""
        return self.gap is not None

    @property
    def equal(self) -> bool:
        """Whether the two runs agree up to rounding; never true where nothing could be measured."""
        return self.gap is not None and self.gap <= self.allowed

    def __str__(self) -> str:
        if self.gap is None:
            return f"this could not be measured: {self.reason}"
        return f"{self.what}: a relative difference of {self.gap:.1e}"

    def worst(self, other: Finding) -> Finding:
        """Return the one that speaks more against equality."""
        if not (self.equal and other.equal):
            return self if not self.equal else other
        return max(self, other, key=lambda finding: finding.gap)


@dataclass
class Look:
    """
    The probe that is running.

    Args:
        dtype (`torch.dtype`, *optional*): Of all operations; `None`: as they are.
        draws ([`PinnedDraws`]): The random operations that were met are in its `drawn`.
        watched (`dict[str, nn.Parameter]`): Parameters whose gradients are results.
        embedded (`list[tuple[Tensor, Tensor]]`): Ids and embeddings of each call so far.
    """

    dtype: torch.dtype | None
    draws: PinnedDraws
    watched: dict[str, nn.Parameter]
    embedded: list[tuple[Tensor, Tensor]] = field(default_factory=list)


_now: Look | None = None


def probing() -> bool:
    """Whether a probe is running: code that has a kernel for half precision only takes its reference then."""
    return _now is not None


@contextlib.contextmanager
def looking(
    model: nn.Module, dtype: torch.dtype | None, level: Level = "middle", training: bool = True
) -> Iterator[Look]:
    """
    The conditions of a probe: draws at `level`, operations in `dtype`, no autocast; afterwards no trace.

    Args:
        model (`nn.Module`): The loaded model.
        dtype (`torch.dtype`, *optional*): Of all floating-point operations; `None`: as they are.
        level (`str`, *optional*, defaults to `"middle"`): What random operations give.
        training (`bool`, *optional*, defaults to `True`): The mode.
    """
    global _now
    outer, look = _now, Look(dtype, PinnedDraws(level), _watched(model))
    device = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode(False))
        set_mode(model, training)
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.__dict__["gradient_checkpointing"] = False  # reentrant, it knows no `torch.autograd.grad`
        with contextlib.suppress(Exception):  # no embeddings, or none to be found: their gradient is left out
            model.get_input_embeddings().register_forward_hook(functools.partial(_keep_embedded, look))
        _fill_zeros(model)
        pin_other_generators(level)
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
    Put other parameters in `dtype` in the place of the watched ones: in half precision a leaf rounds at each of its uses.

    The parameters themselves are left alone: a change of dtype by `.data` replaces the node that accumulates their gradient,
    and with it go the hooks by which DDP and ZeRO reduce it, without a word.
    """
    wide = {id(p): nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in watched.values() if p.dtype != dtype}
    for parameter in watched.values():
        if id(parameter) in wide:
            vars(wide[id(parameter)]).update(vars(parameter))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in wide:
                setattr(module, name, wide[id(parameter)])  # recurrent layers keep a list of them as well
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
    """Note what the tokens were embedded as: its gradient has run through the whole model, also where that is frozen."""
    if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and torch.is_grad_enabled()):
        return None
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    look.embedded.append((args[0], output))
    return output


def compare(model: nn.Module, one: Run, other: Run, *, level: Level = "middle", training: bool = True) -> Finding:
    """
    Measure how far two ways of running a model are apart.

    The gap of a result is `max |a - b| / max |a|`; names of results that only one of the two gives are a difference.

    Args:
        model (`nn.Module`): The loaded model.
        one, other (`Callable`): Called with `model`; each returns a tensor or tensors by name. Gradients are results, from
            [`gradients`]. [`CannotLook`] ends the question with a reason.
        level (`str`, *optional*, defaults to `"middle"`): What random operations give: `"low"` shows dropout of which one of
            the two knows nothing.
        training (`bool`, *optional*, defaults to `True`): The mode.

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
    failures = []
    for dtype in dtypes_to_try(model):
        running = "the model does not run on a few tokens: "
        try:
            with looking(model, dtype, level, training):
                first = _named(one(model))
            running = ""
            with looking(model, dtype, level, training):
                second = _named(other(model))
            return _gap(first, second, _precision(dtype, first))
        except CannotLook as error:
            return Finding(None, reason=str(error))
        except Exception as error:  # whatever a model raises on input that it was not made for
            failures.append(f"{running}{said(error)}")
    return Finding(None, reason=failures[-1], failed=not running)


def said(error: Exception) -> str:
    """Return what an error says, with its kind where that is no message of ours."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error)[:400].split()).rstrip('.')}"


def dtypes_to_try(model: nn.Module) -> list[torch.dtype | None]:
    """Return the dtypes of a probe: double precision where the device has it, then single precision, then `None`: as it is."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return [None]  # what brings the shards together has dtypes of its own
    devices = {p.device.type for p in model.parameters()}
    return [*([] if "mps" in devices else [torch.float64]), torch.float32, None]


def _precision(dtype: torch.dtype | None, results: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that results were really computed in."""
    found = {t.dtype for t in results.values()}
    narrow = found & {torch.float16, torch.bfloat16}
    return narrow.pop() if narrow else torch.float64 if dtype == torch.float64 else torch.float32


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


def out_of_reach(model: nn.Module) -> str | None:
    """Say why a model cannot be run here and now, or return `None`: sharded weights are whole only in a training step."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            return f"the weights are sharded by DeepSpeed ZeRO-3 ({name})"
        if not parameter.numel():
            return f"the weights are not here: {name} is empty, as in a shard of FSDP"
        if parameter.device.type == "meta" and not _is_loaded_by_hook(model):
            return f"the weights are on the meta device ({name})"
    return None


def _is_loaded_by_hook(model: nn.Module) -> bool:
    """Weights that accelerate keeps elsewhere come in when a module is called."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _named(results: Results) -> dict[str, Tensor]:
    named = {"the results": results} if isinstance(results, Tensor) else dict(results)
    with torch._C.DisableTorchFunction():
        return {name: tensor.detach() for name, tensor in named.items()}


def _gap(one: Mapping[str, Tensor], other: Mapping[str, Tensor], precision: torch.dtype) -> Finding:
    if one.keys() != other.keys():
        return Finding(math.inf, f"the results {sorted(one.keys() ^ other.keys())}", 0.0)
    if precision not in ALLOWED:
        reason = f"the model runs in {str(precision).removeprefix('torch.')} only here, whose rounding hides an effect"
        return Finding(None, reason=reason)
    # A gradient that is zero by symmetry is all rounding: it is measured against the largest of them.
    floor = 1e-6 * max((_largest(t) for name, t in one.items() if name.startswith("the gradient")), default=0.0)
    worst = Finding(0.0, next(iter(one), "nothing"), ALLOWED[precision])
    for name, a in one.items():
        gap = _relative(a, other[name], floor)
        if math.isnan(gap):
            return Finding(None, reason=f"{name} are not finite")
        if gap > worst.gap:
            worst = Finding(gap, name, ALLOWED[precision])
    return worst


def _largest(tensor: Tensor) -> float:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return values.abs().max().item() if values.numel() else 0.0


def _relative(a: Tensor, b: Tensor, floor: float) -> float:
    if a.shape != b.shape:
        return math.inf
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    if a.is_sparse:  # numbers by token id
        difference, a, b = (t.coalesce().values() for t in (a - b, a, b))
        return _ratio(a, b, difference, floor)
    return _ratio(a, b, a - b, floor)


def _ratio(a: Tensor, b: Tensor, difference: Tensor, floor: float) -> float:
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    scale = max(_largest(a), floor)
    gap = _largest(difference)
    return 0.0 if gap == 0.0 else gap / scale if scale else math.inf


def agreed(finding: Finding) -> Finding:
    """
    Return one finding for all ranks: the worst of those that looked, else the first rank's reason. One collective.

    A rank may hold weights that are not loaded yet (FSDP with `cpu_ram_efficient_loading`); all ranks have to decide alike.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return finding
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, finding)
    looked = [f for f in found if f.looked]
    return functools.reduce(Finding.worst, looked) if looked else found[0]


# --- what the runs are made of ----------------------------------------------------------------------------------------


def tiny_tokens(model: nn.Module, rows: int, length: int, seed: int = 0) -> Tensor:
    """
    Return token ids `(rows, length)` for a probe: any of the vocabulary but the special ones, on the model's device.

    Args:
        model (`nn.Module`): Gives the vocabulary by its input embeddings, else by its config.
        rows, length (`int`): Shape.
        seed (`int`, *optional*, defaults to 0): Other tokens for another seed.

    Raises:
        CannotLook: the model has no vocabulary.
    """
    size = vocabulary_of(model)
    special = _special_ids(model)
    usable = [i for i in range(min(size, 4096)) if i not in special] or list(range(size))
    # Scattered by a multiplication: a generator's numbers would be pinned inside of a run.
    places = torch.arange(1, rows * length + 1).view(rows, length) + 7919 * seed
    picked = places * 2654435761 % 2**32 // 2**12 % len(usable)
    return torch.tensor(usable)[picked].to(device_of(model))


def vocabulary_of(model: nn.Module) -> int:
    """Return the number of token ids that a model takes."""
    sizes = []
    with contextlib.suppress(Exception):  # some models raise NotImplementedError, wrappers have no such method
        embeddings = model.get_input_embeddings()
        sizes.append(getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0])
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes.append(getattr(text, "vocab_size", None))  # the table may have more rows than there are tokens
    sizes = [size for size in sizes if isinstance(size, int) and size > 0]
    if not sizes:
        raise CannotLook(f"{type(model).__name__} has no vocabulary to make tokens from")
    return min(sizes)


def _special_ids(model: nn.Module) -> set[int]:
    """Return ids with a meaning of their own, such as padding or the place of an image."""
    found: set[int] = set()
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for owner in (config, text, getattr(model, "generation_config", None)):
        for name, value in (vars(owner) if owner is not None else {}).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                found |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    return found


def device_of(model: nn.Module) -> torch.device:
    """Return where the tokens of a model belong: on the device of its first weights that are not on the meta device."""
    with contextlib.suppress(Exception):
        weight = model.get_input_embeddings().weight
        if weight.device.type != "meta":
            return weight.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def output_of(outputs: Any) -> Tensor:
    """Return the main result of a model's forward: logits, else the last hidden states, else the first floats."""
    for name in ("logits", "last_hidden_state", "log_probs", "prediction_logits"):
        if isinstance(found := getattr(outputs, name, None), Tensor):
            return found
    if isinstance(outputs, Tensor):
        return outputs
    values = (
        outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise CannotLook(f"the forward returns a {type(outputs).__name__} without logits or hidden states")


def gradients(model: nn.Module, loss: Tensor, also: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """
    Return gradients as results for [`compare`], inside of one of its runs; nothing is written to `.grad`.

    Those of the parameters (of a large model the smaller ones: norms, biases, routers, adapters, up to 32 million numbers)
    and that of the embedded tokens, added up for each token id, which does not depend on how rows are laid out.

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
    inputs = [*look.watched.values(), *(values for _, values in embedded), *also]
    found = list(torch.autograd.grad(contract(loss), inputs, allow_unused=True)) if inputs else []
    for leaf, grad in zip(also, found[len(inputs) - len(also) :], strict=True):
        if grad is not None:
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
    of_weights, of_tokens = found[: len(look.watched)], found[len(look.watched) : len(inputs) - len(also)]
    results = {
        f"the gradient of {name}": torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(look.watched.items(), of_weights, strict=True)
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
