"""Copies of a state that are made at once, or while the next forward and backward run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import RefusedError

#: where copies are made on: the processor, and devices that have streams
_KINDS = ("cpu", "cuda")


class Stream(Protocol):
    """Where the copies of one device run beside its other work."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy."""

    def synchronize(self) -> None:
        """Wait for all copies that have begun."""


class SideStream:
    """
    A CUDA stream of its own, whose copies come after what the current stream has been given so far.

    Args:
        device (`torch.device`): Of the tensors that are copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy; `destination` has to be page-locked for it to be in the background."""
        with torch.cuda.stream(self._stream):
            destination.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        """Wait for all copies that have begun."""
        self._stream.synchronize()


def side_stream(device: torch.device) -> Stream | None:
    """Return a new stream of a device; `None` for the processor, whose copies a thread makes."""
    return SideStream(device) if device.type == "cuda" else None


class Rule(Protocol):
    """What may be copied later."""

    def may_wait(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor may be copied until the next update."""

    def changes(self, tensor: torch.Tensor) -> int:
        """Return a number that is another one once the tensor was changed."""


class Copies:
    """
    The copies of one save. A tensor that stays as it is until the optimizer's next update may wait for a thread.

    Args:
        rule ([`ChangedByTheOptimizer`], *optional*): What may be copied later; without it all is copied at once.
        stream_of (`Callable[[torch.device], Stream]`, *optional*): Makes the stream of a device.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        stream_of: Callable[[torch.device], Stream | None] = side_stream,
    ) -> None:
        self._rule, self._stream_of = rule, stream_of
        #: destination, source, and the number of changes that the source had seen
        self._queued: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._busy: set[torch.device] = set()
        self._streams: dict[torch.device, Stream | None] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        #: bytes that a thread copies
        self.nbytes = 0

    def add(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source` to `destination`: now, or after [`begin`]."""
        source = source.detach()
        if self._rule is not None and self._rule.may_wait(source):
            self._queued.append((destination, source, self._rule.changes(source)))
            self.nbytes += source.nbytes
            return
        destination.copy_(source, non_blocking=source.is_cuda)
        if source.is_cuda:
            self._busy.add(source.device)

    def begin(self) -> None:
        """Wait for what is copied at once, and let a thread copy the rest."""
        for device in self._busy:
            torch.cuda.current_stream(device).synchronize()
        self._busy.clear()
        if self._queued:
            self._streams = {source.device: None for _, source, _ in self._queued}
            self._streams = {device: self._stream_of(device) for device in self._streams}
            self._thread = threading.Thread(target=self._run, name="hf_effi checkpoint copies", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """
        Wait until everything is copied.

        Raises:
            RefusedError: something else than the optimizer has changed a tensor meanwhile, so that its copy may be
                a mixture.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        queued, self._queued = self._queued, []
        error, self._error = self._error, None
        if error is not None:
            raise error
        rule = self._rule
        changed = 0 if rule is None else sum(rule.changes(source) != before for _, source, before in queued)
        if changed:
            raise RefusedError(
                f"{changed} of {len(queued)} tensors were changed between a save and the optimizer's next update, "
                "while they were being copied. Copy them at once: lazy=False."
            )

    def _run(self) -> None:
        try:
            for destination, source, _ in self._queued:
                if (stream := self._streams[source.device]) is None:
                    destination.copy_(source)
                else:
                    stream.copy(destination, source)
            for stream in self._streams.values():
                if stream is not None:
                    stream.synchronize()
        except Exception as error:  # told by `wait`
            self._error = error


class ChangedByTheOptimizer:
    """
    What of a state stays as it is until the optimizer's next update.

    That is so for parameters and for the state of the optimizer. Buffers of the model, such as the running averages of
    batch normalization, change in a forward; everything else, random states for one, is nobody's that is known here.
    The memory of a tensor decides, so that views and detached tensors count as what they belong to.

    Args:
        model (`torch.nn.Module`): That is trained.
        optimizer (`torch.optim.Optimizer`): Of it.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        #: memory -> the tensors that have it
        self._owners: dict[int, list[torch.Tensor]] = {}
        states: list[Any] = [*model.parameters(), *optimizer.state.values()]
        while states:
            value = states.pop()
            if isinstance(value, torch.Tensor):
                if value.layout == torch.strided:
                    self._owners.setdefault(_memory(value), []).append(value)
            elif isinstance(value, dict):
                states.extend(value.values())
            elif isinstance(value, (list, tuple)):
                states.extend(value)
        for buffer in model.buffers():
            if buffer.layout == torch.strided:
                self._owners.pop(_memory(buffer), None)
        self._owners.pop(0, None)  # of what has no elements

    def may_wait(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor may be copied until the next update."""
        return tensor.device.type in _KINDS and not tensor.is_inference() and _memory(tensor) in self._owners

    def changes(self, tensor: torch.Tensor) -> int:
        """
        Return how often the owners of a tensor's memory were changed. A sharded one counts changes of the whole and of
        its shard separately, and neither is seen by what was detached from it.
        """
        return sum(owner._version + _local_part(owner)._version for owner in self._owners[_memory(tensor)])


def _local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a process has of a tensor: its shard of a sharded one."""
    to_local: Any = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        return to_local()


def _memory(tensor: torch.Tensor) -> int:
    return _local_part(tensor).untyped_storage().data_ptr()
