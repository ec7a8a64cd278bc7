"""`ShapeRun`: run a model's own code on weights and activations that have a shape and no data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, overload

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten

#: Values up to which whole numbers, and floats that follow from them, are computed: 1 GiB of int64, 4 MiB of fp32.
_WHOLE_LIMIT, _FLOAT_LIMIT = 2**27, 2**20
#: What picks places by value: the places are invented, each one in turn, as of a router that spreads its load.
_CHOOSERS = {
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argmax.default,
    aten.argmin.default,
    aten.max.dim,
    aten.min.dim,
    aten.kthvalue.default,
    aten.multinomial.default,
}
_RANDOM = {aten.rand.default, aten.randn.default, aten.bernoulli.default, aten.normal_.default, aten.uniform_.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_FUSED_ATTENTION_OF_CPUS = aten._scaled_dot_product_flash_attention_for_cpu.default
_GROUPED_PRODUCT = aten._grouped_mm.default


class _TooManyOperations(RuntimeError):
    """A run was given up: its code loops over tokens, for example."""


class _Limit(TorchFunctionMode):
    """Looks before calls from Python: an error raised by an operator could leave autograd's own code half done."""

    def __init__(self, run: ShapeRun, operations: int) -> None:
        super().__init__()
        self.run, self.operations, self.last = run, operations, run.operations + operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.run.operations > self.last:
            raise _TooManyOperations(f"more than {self.operations} operators have run.")
        return func(*args, **(kwargs or {}))


class ShapeRun(TorchDispatchMode):
    """
    A context in which a model runs without data, at no cost of memory and little of time.

    Weights and what is computed from them are fake tensors of a CPU: shapes, dtypes, storages and autograd are those
    of a real run. Token ids, masks, positions and what follows from them alone are real, so that code that branches on
    them or takes its shapes from them (packed rows, masks that can be left out, experts with their tokens) does what
    it does. Where values of activations decide, they are invented, and `invented` says so.

    Attributes:
        invented (`set[str]`): `"routing"`: places picked by value (top-k, argmax), spread evenly. `"values"`: other
            numbers and branches that depend on activations; what follows from them may differ from a real run.
        operations (`int`): Operators dispatched so far.
        used (`set`): Storages of the weights (see [`weights_of`]) that an operator has read.
        casts (`list[tuple[torch.Tensor, torch.Tensor]]`): Weights and what they were converted to, by autocast for
            example.

    Example:
    ```python
    >>> run = ShapeRun()
    >>> layer = run.emptied(torch.nn.Linear(4, 1_000_000, device="meta"))
    >>> with run:
    ...     out = layer(torch.ones(2, 4))
    >>> tuple(out.shape), sorted(run.invented)
    ((2, 1000000), [])

    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.invented: set[str] = set()
        self.operations = 0
        self.used: set[Any] = set()
        self.casts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._weights: dict[Any, torch.Tensor] = {}

    def __enter__(self) -> ShapeRun:
        self.fake_mode.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.fake_mode.__exit__(*error)

    def limited(self, operations: int) -> TorchFunctionMode:
        """Return a context in which [`_TooManyOperations`] is raised once so many operators have run."""
        return _Limit(self, operations)

    # ---- models ----

    def emptied(self, model: torch.nn.Module) -> torch.nn.Module:
        """
        Put tensors without data in place of the parameters and buffers of `model`, and return it; tied ones stay tied.

        Buffers of whole numbers and truth values are real: those of a model on the meta device count up, or are true.
        """
        weights, made = self._made_for(model)
        for module in model.modules():
            parameters, buffers = module._parameters, module._buffers
            parameters.update({name: weights[id(old)] for name, old in parameters.items() if old is not None})
            buffers.update({name: made[id(old)] for name, old in buffers.items() if old is not None})
        return self._known(model)

    def copied(self, model: torch.nn.Module) -> torch.nn.Module:
        """
        Return a copy of `model` with tensors without data, also of one with adapters or patches; `model` stays as it
        is.
        """
        _, made = self._made_for(model)
        for module in model.modules():
            # States that a model keeps as plain attributes may have a graph, which cannot be copied.
            plain = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
            made |= {id(value): self.without_data(value.detach()) for value in plain if id(value) not in made}
        return self._known(copy.deepcopy(model, made))

    def _made_for(self, model: torch.nn.Module) -> tuple[dict[int, torch.nn.Parameter], dict[int, torch.Tensor]]:
        """Return what stands for each parameter, and for each of all tensors."""
        weights = {id(tensor): self.without_data(tensor) for tensor in model.parameters()}
        buffers = {id(tensor): self.without_data(tensor) for tensor in model.buffers() if id(tensor) not in weights}
        return weights, {**weights, **buffers}

    def _known(self, model: torch.nn.Module) -> torch.nn.Module:
        self._weights |= dict(weights_of(model))
        return model

    @overload
    def without_data(self, tensor: torch.nn.Parameter) -> torch.nn.Parameter: ...

    @overload
    def without_data(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def without_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a fake tensor (or parameter) of the same shape, dtype and need of a gradient."""
        parameter = isinstance(tensor, torch.nn.Parameter)
        if not parameter and not tensor.is_floating_point() and tensor.numel() <= _FLOAT_LIMIT:
            return _counted_up(tensor) if tensor.is_meta else tensor.detach().cpu().clone()
        with self.fake_mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            return torch.nn.Parameter(made, requires_grad=tensor.requires_grad) if parameter else made

    # ---- operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func not in _RANDOM and _is_small(func, args, kwargs, tensors):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        self._note_weights(tensors)
        return self._without_data(func, args, kwargs)

    def _note_weights(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            key = storage_of(tensor)
            if key in self._weights:
                self.used.add(key)

    def _without_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            self.invented.add("values")
            with unset_fake_temporarily():
                return False if func is aten.equal.default else torch.zeros((), dtype=args[0].dtype).item()
        if func is aten.nonzero.default:
            return self._all_places(args[0])
        if func is aten.masked_select.default:
            places = self._places(torch.broadcast_to(args[1], torch.broadcast_shapes(args[0].shape, args[1].shape)))
            return aten.index.Tensor(args[0].expand(args[1].shape), places)
        if func in _INDEXED:
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        if func is _GROUPED_PRODUCT:
            return _grouped_product(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is _FUSED_ATTENTION_OF_CPUS:
            # The kernel lays its output out like the queries; the shape function of torch does not.
            out = (torch.empty_like(args[0]), *out[1:])
        elif func in _CHOOSERS:
            out = tree_map(lambda value: self._spread(value, func, args, kwargs), out)
        elif func is aten._to_copy.default and (weight := self._weights.get(storage_of(args[0]))) is not None:
            self.casts.append((weight, out))
        return out

    def _places(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Turn a mask among indices into places, whose number is known."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        if isinstance(index, FakeTensor):
            return list(self._all_places(index).unbind(1))
        with unset_fake_temporarily():
            return list(index.nonzero(as_tuple=True))

    def _all_places(self, mask: torch.Tensor) -> torch.Tensor:
        self.invented.add("values")
        with unset_fake_temporarily():
            return torch.ones(mask.shape, dtype=torch.bool).nonzero()

    def _spread(self, value: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Return real places in turn for the ones that were picked by value."""
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            return value
        self.invented.add("routing")
        source, dim = args[0], _dim_of(func, args, kwargs)
        size = source.shape[dim] if source.dim() else 1
        with unset_fake_temporarily():
            if value.dim() != source.dim() or not value.dim():
                return (torch.arange(value.numel()) % max(size, 1)).view(value.shape)
            chosen = value.movedim(dim, -1)
            rows = torch.arange(chosen.shape[:-1].numel()).view(*chosen.shape[:-1], 1)
            # Each row goes on where the one before ended; a row that lists all places begins one place further on.
            step = chosen.shape[-1] if chosen.shape[-1] < size else 1
            last = (torch.arange(chosen.shape[-1]) + rows * step) % max(size, 1)
            return last.movedim(-1, dim).contiguous()


def _grouped_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    The shape of a grouped product, for which torch's shape function allows bf16 only; its rows are padded to 16 bytes.
    """
    dtype = out_dtype or rows.dtype
    outer = () if rows.dim() != weight.dim() else (rows.shape[0] if offs is None else offs.shape[0],)
    height, width = rows.shape[-2], weight.shape[-1]
    per_row = 16 // dtype.itemsize
    padded = -(-width // per_row) * per_row
    strides = (height * padded, padded, 1)[-len(outer) - 2 :]
    return rows.new_empty_strided((*outer, height, width), strides, dtype=dtype)


def weights_of(module: torch.nn.Module) -> Iterator[tuple[Any, torch.nn.Parameter]]:
    """Yield the storage of each parameter, as [`ShapeRun.used`] names it, and the parameter."""
    for parameter in module.parameters():
        yield storage_of(parameter), parameter


def storage_of(tensor: torch.Tensor) -> Any:
    """Return what names the storage of a tensor in [`ShapeRun.used`]."""
    return tensor.untyped_storage()._cdata


def _dim_of(func: Any, args: Any, kwargs: Any) -> int:
    place = {aten.topk.default: 2, aten.kthvalue.default: 2}.get(func, 1)
    dim = kwargs.get("dim", args[place] if len(args) > place else -1)
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else -1


def _is_small(func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether an operator on real tensors, or one that makes a tensor, stays real."""
    if tensors:
        shapes = [tensor.shape for tensor in tensors]
        try:
            size = math.prod(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            size = max(map(math.prod, shapes))
        whole = not any(tensor.is_floating_point() for tensor in tensors)
        wanted = kwargs.get("dtype")
        whole = whole and not (wanted is not None and wanted.is_floating_point)
    else:
        shape = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
        size = math.prod(shape)
        wanted = kwargs.get("dtype")
        whole = wanted is not None and not wanted.is_floating_point
    return size <= (_WHOLE_LIMIT if whole else _FLOAT_LIMIT)


def _counted_up(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool or not tensor.dim():
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return torch.arange(tensor.shape[-1]).to(tensor.dtype).expand(tensor.shape).clone()
