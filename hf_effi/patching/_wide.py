"""Every operation of a forward in double precision, for the time of a probe, without a copy of the model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
#: change of dtype by name, whatever it is: the result stays wide
_CASTS = {"float", "half", "bfloat16", "double"}
#: read the weights and compute nothing: cast behind them, a slice of the experts or of an embedding instead of all of
#: it
_VIEWS = {
    "__getitem__", "t", "transpose", "permute", "view", "reshape", "chunk", "split", "detach", "unsqueeze", "squeeze",
    "narrow", "select", "expand", "flatten", "unflatten", "unbind", "index_select", "contiguous", "clone",
    "swapaxes", "movedim", "tensor_split", "view_as", "expand_as", "mT",
}  # fmt: skip
_FACTS = {
    "size", "dim", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "data_ptr", "untyped_storage",
    "is_floating_point", "is_complex", "is_inference", "element_size", "get_device", "ndimension", "requires_grad_",
    "register_hook", "retain_grad", "backward", "__len__", "__hash__", "__repr__", "__format__", "__deepcopy__",
    "__reduce_ex__", "is_tensor", "is_storage", "has_names", "is_same_size", "numpy_T", "is_pinned", "is_shared",
    "register_post_accumulate_grad_hook", "_is_view", "is_set_to", "is_sparse", "record_stream", "__dlpack_device__",
}  # fmt: skip
#: rows of a large head that are cast at a time, in elements
_SLICE = 2**24


class Wide(TorchFunctionMode):
    """
    Compute in `dtype` whatever dtype the weights have: half precision hides an effect of one percent behind its
    rounding.

    Operands are cast as each operation asks for them; half and single precision that the code asks for by name become
    `dtype` too. Weights are never written, and backward casts them again in place of keeping the copies (`saving`).

    Args:
        dtype (`torch.dtype`): `torch.float64`, or `torch.float32` where something does not run in it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.complex = torch.complex128 if dtype == torch.float64 else torch.complex64
        self._sources: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args[0])
        if name in _FACTS or name == "__set__":
            return func(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._gradients(*args, **kwargs)
        if foreign := _namespace(func):
            # An operator of another package has a contract on dtypes that only it knows.
            single = functools.partial(_in_single, foreign == "bitsandbytes")
            return func(*map(single, args), **{key: single(value) for key, value in kwargs.items()})
        if name in _CASTS:
            with torch._C.DisableTorchFunction():
                return args[0].to(self.dtype)
        if name == "embedding":
            return self._cast(func(*args, **kwargs))
        if name in _VIEWS:
            return func(*args, **kwargs)
        args, kwargs = self._dtypes(args), {key: self._dtypes(value) for key, value in kwargs.items()}
        if name.startswith("new_"):
            if "dtype" not in kwargs and args[0].is_floating_point():
                kwargs["dtype"] = self.dtype
            return func(*args, **kwargs)
        if name.endswith("_") and not name.endswith("__") or name == "__setitem__":
            return self._in_place(func, args, kwargs)
        if (
            func is F.linear
            and args[1].numel() > 2 * _SLICE
            and args[1].dtype != self.dtype
            and len(args) + len(kwargs) < 4
        ):
            return self._large_linear(*args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm") and args[1].dim() == 3:
            return self._grouped(*args, **kwargs)
        self._sources = {}
        try:
            return func(*self._cast(args), **self._cast(kwargs))
        finally:
            self._sources = {}

    def _gradients(
        self,
        outputs: Any,
        inputs: Any,
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        allow_unused: bool | None = None,
        **unused: Any,
    ) -> tuple[Tensor | None, ...]:
        """
        What `torch.autograd.grad` does, which torch would run without this mode: backwards compute forwards again.
        """
        outputs, inputs = ((t,) if isinstance(t, Tensor) else tuple(t) for t in (outputs, inputs))
        given = (grad_outputs,) if isinstance(grad_outputs, Tensor) else grad_outputs or (None,) * len(outputs)
        with torch._C.DisableTorchFunction():
            pairs = zip(outputs, given, strict=True)
            grads = tuple(torch.ones_like(out) if grad is None else grad.to(out.dtype) for out, grad in pairs)
        keep = create_graph if retain_graph is None else retain_graph
        with self:
            found = _engine_run_backward(outputs, grads, keep, create_graph, inputs, True, accumulate_grad=False)
        if not allow_unused and any(grad is None for grad in found):
            raise RuntimeError("One of the differentiated tensors appears to not have been used in the graph.")
        return found

    def _property(self, func: Any, tensor: Tensor) -> Any:
        found = func(tensor)
        if isinstance(found, torch.dtype) and _is_plain(tensor):
            return self._dtypes(found)
        return found

    def _dtypes(self, value: Any) -> Any:
        """Replace the dtypes among some arguments."""
        if isinstance(value, torch.dtype):
            return self.dtype if value in _NARROW else self.complex if value in _COMPLEX else value
        if type(value) in (tuple, list):
            return type(value)(self._dtypes(part) for part in value)
        return value

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._cast_tensor(value)
        if type(value) in (tuple, list):
            return type(value)(self._cast(part) for part in value)
        if type(value) is dict:
            return {key: self._cast(part) for key, part in value.items()}
        return value

    def _cast_tensor(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            dtype = tensor.dtype
            wanted = self.dtype if dtype in _NARROW else self.complex if dtype in _COMPLEX else dtype
            if wanted == dtype or not _is_plain(tensor):
                return tensor
            copy = tensor.to(wanted)
            if tensor.numel() > 1024:
                self._sources[copy.untyped_storage().data_ptr()] = tensor
            return copy

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is written to keeps its dtype, and the others take it."""
        with torch._C.DisableTorchFunction():
            target = args[0].dtype

        def follow(value: Any) -> Any:
            with torch._C.DisableTorchFunction():
                follows = isinstance(value, Tensor) and value.dtype in _NARROW and target in _NARROW
                return value.to(target) if follows and value.dtype != target else value

        return func(args[0], *(follow(value) for value in args[1:]), **{k: follow(v) for k, v in kwargs.items()})

    def _large_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = max(1, _SLICE // weight.shape[1])
        biases = [None] * -(-weight.shape[0] // rows) if bias is None else bias.split(rows)
        # Through this mode again, a slice of the weights at a time.
        with self:
            return torch.cat([F.linear(x, w, b) for w, b in zip(weight.split(rows), biases, strict=True)], dim=-1)

    def _grouped(self, x: Tensor, weight: Tensor, offs: Tensor, **kwargs: Any) -> Tensor:
        """The products of a mixture's experts, one at a time: the fused kernel is for half precision."""
        ends = offs.tolist()
        bounds = zip([0, *ends], ends, strict=False)
        with self:
            parts = [x[start:end] @ weight[expert] for expert, (start, end) in enumerate(bounds)]
            # Rows behind the last offset belong to no expert here, and are masked by the caller.
            return torch.cat([*parts, (x[ends[-1] :] @ weight[0]) * 0])

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Let autograd keep the weights themselves where it would keep their wide copies."""

        def pack(tensor: Tensor) -> Any:
            with torch._C.DisableTorchFunction():
                source = self._sources.get(tensor.untyped_storage().data_ptr())
                if source is None:
                    # Not itself: an operation that saves its own output would hold itself, and its graph, for good.
                    return tensor.detach()
                return source.detach(), tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            source, dtype, *layout = packed
            with torch._C.DisableTorchFunction():
                return source.to(dtype).as_strided(*layout)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def _is_plain(tensor: Tensor) -> bool:
    """Packed, quantized and sharded weights have a meaning of their own behind their dtype."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _namespace(func: Any) -> str | None:
    """Return whose operator a function is, `None` where it is torch's own."""
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = str(func).partition(".")[0]
        return None if name in ("aten", "prims") else name
    return None


def _in_single(wanted: bool, value: Any) -> Any:
    """Return the statistics of packed weights as they were before this mode widened them: their kernels read fp32."""
    with torch._C.DisableTorchFunction():
        if wanted and isinstance(value, Tensor) and value.dtype == torch.float64:
            return value.float()
    return value
