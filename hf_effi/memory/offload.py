"""`ActivationOffloader`: the inputs of checkpointed layers wait for the backward pass in host memory."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..errors import RefusedError

Allocator = Callable[[int], torch.Tensor]


@dataclass
class OffloadStats:
    """
    What an [`ActivationOffloader`] has done so far.

    Args:
        offloaded_bytes (`int`): Bytes copied to the host.
        restored_bytes (`int`): Bytes copied back.
        prefetched (`int`): Tensors whose way back began one layer before they were needed.
        waited (`int`): Tensors whose way back began only when they were needed (the last one of each backward pass).
        buffers_allocated (`int`): Host buffers made.
        buffers_reused (`int`): Times that a buffer was used again.
        host_bytes (`int`): Bytes of all host buffers now.
        host_bytes_in_use (`int`): ... of those that hold a tensor.
    """

    offloaded_bytes: int = 0
    restored_bytes: int = 0
    prefetched: int = 0
    waited: int = 0
    buffers_allocated: int = 0
    buffers_reused: int = 0
    host_bytes: int = 0
    host_bytes_in_use: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self)


class _HostBuffers:
    """Flat host buffers, handed out and taken back."""

    def __init__(self, stats: OffloadStats, allocate: Allocator) -> None:
        self.stats, self.allocate = stats, allocate
        self.free: list[torch.Tensor] = []

    def take(self, size: int) -> torch.Tensor:
        large_enough = [buffer for buffer in self.free if buffer.numel() >= size]
        if large_enough:
            buffer = min(large_enough, key=torch.Tensor.numel)
            self._forget(buffer)
            self.stats.buffers_reused += 1
        else:
            if self.free:  # replaced by a larger one, so that growing batches do not pile up small buffers
                small = max(self.free, key=torch.Tensor.numel)
                self._forget(small)
                self.stats.host_bytes -= small.numel()
            buffer = self.allocate(size)
            self.stats.buffers_allocated += 1
            self.stats.host_bytes += size
        self.stats.host_bytes_in_use += buffer.numel()
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        self.stats.host_bytes_in_use -= buffer.numel()
        self.free.append(buffer)

    def _forget(self, buffer: torch.Tensor) -> None:
        self.free = [other for other in self.free if other is not buffer]


class _HostCopy:
    """What autograd keeps in place of a tensor. When autograd lets go of it, its buffer is free again."""

    def __init__(self, tensor: torch.Tensor, buffers: _HostBuffers, previous: _HostCopy | None) -> None:
        self.size = tensor.numel() * tensor.element_size()
        buffer = buffers.take(self.size)
        weakref.finalize(self, buffers.give_back, buffer).atexit = False
        # In the order of its memory. A recomputation reads strides as well: which operators it takes, and so its last
        # bits.
        self.shape, self.stride, dense = (
            tensor.shape,
            tensor.stride(),
            torch.empty_like(tensor, device="meta").stride(),
        )
        self.host = buffer[: self.size].view(tensor.dtype).as_strided(self.shape, dense)
        self.device = tensor.device
        self.on_device: torch.Tensor | None = None
        self.arrived: Any = None  # event of the copy back
        # Weak: a graph that was dropped without a backward pass must not live on in the chain.
        self.previous = weakref.ref(previous) if previous is not None else lambda: None

    def empty(self) -> torch.Tensor:
        """Return memory on the device for the tensor, strides included."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.host.dtype, device=self.device)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Return whether some elements may share memory, as in an expanded tensor, which is smaller than it looks."""
    end = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < end:
                return True
            end += stride * (size - 1)
    return False


class _Lane:
    """What one device needs: its host buffers and, on an accelerator, a stream for the copies."""

    def __init__(self, device: torch.device, stats: OffloadStats, allocate: Allocator | None) -> None:
        self.asynchronous = device.type != "cpu"
        # Pinned where there is a device to copy from.
        plain = partial(torch.empty, dtype=torch.uint8, pin_memory=self.asynchronous)
        self.buffers = _HostBuffers(stats, allocate or plain)
        self.module = torch.get_device_module(device.type) if self.asynchronous else None
        self.stream = self.module.Stream(device) if self.asynchronous else None
        self.leaving: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        if not self.asynchronous:
            host.copy_(tensor)
            return
        self.stream.wait_stream(self.module.current_stream(tensor.device))
        with self.module.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
            self.leaving.append((self.stream.record_event(), tensor))
        # The copy of the layer before had a whole layer of time. Waiting for it before its memory is let go keeps the
        # allocator's blocks on the compute stream: two layers' inputs at most are on the device.
        self._let_go(keep=1)

    def fetch(self, saved: _HostCopy) -> None:
        if not self.asynchronous:
            saved.on_device = saved.empty().copy_(saved.host)
            return
        self._let_go(keep=0)
        # Allocated on the compute stream, whose earlier work may still use that memory: the copy waits for it.
        saved.on_device = saved.empty()
        self.stream.wait_stream(self.module.current_stream(saved.device))
        with self.module.stream(self.stream):
            saved.on_device.copy_(saved.host, non_blocking=True)
            saved.arrived = self.stream.record_event()

    def wait_for(self, saved: _HostCopy) -> None:
        if saved.arrived is not None:
            self.module.current_stream(saved.device).wait_event(saved.arrived)

    def _let_go(self, keep: int) -> None:
        while len(self.leaving) > keep:
            event, tensor = self.leaving.popleft()
            self.module.current_stream(tensor.device).wait_event(event)


class ActivationOffloader:
    """
    Hold checkpoint inputs in host memory between the forward and the backward pass.

    Inside [`saving`], each activation that autograd saves (a tensor that needs a gradient and is no parameter) is
    copied to a host buffer, and an object that owns this buffer is saved in its place. With non-reentrant
    checkpointing these are exactly the inputs of the checkpointed function. In the backward pass each comes back when
    it is needed, and the one saved before it starts its way back at the same time, so that its copy runs beside the
    recomputation of one layer. On an accelerator the buffers are pinned and copies run on a stream of their own; on a
    CPU the same happens synchronously. Values are copied bit by bit and come back with their strides, so gradients do
    not change. Expanded tensors stay.

    ALST, arXiv:2506.13996.

    Args:
        allocate (`Callable`, *optional*): `number of bytes -> uint8 tensor` in host memory, such as a file mapping.
            Default: pinned memory, or plain memory for activations that are on the CPU.

    Example:
    ```python
    >>> offloader = ActivationOffloader()
    >>> x = torch.ones(2, requires_grad=True)
    >>> with offloader.saving():
    ...     y = (x * 3).square().sum()
    >>> y.backward()
    >>> x.grad.tolist(), offloader.stats.offloaded_bytes, offloader.stats.host_bytes_in_use
    ([18.0, 18.0], 8, 0)

    ```
    """

    def __init__(self, allocate: Allocator | None = None) -> None:
        self.stats = OffloadStats()
        self._allocate = allocate
        self._lanes: dict[torch.device, _Lane] = {}
        self._latest: weakref.ref[_HostCopy] | Any = lambda: None

    def saving(self) -> saved_tensors_hooks:
        """Return a context manager; what autograd saves inside it goes to the host."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _HostCopy:
        if not tensor.requires_grad or isinstance(tensor, torch.nn.Parameter) or _overlaps(tensor):
            return tensor
        if type(tensor) is not torch.Tensor:
            raise RefusedError(
                f"an activation of type {type(tensor).__name__} cannot be offloaded, a plain tensor can. Leave such "
                "layers to mode 'checkpoint'."
            )
        if tensor.device not in self._lanes:
            self._lanes[tensor.device] = _Lane(tensor.device, self.stats, self._allocate)
        lane = self._lanes[tensor.device]
        copy = _HostCopy(tensor, lane.buffers, self._latest())
        self._latest = weakref.ref(copy)
        lane.send(tensor.detach(), copy.host)
        self.stats.offloaded_bytes += copy.size
        return copy

    def _unpack(self, saved: torch.Tensor | _HostCopy) -> torch.Tensor:
        if not isinstance(saved, _HostCopy):
            return saved
        if saved.on_device is None:
            self.stats.waited += 1
            self._fetch(saved)
        else:
            self.stats.prefetched += 1
        self._lanes[saved.device].wait_for(saved)
        tensor, saved.on_device, saved.arrived = saved.on_device, None, None
        previous = saved.previous()
        if previous is not None and previous.on_device is None:
            self._fetch(previous)
        return tensor

    def _fetch(self, saved: _HostCopy) -> None:
        self.stats.restored_bytes += saved.size
        self._lanes[saved.device].fetch(saved)
