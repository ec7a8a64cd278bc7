"""`SequenceLengthMixin`: sequence length as a function of the step, by cutting full rows into shorter ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ...callbacks.multigrid import SEQUENCE_LENGTH
from ...callbacks.owners import claim
from ...callbacks.probing import trained_steps, trained_total
from ...errors import RefusedError
from ...functional import metrics
from ...functional.data import rechunk

#: what fills up the last piece of a row, by the name of the input
_FILLS = {"input_ids": 0, "labels": -100, "attention_mask": 0, "token_type_ids": 0}


class SequenceLengthMixin:
    """
    Give a Trainer a constructor argument `sequence_length`.

    Rows of `L` tokens (packed text) are cut into `ceil(L / length)` rows of `length` tokens after they left the
    dataloader, so the switch is exact at its step in spite of prefetching, every token is trained on, the tokens of a
    step stay the same, and a resumed run needs no state. Each piece starts at position 0 and does not see the piece
    before it.

    Args:
        sequence_length (`Callable[[int, int], int]`, *optional*): `(finished updates, max_steps) -> length`. Without
            it nothing changes. Updates that a search tries and undoes (`AutoLRSCallback`) count in neither number.

    Raises:
        ValueError: the rows are padded or carry `position_ids`, or the length is below 2.

    Example:
    ```python
    class GrowingTrainer(SequenceLengthMixin, Trainer):
        pass


    def length(step, total):
        return 128 if step < total // 2 else 512


    GrowingTrainer(model, args, train_dataset=rows, sequence_length=length)
    ```
    """

    sequence_length: Callable[[int, int], int] | None = None
    _length_now: int | None = None

    def __init__(self, *args: Any, sequence_length: Callable[[int, int], int] | None = None, **kwargs: Any) -> None:
        if sequence_length is not None and not callable(sequence_length):
            raise ValueError(
                f"sequence_length={sequence_length!r} must be a function of (finished updates, max_steps)."
            )
        self.sequence_length = sequence_length
        super().__init__(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.sequence_length is not None:
            claim(self.state, SEQUENCE_LENGTH, self.sequence_length, "sequence_length=")
        return super()._prepare_for_training(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        if self.sequence_length is not None:
            length = self.sequence_length(trained_steps(self.state), trained_total(self.state))
            if not isinstance(length, int) or length < 2:
                raise ValueError(f"sequence_length gave {length!r}: a row needs at least 2 tokens to predict one.")
            # Lazily, over the same iterator: only the batches of this update are cut.
            epoch_iterator = (cut_batch(batch, length) for batch in epoch_iterator)
            self._length_now = length
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._length_now is not None and "loss" in logs:
            logs = {**logs, metrics.SEQUENCE_LENGTH: self._length_now}
        super().log(logs, *args, **kwargs)


def cut_batch(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """
    Return the batch with every input of shape `(rows, tokens, ...)` cut to `length`.

    Raises:
        RefusedError: padding, `position_ids`, or an input that is not known.
    """
    rows, tokens = batch["input_ids"].shape
    if length >= tokens:
        return batch
    unknown = [key for key, value in batch.items() if key not in _FILLS and isinstance(value, Tensor) and value.ndim]
    if unknown:
        raise RefusedError(
            f"The batch carries {unknown}, which cannot be cut into pieces. Use a collator that gives input_ids, "
            "labels and attention_mask only (with packing: without padding-free position_ids)."
        )
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise RefusedError(
            "Rows are padded, so some pieces would hold nothing but padding. Pack the text into rows of one length."
        )
    cut = dict(batch)
    if tokens % length and mask is None:
        cut["attention_mask"] = (batch["input_ids"] == batch["input_ids"]).long()
    return {
        key: rechunk(value, length, _FILLS[key]) if isinstance(value, Tensor) and key in _FILLS else value
        for key, value in cut.items()
    }
