"""Measure each decoder layer in the middle of an ordinary forward pass: bytes that it would keep, and time."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..functional.layer_plan import LayerCost, mode_costs
from ..functional.saved_bytes import SavedBytes
from ..patching import untouched
from .layer_modes import LayerModes, is_attention_op

_SECONDS = ("forward_seconds", "attention_seconds")
_SIZES = ("kept_bytes", "attention_bytes", "input_bytes")


class _SavedInLayer(SavedBytes):
    """
    Counts apart what grows with the square of the length, such as the masks of SDPA.

    Args:
        exclude: See [`SavedBytes`].
        length (`int`): Tokens of a row.
    """

    def __init__(self, exclude: Iterable[torch.Tensor] = (), length: int = 0) -> None:
        super().__init__(exclude)
        self.length, self.square = length, 0

    def _take(self, held: Any) -> None:
        before, shape = self.now, held.tensor.shape
        super()._take(held)
        if len(shape) >= 4 and tuple(shape[-2:]) == (self.length, self.length):
            self.square += max(self.now - before, 0)


def _clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)
    return time.perf_counter()


class _AttentionMeter(TorchDispatchMode):
    """Adds up time and output bytes of fused attention."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.seconds, self.size = device, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_attention_op(func):
            return func(*args, **(kwargs or {}))
        begin = _clock(self.device)
        out = func(*args, **(kwargs or {}))
        self.seconds += _clock(self.device) - begin
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        self.size += sum(t.numel() * t.element_size() for t in outputs if isinstance(t, torch.Tensor))
        return out


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


class LayerProbe(LayerModes):
    """
    Plain checkpointing that measures each layer once, by running it twice more on the input it gets.

    The extra runs see a copy of the random state (torch's, Python's and numpy's) and of what a layer counts, and leave
    no trace in the outputs that the model collects, so the loss and the gradients of the step are those of a step
    without them.

    Args:
        model (`PreTrainedModel`): A model with gradient checkpointing on.

    Example:
    ```python
    with LayerProbe(model) as probe:
        model(**batch).loss.backward()
    modes = plan_layer_modes(probe.costs(), budget_bytes=2**30)
    ```
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, "checkpoint")
        #: by layer: the arguments of `mode_costs`
        self.measured: dict[int, dict[str, float]] = {}
        self.tokens = 0
        #: of the run that goes on
        self.saved = SavedBytes()

    @property
    def complete(self) -> bool:
        """Whether every layer has been measured."""
        return len(self.measured) == len(self.layers)

    def costs(self, copy_bytes_per_second: float | None = None, tokens: int | None = None) -> list[LayerCost]:
        """
        Return the choices of each layer.

        Args:
            copy_bytes_per_second (`float`, *optional*): Bandwidth to the host; without it `offload` is not offered.
            tokens (`int`, *optional*): Size of the micro-batch to plan for, if not the one measured. Bytes and times
                grow in proportion; masks of SDPA with the square, as for longer rows (for more rows that is too much).
        """
        scale = 1.0 if tokens is None else tokens / self.tokens
        costs = []
        for index in range(len(self.layers)):
            alike = [self.measured[i] for i in self.measured if self._kind(i) == self._kind(index)]
            # Layers of one kind differ in time by chance only.
            seconds = {name: scale * median(layer[name] for layer in alike) for name in _SECONDS}
            sizes = {name: round(scale * self.measured[index][name]) for name in _SIZES}
            sizes["kept_bytes"] += round((scale**2 - scale) * self.measured[index]["square_bytes"])
            costs.append(mode_costs(**seconds, **sizes, copy_bytes_per_second=copy_bytes_per_second))
        return costs

    def _kind(self, index: int) -> tuple[Any, ...]:
        return type(self.layers[index]), *(self.measured[index][name] for name in _SIZES)

    def _runner(self, index: int) -> Callable[..., Any]:
        return partial(self._probe, index)

    def _probe(self, index: int, upstream: Callable[..., Any], function: Any, *args: Any) -> Any:
        if index not in self.measured and torch.is_grad_enabled():
            self._run(index, function, args)  # the first run warms up
            self.measured[index] = self._run(index, function, args)
            self.tokens = args[0].shape[:-1].numel()
        return upstream(function, *args)

    def _without_trace(self, index: int) -> AbstractContextManager[None]:
        return untouched(self.layers[index], watch_writes=False)

    def _run(self, index: int, function: Any, args: tuple[Any, ...]) -> dict[str, float]:
        device = args[0].device
        inputs = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
        # Masks and position embeddings are shared by all layers.
        shared = list(_tensors(function.keywords))
        with self._without_trace(index), _AttentionMeter(device) as attention:
            length = args[0].shape[-2] if args[0].dim() > 1 else 0
            with _SavedInLayer([*self.layers[index].parameters(), *shared], length) as saved:
                self.saved = saved
                begin = _clock(device)
                # In an empty context: what collects router logits or hidden states must not see these runs.
                out = contextvars.Context().run(function, *inputs)
                seconds = _clock(device) - begin
            kept = self._kept(index, saved)
            del out
        return {
            "forward_seconds": seconds,
            "attention_seconds": attention.seconds,
            "kept_bytes": kept,
            "square_bytes": saved.square,
            "attention_bytes": attention.size,
            "input_bytes": sum(t.numel() * t.element_size() for t in inputs if isinstance(t, torch.Tensor)),
        }

    def _kept(self, index: int, saved: SavedBytes) -> int:
        """Return what the layer keeps, while its output is there."""
        return saved.total


def measure_copy_bandwidth(device: torch.device | str, size: int = 1 << 26) -> float:
    """
    Return the bytes per second that go from `device` to (pinned) host memory.

    Args:
        device (`torch.device` or `str`): Where the activations are.
        size (`int`, *optional*, defaults to `2**26`): Bytes to copy.
    """
    device = torch.device(device)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
    host.copy_(source)
    begin = _clock(device)
    host.copy_(source, non_blocking=True)
    return size / (_clock(device) - begin)
