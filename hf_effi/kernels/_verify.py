"""The self-check of `patch`: replacement against original, forward and backward, on random input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RefusedError
from ..patching.state import Trace


class _KernelMismatchError(RefusedError):
    """A replacement that does not compute what it replaces: `patch` then tries the next one, or leaves the module."""


class _LayerRefusedError(RefusedError):
    """
    A kernel layer says itself what it cannot compute, or where. No failed self-check: the caller is told, also with
    `on_mismatch="eager"`.
    """


Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: A replacement may be twice as far from the truth as the original is (the rule of flash-attention's tests), plus one
#: rounding to the dtype on either side, plus fp32 arithmetic inside.
FACTOR = 2.0
ROUNDINGS = 2.0
FP32_ROUNDINGS = 16.0
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Deviation:
    """
    How far one result of the replacement and of the original are from the truth, relative to the latter.

    Args:
        what (`str`): `"output 0"`, `"gradient of input 0"`, `"gradient of weight"`, ...
        error (`float`): Of the replacement.
        own_error (`float`): Of the original in the same dtype.
        allowed (`float`): `2 * own_error` plus rounding, plus the budget.
        measure (`str`): Of what `error` is a part: `"largest entry"`, or `"norm"` where there is a budget.
    """

    what: str
    error: float
    own_error: float
    allowed: float
    measure: str

    @property
    def ok(self) -> bool:
        """Whether the replacement is close enough; never true of NaN."""
        return self.error <= self.allowed


class _Call(nn.Module):
    """Calls a function under `functional_call` with the parameters of some modules replaced."""

    def __init__(self, modules: Sequence[nn.Module], function: Callable[..., Any]) -> None:
        super().__init__()
        self.modules_used = nn.ModuleList(modules)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _map_floats(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if _is_float(value):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_floats(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_floats(item, change) for key, item in value.items()}
    return value


def _floats(value: Any) -> Iterator[torch.Tensor]:
    if _is_float(value):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)


def _copied(tensor: torch.Tensor, *, wide: bool) -> torch.Tensor:
    dtype = _WIDER.get(tensor.dtype, tensor.dtype) if wide else tensor.dtype
    return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)


def _form(value: Any) -> str:
    """Return how a result is built, such as `tuple(Tensor, NoneType)`."""
    if isinstance(value, torch.Tensor):
        return "Tensor"
    if isinstance(value, (tuple, list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return f"{type(value).__name__}({', '.join(map(_form, inner))})"
    return type(value).__name__


def _short(name: str) -> str:
    """Leave out what [`_Call`] puts before the names of a single module."""
    return name.removeprefix("modules_used.").removeprefix("0.")


#: ends the name of an entry that a call leaves in a module
_LEFT = " set by the call"


def _results(
    modules: Sequence[nn.Module], function: Callable[..., Any], arguments: Arguments, *, wide: bool, backward: bool
) -> dict[str, torch.Tensor | None]:
    """
    Return outputs and gradients by name; with `wide`, of the same function with everything in a wider dtype.

    Weights and arguments are copies, and what else a call changes in its modules is put back. Each such change, and
    the form of the output, is among the names.
    """
    call, copied = _Call(modules, function), functools.partial(_copied, wide=wide)
    args, kwargs = _map_floats(arguments, copied)
    parameters = {name: _not_zero(p) for name, p in call.named_parameters() if _is_float(p)}
    weights = {name: copied(p) for name, p in parameters.items()}
    buffers = {name: copied(b) for name, b in call.named_buffers()}
    given = {
        f"input {i}": pair for i, pair in enumerate(zip(_floats(arguments), _floats((args, kwargs)), strict=True))
    }
    given |= {_short(name): (parameters[name], weight) for name, weight in weights.items()}
    leaves = {name: tensor for name, (_, tensor) in given.items() if backward and tensor.requires_grad}
    device = next((tensor.device for tensor in _floats((args, kwargs))), torch.device("cpu"))
    # A seed of its own: dropout draws the same mask each time, and the global generators stay where they are.
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    trace = Trace(call.named_modules())
    try:
        with forked, torch.set_grad_enabled(backward), torch.autocast(device.type, enabled=False):
            torch.manual_seed(0)
            result = torch.func.functional_call(call, weights | buffers, args, kwargs)
            outputs = list(_floats(result))
            found: dict[str, torch.Tensor | None] = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
            found |= {f"returns {_form(result)}": None, **_gradients(outputs, leaves)}
    finally:
        changed = [_short(name) for name in trace.undo()]
    found |= dict.fromkeys(f"{entry}{_LEFT}" for entry in changed)
    written = {name: now for name, (was, now) in given.items() if not torch.equal(was.to(now.dtype), now)}
    return found | {f"{name} after the call": now.detach() for name, now in written.items()}


def _not_zero(parameter: torch.Tensor) -> torch.Tensor:
    """Return a random stand-in for weights that are all zero, such as a fresh LoRA's `B`: they would hide an error."""
    if parameter.detach().any():
        return parameter
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(parameter.shape, generator=generator, device="cpu")
    stand_in = drawn.to(parameter) / max(parameter.shape[-1], 1) ** 0.5
    return stand_in.requires_grad_(parameter.requires_grad)


def _gradients(outputs: Sequence[torch.Tensor], leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    attached = [out for out in outputs if out.requires_grad]
    if not attached or not leaves:
        return {f"gradient of {name}": None for name in leaves}
    generator = torch.Generator().manual_seed(1)
    # Multiples of 1/64 in [-1, 1]: the same numbers in every dtype.
    directions = [
        (torch.randint(-64, 65, out.shape, generator=generator, device="cpu") / 64).to(out) for out in attached
    ]
    before = [direction.clone() for direction in directions]
    found = torch.autograd.grad(attached, list(leaves.values()), directions, allow_unused=True)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    # Other branches of a model may share the very tensor.
    return named | {
        f"upstream gradient {i} after the backward": now
        for i, (was, now) in enumerate(zip(before, directions, strict=True))
        if not torch.equal(was, now)
    }


def _distance(value: torch.Tensor, truth: torch.Tensor, order: float) -> float:
    """
    Return `|value - truth| / |truth|` by a norm; of activations the worst over the batch, whose rows differ in size.
    """
    if truth.dim() > 2:
        return max(
            (_distance(v, t, order) for v, t in zip(value.flatten(1, -1), truth.flatten(1, -1), strict=True)),
            default=0.0,
        )
    if not truth.numel():
        return 0.0
    gap = torch.linalg.vector_norm(value.double() - truth.double(), order).item()
    scale = torch.linalg.vector_norm(truth.double(), order).item()
    if scale == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return gap / scale


def compare(
    modules: Sequence[nn.Module],
    original: Callable[..., Any],
    replacement: Callable[..., Any],
    arguments: Arguments,
    *,
    backward: bool = True,
    budget: float = 0.0,
) -> list[Deviation]:
    """
    Measure a replacement against the original and both against the original in a wider dtype.

    `error = max|y - y_wide| / max|y_wide|`, taken for each row of a batch, for each output, each gradient of a float
    input and of a trainable parameter, allowed up to `2 * own_error + 2 eps(dtype) + 16 eps(float32)`. Gradients come
    from `torch.autograd.grad` along a random direction: nothing is accumulated into `.grad`.

    Args:
        modules (`Sequence[nn.Module]`): Whose parameters the functions use.
        original, replacement (`Callable`): Called with `arguments`.
        arguments (`tuple`): `(args, kwargs)`; floats that require a gradient get one.
        backward (`bool`, *optional*, defaults to `True`): Whether to compare gradients.
        budget (`float`, *optional*, defaults to 0.0): What outputs and gradients of inputs are allowed beyond that, by
            the Frobenius norm: single entries of an approximation scatter.

    Raises:
        RefusedError: the original does not run on these arguments.
        _KernelMismatchError: the replacement fails, or gives another number, shape or dtype of results, or a gradient
            where the original has none.
    """
    try:
        wide = _results(modules, original, arguments, wide=True, backward=backward)
        own = _results(modules, original, arguments, wide=False, backward=backward)
    except Exception as error:
        raise RefusedError(
            f"the original does not run on the input of the self-check: {type(error).__name__}: {error}. Pass "
            "inputs={key: function}, where function(module, generator) returns its positional arguments as a tuple."
        ) from error
    try:
        new = _results(modules, replacement, arguments, wide=False, backward=backward)
    except _LayerRefusedError:
        raise
    except Exception as error:  # whatever a kernel raises where it does not work: no driver, an unknown shape or dtype
        raise _KernelMismatchError(f"it does not run: {type(error).__name__}: {error}") from error
    only = sorted(name for name in own.keys() ^ new.keys() if name in new or not name.endswith(_LEFT))
    if only:
        raise _KernelMismatchError(f"replacement and original do not return or change the same things: {only}")
    deviations = []
    for what, expected in own.items():
        actual = new.get(what)
        if _signature(expected) != _signature(actual):
            raise _KernelMismatchError(f"{what} is {_signature(actual)} and the original's is {_signature(expected)}")
        if expected is None or actual is None:
            continue
        truth = wide[what]
        extra = budget if what.startswith(("output", "gradient of input")) else 0.0
        order, measure = (2.0, "norm") if extra else (math.inf, "largest entry")
        own_error = _distance(expected, truth, order)
        rounding = ROUNDINGS * torch.finfo(expected.dtype).eps + FP32_ROUNDINGS * torch.finfo(torch.float32).eps
        allowed = FACTOR * own_error + rounding + extra
        deviations.append(Deviation(what, _distance(actual, truth, order), own_error, allowed, measure))
    return deviations


def _signature(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


# --- random input of the right shapes ------------------------------------------------------------------------------

_ROWS, _LENGTH = 2, 5
# Rows of small magnitude make the epsilon of a norm matter: at 1e-3 the variance equals the usual 1e-6.
_MAGNITUDES = (1.0, 1e-3)


def _activations(generator: torch.Generator, *shape: int) -> torch.Tensor:
    magnitudes = torch.tensor(_MAGNITUDES).view(_ROWS, *[1] * (len(shape) - 1))
    return torch.randn(shape, generator=generator) * magnitudes


def input_width(module: nn.Module) -> int | None:
    """Return the size of the last dimension that a module takes, as far as its weights tell."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 1:
        return weight.numel()
    for part in module.modules():
        if isinstance(getattr(part, "in_features", None), int):
            return part.in_features
        if hasattr(part, "nf") and hasattr(part, "weight"):  # transformers' Conv1D holds its weight transposed
            return part.weight.shape[0]
    return None


def hidden_states(name: str, module: nn.Module, generator: torch.Generator) -> Arguments:
    """Return `(2, 5, width)` activations for a norm, a linear layer or an MLP."""
    width = input_width(module)
    if width is None:
        raise RefusedError(
            f"cannot tell what input {name} ({type(module).__name__}) takes. Pass inputs={{key: function}}, where "
            "function(module, generator) returns its positional arguments as a tuple."
        )
    return (_activations(generator, _ROWS, _LENGTH, width),), {}


def rotary_arguments(module: nn.Module, generator: torch.Generator) -> Arguments:
    """Return `q, k, cos, sin` for the attention `module`: `(2, heads, 5, head_dim)` and `(2, 5, rotary_dim)`."""
    config = module.config
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads)
    parameters = getattr(config, "rope_parameters", None) or {}
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    angles = torch.rand(_ROWS, _LENGTH, rotary_dim // 2, generator=generator) * 2 * math.pi
    angles = torch.cat([angles, angles], dim=-1)
    q, k = (torch.randn(_ROWS, count, _LENGTH, head_dim, generator=generator) for count in heads)
    return (q, k, angles.cos(), angles.sin()), {}


def loss_arguments(vocab_size: int, generator: torch.Generator) -> Arguments:
    """Return logits `(2, 5, vocab_size)` and labels with two of them ignored."""
    labels = torch.randint(vocab_size, (_ROWS, _LENGTH), generator=generator)
    labels[:, 2] = -100
    return (torch.randn(_ROWS, _LENGTH, vocab_size, generator=generator), labels, vocab_size), {}


def placed(arguments: Arguments, dtype: torch.dtype, device: torch.device, differentiable: int) -> Arguments:
    """Return the arguments on a device, floats in a dtype, and the first `differentiable` floats as leaves."""
    args, kwargs = _map_floats(arguments, lambda t: t.to(dtype))
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    for tensor in list(_floats(args))[:differentiable]:
        tensor.requires_grad_()
    return args, kwargs
