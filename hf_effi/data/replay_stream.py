"""`ReplayStream`: old rows among new ones, from streams that have no row numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from datasets import IterableDataset as HFIterableDataset
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import MismatchError, RefusedError
from ..functional.data import replayed


class ReplayStream(IterableDataset):
    """
    Serve new rows in their order, and an old row in a set share of the places: replay for streams.

    Which place holds an old row is a hash of seed, epoch and place ([`~hf_effi.functional.data.replayed`]). So a stock
    Trainer that skips to its place after a resume, and every process of DDP, FSDP or DeepSpeed, sees the same stream.
    It ends with the new rows; old ones begin again when they are used up. For rows with numbers
    [`~hf_effi.samplers.ReplaySampler`] is exact and faster.

    Papers: Ibrahim et al., Simple and Scalable Strategies to Continually Pre-train Large Language Models (2403.08763):
    0.05 for a weak shift of the data, 0.25 for a strong one.

    Args:
        new (`Iterable`): Rows of the new data: a `datasets.IterableDataset`, a list, anything that can be read again
            and then gives the same rows.
        old (`Iterable`): Rows of the old data.
        fraction (`float`): Share of old rows, in `[0, 1)`.
        seed (`int`, *optional*, defaults to 0): Of the places.
        block (`int`, *optional*): Places over which the share is exact, such as the global batch size; each place is
            drawn by itself if `None`.

    Raises:
        ValueError: an argument out of range, or an iterator, which can be read once only.
        RefusedError: `old` has no row; more than one worker, each of which would read all rows.

    Example:
    ```python
    >>> stream = ReplayStream([1, 2, 3, 4, 5, 6], [-1, -2], fraction=0.25, block=4)
    >>> list(stream)
    [1, 2, -1, 3, 4, -2, 5, 6]
    ```
    """

    def __init__(
        self, new: Iterable[Any], old: Iterable[Any], fraction: float, *, seed: int = 0, block: int | None = None
    ) -> None:
        for name, rows in (("new", new), ("old", old)):
            if not hasattr(rows, "__iter__") or hasattr(rows, "__next__"):
                raise ValueError(
                    f"{name} is a {type(rows).__name__}, and a resume could not read it again. Pass a list, a dataset "
                    "or a streaming dataset."
                )
        replayed(0, fraction, seed, block)  # checks the ranges
        if fraction == 1:
            raise ValueError("fraction=1 leaves no place for a new row. It must be below 1.")
        self.new, self.old, self.fraction, self.seed, self.block = new, old, fraction, seed, block
        self.epoch = 0
        self._at = self._from = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch: other places, and other orders of streams that have a `set_epoch` of their own."""
        self.epoch = epoch
        _set_epoch(self.new, epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise RefusedError(
                f"dataloader_num_workers={worker.num_workers}: each worker would read all rows of ReplayStream. Set "
                "it to 0 or 1."
            )
        begin, self._from, self._at = self._from, 0, 0
        place = 0
        new, old = iter(self.new), self._old_rows()
        seed = self.seed + self.epoch * 1_000_003
        while True:
            source = old if replayed(place, self.fraction, seed, self.block) else new
            try:
                row = next(source)
            except StopIteration:
                return
            place += 1
            if place > begin:
                self._at = place
                yield row

    def as_dataset(self) -> HFIterableDataset:
        """
        Return the stream as a `datasets.IterableDataset`, which TRL's trainers ask for and map.

        It has one epoch: TRL's `set_epoch` does not reach it, so that every pass is that of this moment.
        """
        return HFIterableDataset.from_generator(_rows_of, None, {"stream": self})

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last row that was served."""
        return {"at": self._at, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Let the next pass begin at a stored place. The rows before it are read and not served, so any stream will do.

        Raises:
            MismatchError: it is the place of a stream with other settings.
        """
        settings = {name: value for name, value in state.items() if name != "at"}
        if settings != {**self._settings(), "epoch": state["epoch"]}:
            raise MismatchError(
                f"The stored stream had {settings}, and this one has {self._settings()}. Use the same."
            )
        self.set_epoch(state["epoch"])
        self._from = self._at = state["at"]

    def _settings(self) -> dict[str, Any]:
        return {"fraction": self.fraction, "seed": self.seed, "block": self.block, "epoch": self.epoch}

    def _old_rows(self) -> Iterator[Any]:
        number = self.epoch
        while True:
            _set_epoch(self.old, number)
            empty = True
            for row in self.old:
                empty = False
                yield row
            if empty:
                raise RefusedError("old has no row to replay. Pass old rows, or set fraction=0.")
            number += 1


def _rows_of(stream: ReplayStream) -> Iterator[Any]:
    yield from stream


def _set_epoch(rows: Any, epoch: int) -> None:
    if hasattr(rows, "set_epoch"):
        rows.set_epoch(epoch)
