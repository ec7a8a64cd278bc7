"""`MemorySnapshot`: what training changes, in host memory, to go back to in a fraction of the time of a checkpoint."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import Trainer

from .._files import load_state, save_state
from ..errors import RefusedError
from .snapshot import restore_rng, take_rng

#: of the bytes that are to be copied; the rest is for whatever else needs memory meanwhile
ROOM = 1.2


class MemorySnapshot:
    """
    A copy of trainable weights, buffers, optimizer, scheduler and random numbers in host memory, taken again and
    again.

    The memory is kept from one `take` to the next, and page-locked where the state is on a GPU. Weights that are not
    trained are not copied: for LoRA it holds the adapter. It ends with the process. A checkpoint survives that; this
    is for going back within a run.

    Args:
        model (`torch.nn.Module`): Unsharded, without a wrapper.
        optimizer (`torch.optim.Optimizer`): Of the run.
        scheduler (*optional*): An LR scheduler to include.

    Attributes:
        step (`int`): The update after which it was taken, as `take` was told.
        seconds (`float`): What the last `take` cost.

    Raises:
        RefusedError: by `take`: less than 1.2 times the state is free in host memory.
        ValueError: by `restore`: nothing has been taken.

    Example:
    ```python
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> snapshot = MemorySnapshot(model, optimizer)
    >>> snapshot.take(0)
    >>> before = model.weight.detach().clone()
    >>> _ = model(torch.ones(1, 2)).sum().backward(), optimizer.step()
    >>> snapshot.restore()
    >>> bool(torch.equal(model.weight, before)), snapshot.nbytes >= 12
    (True, True)
    ```
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, scheduler: Any = None) -> None:
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._state: dict[str, Any] | None = None
        self.step = -1
        self.seconds = 0.0

    @property
    def is_taken(self) -> bool:
        """Whether there is something to go back to."""
        return self._state is not None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it holds."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, step: int) -> None:
        """Copy the state as it is now; `step` is what `self.step` is from now on."""
        began = time.perf_counter()
        state = {"weights": _trained(self._model), "optimizer": self._optimizer.state_dict()}
        if not self._buffers:
            self._check_room(_nbytes(state))
        used: set[tuple[Any, ...]] = set()
        copied = {name: self._to_host(value, (name,), used) for name, value in state.items()}
        for path in self._buffers.keys() - used:
            del self._buffers[path]
        if torch.cuda.is_available() and any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()
        copied["scheduler"] = None if self._scheduler is None else copy.deepcopy(self._scheduler.state_dict())
        copied["training"] = [module.training for module in self._model.modules()]
        copied["rng"] = take_rng()
        self._state, self.step = copied, step
        self.seconds = time.perf_counter() - began

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `take` copied, to the bit. Gradients are dropped: it is taken between two updates."""
        if self._state is None:
            raise ValueError("This MemorySnapshot holds nothing. Call take(step) first.")
        for name, value in _trained(self._model).items():
            value.copy_(self._state["weights"][name])
        # What an optimizer loads it may keep, where the device is the same: it must not be our memory.
        self._optimizer.load_state_dict(_clone(self._state["optimizer"]))
        if self._scheduler is not None:
            self._scheduler.load_state_dict(copy.deepcopy(self._state["scheduler"]))
        for parameter in self._model.parameters():
            parameter.grad = None
        for module, training in zip(self._model.modules(), self._state["training"], strict=True):
            module.training = training
        restore_rng(self._state["rng"])

    def write(self, path: str | Path) -> None:
        """Write what it holds to a file, which is forced to the disk: what the same rewind costs through a disk."""
        if self._state is None:
            raise ValueError("This MemorySnapshot holds nothing. Call take(step) first.")
        save_state(path, {name: self._state[name] for name in ("weights", "optimizer")})

    def read(self, path: str | Path) -> None:
        """Go back to weights and optimizer of a file that [`MemorySnapshot.write`] made; the rest as in `restore`."""
        stored = load_state(path)
        if self._state is None:
            raise ValueError("This MemorySnapshot holds nothing. Call take(step) first.")
        self._state = {**self._state, **stored}
        self.restore()

    def _check_room(self, nbytes: int) -> None:
        free = psutil.virtual_memory().available
        if free < ROOM * nbytes:
            raise RefusedError(
                f"A snapshot in memory needs {nbytes / 2**30:.2f} GiB of host memory and {free / 2**30:.2f} GiB are "
                f"free, which is less than {ROOM} times that. Rewind from checkpoints instead, or train fewer weights "
                "(LoRA)."
            )

    def _to_host(self, value: Any, path: tuple[Any, ...], used: set[tuple[Any, ...]]) -> Any:
        if isinstance(value, Tensor):
            used.add(path)
            buffer = self._buffers.get(path)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[path] = buffer
            return buffer.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, dict):
            return {key: self._to_host(entry, (*path, key), used) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._to_host(entry, (*path, i), used) for i, entry in enumerate(value))
        return copy.deepcopy(value)


@dataclass(frozen=True)
class RewindCost:
    """
    What going back costs, in seconds and bytes.

    Args:
        nbytes (`int`): Of a snapshot in memory.
        take_seconds (`float`): Of a snapshot whose memory is there already.
        restore_seconds (`float`): Of going back to it.
        disk_save_seconds, disk_load_seconds (`float`): Of the same state through a file, written and read back. The
            file is in the memory of the system when it is read, and a restart of the process comes on top: the disk
            is flattered.
    """

    nbytes: int
    take_seconds: float
    restore_seconds: float
    disk_save_seconds: float
    disk_load_seconds: float

    def saved_seconds(
        self, update_seconds: float, every_steps: int, save_steps: int, updates_between_rewinds: float
    ) -> float:
        """
        Return the seconds per update that snapshots in memory save beside checkpoints; negative where they cost more.

        Formula: `[(t_disk - t_memory) + (S - E) u / 2] / F - c / E`. A rewind repeats half an interval on average, `S
        / 2` updates of `u` seconds from checkpoints and `E / 2` from snapshots.

        Args:
            update_seconds (`float`): `u`, of one update.
            every_steps (`int`): `E`, updates from one snapshot to the next.
            save_steps (`int`): `S`, updates from one checkpoint to the next.
            updates_between_rewinds (`float`): `F`, how often a rewind is needed.

        Raises:
            ValueError: an argument that is not above 0.

        Example:
        ```python
        >>> cost = RewindCost(10, take_seconds=0.1, restore_seconds=0.1, disk_save_seconds=1.0, disk_load_seconds=1.1)
        >>> cost.saved_seconds(1.0, every_steps=10, save_steps=100, updates_between_rewinds=1000)
        0.036
        ```
        """
        given = {
            "update_seconds": update_seconds,
            "every_steps": every_steps,
            "save_steps": save_steps,
            "updates_between_rewinds": updates_between_rewinds,
        }
        for name, value in given.items():
            if not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0.")
        repeated = (save_steps - every_steps) * update_seconds / 2
        per_rewind = self.disk_load_seconds - self.restore_seconds + repeated
        return round(per_rewind / updates_between_rewinds - self.take_seconds / every_steps, 12)


def measure_rewind(trainer: Trainer, repeats: int = 3) -> RewindCost:
    """
    Measure a rewind from memory beside one from a file, on the state that a Trainer has now.

    Nothing of the run is changed. Medians of `repeats` measurements, taken in turns. Call it once the optimizer has a
    state, which is after the first update: after a short `train()`, or in a callback.

    Args:
        trainer (`Trainer`): With an optimizer.
        repeats (`int`, *optional*, defaults to 3): At least 1.

    Returns:
        [`RewindCost`]: In seconds and bytes.

    Raises:
        ValueError: there is no optimizer yet, or `repeats` below 1.
        RefusedError: the state does not fit into host memory.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats={repeats!r} must be an integer of at least 1.")
    if trainer.optimizer is None:
        raise ValueError("The Trainer has no optimizer yet. Train an update first.")
    model = trainer.accelerator.unwrap_model(trainer.model)
    snapshot = MemorySnapshot(model, trainer.optimizer, trainer.lr_scheduler)
    snapshot.take(trainer.state.global_step)  # makes the memory
    times: dict[str, list[float]] = {name: [] for name in ("take", "restore", "save", "load")}
    with TemporaryDirectory(prefix="hf_effi_rewind_") as folder:
        path = Path(folder) / "state.pt"
        for _ in range(repeats):
            snapshot.take(trainer.state.global_step)
            times["take"].append(snapshot.seconds)
            times["restore"].append(_timed(snapshot.restore))
            times["save"].append(_timed(lambda: snapshot.write(path)))
            times["load"].append(_timed(lambda: snapshot.read(path)))
    take, restore, save, load = (sorted(values)[len(values) // 2] for values in times.values())
    return RewindCost(snapshot.nbytes, take, restore, save, load)


def _timed(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return what training changes, without copying: trainable parameters, tied ones once, and buffers."""
    found = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return found | dict(model.named_buffers())


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(entry) for entry in value)
    return copy.deepcopy(value)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0
