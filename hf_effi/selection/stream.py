"""Choosing among the rows of a stream: a bounded buffer of rows that were read ahead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import MismatchError, RefusedError
from ..functional.data import check_count
from ..functional.kept_arguments import keeps_arguments

if TYPE_CHECKING:
    from ..protocols import PromptSelector, RolloutGroups, SelectionContext

#: rows that a buffer may hold
_MOST_ROWS = 1_000_000


class StreamRows:
    """
    The rows of a stream that are in a buffer, by number: row `n` is the `n`-th that was read, over all passes.

    A stream that ends is read again from its beginning, in the same order. Every rank reads all of it.

    Args:
        stream (`Iterable`): Each iteration begins anew, such as a `datasets.IterableDataset`.
        ahead (`int`): Most rows that are read at once.

    Example:
    ```python
    >>> rows = StreamRows([{"prompt": "a"}, {"prompt": "b"}], ahead=3)
    >>> [rows.read() for _ in range(3)], rows[1], rows[2]
    ([0, 1, 2], {'prompt': 'b'}, {'prompt': 'a'})
    ```
    """

    def __init__(self, stream: Iterable[Any], ahead: int) -> None:
        self._stream, self._ahead = stream, ahead
        self._held: dict[int, dict[str, Any]] = {}
        self._iterator: Iterator[Any] | None = None
        #: rows that were read, and the number of the first one of each pass
        self.count, self.starts = 0, [0]

    def __len__(self) -> int:
        """Return a bound of the row numbers that the next choice can give."""
        return self.count + self._ahead

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return self._held[number]
        except KeyError:
            raise IndexError(
                f"row {number} of the stream is not in the buffer; {len(self._held)} others are."
            ) from None

    def read(self) -> int:
        """
        Read one more row, and return its number.

        Raises:
            ValueError: the stream has no rows.
        """
        for _ in range(2):
            self._iterator = iter(self._stream) if self._iterator is None else self._iterator
            for row in self._iterator:
                self._held[self.count] = dict(row)
                self.count += 1
                return self.count - 1
            if self.count == self.starts[-1]:
                break
            self.starts.append(self.count)
            self._iterator = None
        raise ValueError("train_dataset is a stream without rows.")

    def drop(self, numbers: Iterable[int]) -> None:
        """Let go of rows."""
        for number in numbers:
            self._held.pop(number, None)

    def restore(self, count: int, starts: Sequence[int], numbers: Collection[int]) -> None:
        """
        Read the stream again, up to where `count` rows were read, and hold those of these numbers.

        Raises:
            MismatchError: the stream is shorter than it was.
        """
        self.count, self.starts, self._iterator = count, list(starts), None
        self._held.clear()
        ends = [*self.starts[1:], count]
        for place, (start, end) in enumerate(zip(self.starts, ends, strict=True)):
            last = place == len(self.starts) - 1
            wanted = {number for number in numbers if start <= number < end}
            if not wanted and not last:
                continue
            iterator = iter(self._stream)
            for number in range(start, end if last else max(wanted) + 1):
                row = next(iterator, None)
                if row is None:
                    raise MismatchError(
                        f"the stream ends after {number - start} rows, and the checkpoint's buffer holds later ones. "
                        "Resume with the same stream, or start a new run from the checkpoint's weights."
                    )
                if number in wanted:
                    self._held[number] = dict(row)
            self._iterator = iterator if last else None


class _SlotContext:
    """The [`~hf_effi.protocols.SelectionContext`] of a selector that sees the places of a buffer as its dataset."""

    def __init__(self, context: SelectionContext, slots: list[int], rows: Callable[[], StreamRows]) -> None:
        self._context, self._slots, self._rows = context, slots, rows
        self.size, self.group_size, self.seed = len(slots), context.group_size, context.seed

    def column(self, name: str) -> list[Any]:
        """Return the column of the rows that are in the buffer now."""
        found = [self._rows()[number] for number in self._slots]
        if name not in found[0]:
            raise ValueError(f"the stream has no column {name!r}. It has: {', '.join(found[0])}.")
        return [row[name] for row in found]

    def read_prompts(
        self, rows: Sequence[int], read: Callable[[Tensor, Tensor], Tensor], layer: str = "last"
    ) -> Tensor:
        return self._context.read_prompts([self._slots[row] for row in rows], read, layer)

    def prompt_ids(self, rows: Sequence[int]) -> list[list[int]]:
        return self._context.prompt_ids([self._slots[row] for row in rows])

    def spread(self, rows: Sequence[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        # Computed for places of the buffer, which is what the selector knows.
        by_number = {self._slots[row]: row for row in rows}
        return self._context.spread(
            [self._slots[row] for row in rows], lambda numbers: compute([by_number[number] for number in numbers])
        )


class BufferedPrompts:
    """
    Let a selector choose among `size` rows that were read ahead of a streaming dataset.

    The selector sees the places of the buffer as a dataset of `size` rows. A row that was generated for leaves its
    place to the next row of the stream before the next choice, and the selector's `forget_rows(rows)` is called with
    those places; its columns can be read until the next generation. A row that is not chosen stays. A stream that ends
    is read again from its beginning.

    Its state has the numbers of the rows in the buffer and how many were read, and no text: a resumed run reads the
    stream again to there. Every rank reads the whole stream and keeps the same buffer.

    Args:
        selector ([`~hf_effi.protocols.PromptSelector`]): Of `size` rows, with a method `forget_rows(rows)`: "these
            rows are other prompts from now on". [`PCL`] has one.
        size (`int`): Rows of the buffer, at least as many as a step generates for.

    Raises:
        TypeError: the selector has no `forget_rows`.

    Example:
    ```python
    >>> from hf_effi.selection import PCL
    >>> BufferedPrompts(PCL(candidates=4), 256).size
    256
    ```
    """

    @keeps_arguments
    def __init__(self, selector: PromptSelector, size: int) -> None:
        if not callable(getattr(selector, "forget_rows", None)):
            raise TypeError(
                f"{type(selector).__name__} has no forget_rows(rows), so that what it knows of a row of the buffer "
                "would be taken for what it knows of the next one there. Use a selector that judges prompts by what "
                "they say, such as PCL, or a map-style dataset."
            )
        self.selector, self.size = selector, check_count("size", size)
        if size > _MOST_ROWS:
            raise ValueError(f"size={size} is above {_MOST_ROWS:,}, the most rows of a buffer.")
        inner = getattr(selector, "size", None)
        if inner not in (None, size):
            raise ValueError(f"the selector was made for {inner} rows, and the buffer has {size}: make it for {size}.")
        self._excludes = "exclude" in inspect.signature(selector.select).parameters
        self._rows: StreamRows | None = None
        #: number of the row in each place
        self._slots: list[int] = []
        #: places whose rows were generated for
        self._used: set[int] = set()
        #: rows that left their places in this generation, whose columns may still be asked for
        self._left: list[int] = []
        self._generation: int | None = None

    def open_stream(self, dataset: Any) -> StreamRows:
        """
        Return the rows by number; the trainer reads what it generates for from here.

        Raises:
            RefusedError: the dataset is no stream.
        """
        if hasattr(dataset, "__len__"):
            raise RefusedError(
                f"BufferedPrompts is for streaming datasets, and this one has {len(dataset)} rows: pass "
                f"{type(self.selector).__name__} itself as prompt_selector=."
            )
        self._rows = StreamRows(dataset, self.size)
        # A selector of an earlier trainer knows rows of that one's stream.
        self._slots.clear()
        self._used.clear()
        self._left.clear()
        self._generation = None
        return self._rows

    @property
    def _opened(self) -> StreamRows:
        if self._rows is None:
            raise ValueError(
                "BufferedPrompts has no stream: pass it to EffiGRPOTrainer(prompt_selector=...), or call "
                "open_stream(dataset) first."
            )
        return self._rows

    def attach(self, context: SelectionContext) -> None:
        """Give the selector a context in which the buffer is the dataset."""
        self._slots[:] = [-1] * self.size
        if callable(getattr(self.selector, "attach", None)):
            self.selector.attach(_SlotContext(context, self._slots, lambda: self._opened))  # type: ignore[attr-defined]

    def _fill(self) -> None:
        rows = self._opened
        if not self._slots or self._slots[0] == -1:
            self._slots[:] = [rows.read() for _ in range(self.size)]
        if not self._used:
            return
        places = sorted(self._used)
        self._left += [self._slots[place] for place in places]
        for place in places:
            self._slots[place] = rows.read()
        self._used.clear()
        self.selector.forget_rows(places)  # type: ignore[attr-defined]

    def select(self, count: int, exclude: Collection[int] = frozenset()) -> list[int]:
        """
        Return `count` numbers of rows in the buffer. Every rank must call it.

        Raises:
            ValueError: the buffer is too small.
        """
        if count > self.size:
            raise ValueError(
                f"a buffer of size={self.size} rows cannot give {count} different prompts for one generation. Use "
                f"BufferedPrompts(selector, size) with a size of at least {count}; several times that leaves a choice."
            )
        self._fill()
        if self._excludes:
            places = {number: place for place, number in enumerate(self._slots)}
            taken = frozenset(places[number] for number in exclude if number in places)
            chosen = self.selector.select(count, exclude=taken)  # type: ignore[call-arg]
        else:
            chosen = self.selector.select(count)
        return [self._slots[place] for place in chosen]

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """Tell the selector what came of these rows, which leave the buffer before the next choice."""
        places = {number: place for place, number in enumerate(self._slots)}
        mine = [places[number] for number in rows]
        if groups.generation != self._generation:
            # Refills are rounds of one generation, whose filters and callbacks are shown the rows of all of them.
            self._generation = groups.generation
            self._opened.drop(self._left)
            self._left.clear()
        self.selector.observe(mine, groups)
        self._used |= set(mine)

    def metrics(self) -> dict[str, float]:
        """Return the selector's, and the rows of the stream that were read."""
        own = self.selector.metrics() if callable(getattr(self.selector, "metrics", None)) else {}  # type: ignore[attr-defined]
        return {**own, "rows_read": float(self._opened.count)}

    def state_dict(self) -> dict[str, Any]:
        rows = self._opened
        return {
            "size": self.size,
            "selector": type(self.selector).__name__,
            "state": self.selector.state_dict(),
            "count": rows.count,
            "starts": list(rows.starts),
            "slots": list(self._slots),
            "used": sorted(self._used),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped; the stream is read again to there.

        Raises:
            MismatchError: the state is of another selector or size, or the stream is shorter.
        """
        mine = {"size": self.size, "selector": type(self.selector).__name__}
        theirs = {name: state[name] for name in mine}
        if theirs != mine:
            raise MismatchError(
                f"the checkpoint's buffer is {theirs}, this one {mine}. Build it as in the run that is resumed, or "
                "start a new run from the checkpoint's weights."
            )
        self._slots[:] = state["slots"]
        self._used = set(state["used"])
        self._left.clear()
        self._generation = None
        if state["count"]:
            self._opened.restore(state["count"], state["starts"], set(self._slots))
        self.selector.load_state_dict(state["state"])
