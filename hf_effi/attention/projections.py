"""Which output channels of which projections feed the queries, keys and values of a model: measured, not looked up."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..errors import RefusedError
from ..patching import call, looking, tiny_tokens
from .switch import switched_attention

PARTS = ("query", "key", "value")
_NAME = "hf_effi_projections"
#: a measured degree this near to 0 or 1 is it
_NEAR = 0.02
#: outputs of so many projections before a module are asked whether its input comes from their halves
_RECENT = 8


@dataclasses.dataclass(frozen=True)
class AttentionProjections:
    """
    One attention of a model, and what feeds it.

    Args:
        name (`str`): Name of its module in the model.
        scaling (`float`): What `q k` is multiplied by.
        softcap (`float`, *optional*): Where logits are capped by the model itself.
        channels (`dict[str, tuple[dict[str, Tensor], ...]]`): `"query"`, `"key"`, `"value"` -> for each head, name of
            a projection -> its output channels that feed this head, ascending.
        degree (`dict[str, float]`): Of the same parts: 1 where twice the projection is twice the part, 0 where a norm
            between them takes the factor away again.
        gain (`dict[str, float]`): Length of the part over the length of what feeds it; rotations leave it at 1.
    """

    name: str
    scaling: float
    softcap: float | None
    channels: dict[str, tuple[dict[str, Tensor], ...]]
    degree: dict[str, float]
    gain: dict[str, float]


@dataclasses.dataclass(frozen=True)
class MeasuredProjections:
    """
    What one forward over a few tokens shows of the projections of a model.

    Args:
        attentions (`tuple[AttentionProjections, ...]`): In the order in which they are called.
        out_dims (`dict[str, int]`): Name of a module -> the dimension of its weight that is its output.
        halves (`dict[str, str]`): Name of a module whose output is two factors of a gated MLP ->
            `"halves"` (first, second), `"alternating"` (even, odd), or `"unknown"`.
        experts (`dict[str, tuple[int, str]]`): Name of a parameter of three dimensions -> its output dimension, and
            how the two factors lie there, as in `halves`.
        failed (`str`): Why the model did not run; empty where it did.
    """

    attentions: tuple[AttentionProjections, ...] = ()
    out_dims: dict[str, int] = dataclasses.field(default_factory=dict)
    halves: dict[str, str] = dataclasses.field(default_factory=dict)
    experts: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    failed: str = ""


def measure_projections(model: nn.Module, by_head: bool = True) -> MeasuredProjections:
    """
    Run a model on three tokens and return what feeds its attentions and gated MLPs.

    The output of each projection is replaced by fixed numbers; gradients of what reaches the attention function then
    tell which channels it comes from, and whether it is linear in them. The model is left as it was: weights, hooks,
    mode, random state. Every rank of a run has to call it, and all get what the first one has found.

    Args:
        model (`nn.Module`): Not sharded yet.
        by_head (`bool`, *optional*, defaults to `True`): Whether to tell heads apart; else each part is one.

    Example:
    ```python
    >>> from hf_effi.demo import toy
    >>> first = measure_projections(toy().model).attentions[0]
    >>> [(name.rpartition(".")[2], len(rows)) for name, rows in first.channels["query"][0].items()]
    [('q_proj', 8)]

    ```
    """
    look = _Look(model, by_head)
    AttentionInterface.register(_NAME, look.attend)
    AttentionMaskInterface.register(_NAME, _no_mask)
    failed = ""
    try:
        with looking(model, None, training=False), switched_attention(model, _NAME), look.hooked():
            call(model, tiny_tokens(model, 1, 3))
    except Exception as error:  # whatever a forward of somebody's model says
        failed = f"{type(error).__name__}: {error}"
    finally:
        AttentionInterface.register(_NAME, _refuse)
    return _agreed(MeasuredProjections(tuple(look.attentions), look.out_dims, look.halves, look.experts, failed))


def _agreed(found: MeasuredProjections) -> MeasuredProjections:
    """
    Return what the first rank that could look has found. One collective.

    A rank may hold weights that are not loaded yet (FSDP with `cpu_ram_efficient_loading`), and all have to read a
    weight alike.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return found
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return next((one for one in every if not one.failed), every[0])


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise RefusedError(f"attn_implementation={_NAME!r} is for measurements of hf_effi only. Choose another one.")


def fixed_numbers(like: Tensor, salt: float = 0.0) -> Tensor:
    """Return numbers between -1 and 1 without a pattern and without a generator, which a probe would pin."""
    places = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    return ((places * 0.7548776662 + 0.1 + salt) * 12.9898).sin().reshape(like.shape).to(like.dtype)


class _Look:
    """Collects what one forward shows."""

    def __init__(self, model: nn.Module, by_head: bool) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.by_head = by_head
        self.leaves: dict[nn.Module, Tensor] = {}
        self.attentions: list[AttentionProjections] = []
        self.out_dims: dict[str, int] = {}
        self.halves: dict[str, str] = {}
        self.experts: dict[str, tuple[int, str]] = {}
        self.asking = False

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Replace the outputs of projections, and ask modules of experts."""
        handles = []
        for module in self.names:
            weight = vars(module).get("_parameters", {}).get("weight")
            if weight is not None and weight.ndim == 2 and weight.is_floating_point():
                handles.append(module.register_forward_hook(self._projection))
            elif any(p is not None and p.ndim == 3 for p in module.parameters(recurse=False)):
                handles.append(module.register_forward_hook(self._of_experts, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _projection(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        given = args[0] if args else None
        if not isinstance(output, Tensor) or not isinstance(given, Tensor) or not given.is_floating_point():
            return None
        if output.shape[-1] not in module.weight.shape:
            return None
        name = self.names[module]
        dim = _out_dim(module, given, output)
        if dim is not None:
            self.out_dims[name] = dim
        self._halves(given)
        leaf = fixed_numbers(output.detach(), salt=len(self.leaves)).requires_grad_()
        self.leaves.pop(module, None)
        self.leaves[module] = leaf
        return leaf

    def _halves(self, given: Tensor) -> None:
        """Ask whether the input of a module is a product of the two halves of an earlier output."""
        if not given.requires_grad:
            return
        for module, leaf in list(self.leaves.items())[-_RECENT:]:
            if leaf.shape[-1] != 2 * given.shape[-1] or self.names[module] in self.halves:
                continue
            weights = fixed_numbers(given.detach(), salt=0.5)
            total = (given * weights).sum()
            (gradient,) = torch.autograd.grad(total, [leaf], retain_graph=True, allow_unused=True)
            if gradient is None:
                continue
            shares = (gradient * leaf.detach()).double().flatten(0, -2).sum(0) / total.detach().double()
            half = shares.shape[0] // 2
            linear = {
                "halves": min(abs(shares[:half].sum() - 1), abs(shares[half:].sum() - 1)),
                "alternating": min(abs(shares[::2].sum() - 1), abs(shares[1::2].sum() - 1)),
            }
            best = min(linear, key=linear.get)  # type: ignore[arg-type]
            self.halves[self.names[module]] = best if linear[best] < _NEAR else "unknown"

    @torch.no_grad()
    def _of_experts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.asking or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        tensors = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        for name, weight in tensors.items():
            others = [p for other, p in tensors.items() if other != name]
            dims = [d for d in (1, 2) if any(_is_fused(weight, other, d) for other in others)]
            if not dims:
                continue
            key = f"{self.names[module]}.{name}".lstrip(".")
            self.experts[key] = (dims[0], "unknown")
            self.asking = True
            for dim, kind, second in itertools.product(dims, ("halves", "alternating"), (False, True)):
                changed = {name: weight * _twice(weight, dim, kind, second)}
                again = torch.func.functional_call(module, changed, args, kwargs)
                if (again - 2 * output).norm() <= _NEAR * (again - output).norm():
                    self.experts[key] = (dim, kind)
            self.asking = False

    # ---- attention ----

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Stand for the attention function: note what feeds it, and return fixed numbers."""
        leaves = {self.names[m]: self.leaves[m] for m in module.modules() if m in self.leaves}
        name = self.names.get(module)
        if name is not None and leaves and all(found.name != name for found in self.attentions):
            parts = dict(zip(PARTS, (query, key, value), strict=True))
            found = {part: self._part(tensor, leaves) for part, tensor in parts.items()}
            scaling = kwargs.get("scaling")
            self.attentions.append(
                AttentionProjections(
                    name,
                    float(query.shape[-1] ** -0.5 if scaling is None else scaling),
                    kwargs.get("softcap"),
                    {part: one[0] for part, one in found.items()},
                    {part: one[1] for part, one in found.items()},
                    {part: one[2] for part, one in found.items()},
                )
            )
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        return fixed_numbers(query.new_empty(shape)), None

    def _part(self, tensor: Tensor, leaves: dict[str, Tensor]) -> tuple[tuple[dict[str, Tensor], ...], float, float]:
        """Return channels by head, degree and gain of one part, `(rows, heads, length, size)`."""
        heads = tensor.unbind(1) if self.by_head else (tensor,)
        channels, degrees, gains = [], [], [0.0]
        for head in heads:
            feeds: dict[str, Tensor] = {}
            degree, fed = 0.0, torch.zeros((), dtype=torch.float64)
            if head.requires_grad:
                total = (head * fixed_numbers(head.detach(), salt=0.5)).sum()
                found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
                for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
                    if gradient is None:
                        continue
                    flat = gradient.flatten(0, -2)
                    rows = flat.abs().amax(0).nonzero().flatten()
                    if len(rows):
                        feeds[name] = rows.cpu()
                        degree += float((gradient * leaf.detach()).double().sum() / total.detach().double())
                        fed = fed + leaf.detach().double()[..., rows].square().sum().cpu()
            channels.append(feeds)
            degrees.append(degree)
            if fed > 0:
                gains.append(float(head.detach().double().norm().cpu() / fed.sqrt()))
        worst = max(degrees, key=lambda degree: abs(degree - 1))
        return tuple(channels), worst, max(gains, key=lambda gain: abs(gain - 1) if gain else -1.0)


def _out_dim(module: nn.Module, given: Tensor, output: Tensor) -> int | None:
    """Return the dimension of a weight that is the output of its module, from one input and output."""
    weight = module.weight.detach()
    if isinstance(module, nn.Linear) or weight.shape[0] != weight.shape[1]:
        return 0 if isinstance(module, nn.Linear) or weight.shape[0] == output.shape[-1] else 1
    bias = getattr(module, "bias", None)
    plain = (output - bias if isinstance(bias, Tensor) else output).detach().float()
    errors = [float((given.detach().float() @ w.float() - plain).norm()) for w in (weight.t(), weight)]
    if min(errors) > 0.1 * float(plain.norm()) or max(errors) < 2 * min(errors):
        return None
    return errors.index(min(errors))


def _is_fused(weight: Tensor, other: Tensor, dim: int) -> bool:
    """Whether the shapes are those of two factors `(E, 2 I, H)` and the way back `(E, H, I)`, in any orientation."""
    size, rest = weight.shape[dim], weight.shape[3 - dim]
    pairs = (tuple(other.shape[1:]), tuple(other.shape[:0:-1]))
    return size % 2 == 0 and (rest, size // 2) in pairs


def _twice(weight: Tensor, dim: int, kind: str, second: bool) -> Tensor:
    """Return a factor of 2 for one of two halves along `dim`, and 1 elsewhere."""
    places = torch.arange(weight.shape[dim], device=weight.device)
    chosen = places >= weight.shape[dim] // 2 if kind == "halves" else places % 2 == 1
    factor = torch.where(chosen == second, 2.0, 1.0).to(weight.dtype)
    return factor.view([-1 if d == dim else 1 for d in range(3)])
