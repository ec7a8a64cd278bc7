"""`TokenBlocks`: training rows of any length from a token file, in an order that is computed."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import RefusedError
from ..functional.data import check_count, pack_best_fit, shuffled_index
from .token_files import TokenFile

_DOCUMENTS = ("cross", "reset", "best_fit")


class TokenBlocks(Dataset):
    """
    Rows of `length` tokens from a token file, for any Trainer; nothing is tokenised again for another length.

    Row `i` is a function of `(shuffle, i)` alone: pass `i // n`, place `i % n` in that pass, of `n` blocks. The order
    of a pass is a bijection that is computed ([`~hf_effi.functional.data.shuffled_index`]), so that there is no
    permutation to make, to store or to resume: a Trainer that skips to row `k` reads row `k`. Workers get the path
    and map the file themselves.

    Each row has `input_ids` and `labels`; with `documents="reset"` and `"best_fit"` also `position_ids`, which start
    again at each document, and the first token of each document has the label -100. That is what `"hf_effi_varlen"`
    and the masks of transformers (SDPA, eager) know documents by, without an attention mask beside it. FlashAttention
    of transformers does so for a batch of one row only: take `per_device_train_batch_size=1`, or
    [`~TokenBlocks.as_dataset`] with a collator that joins rows (`padding_free=True`). [`TrainDoctor`] measures whether
    documents mix.

    `documents` is one of

    - `"cross"`: blocks are cut from the file as it is. No padding.
    - `"reset"`: the same blocks, and documents do not see each other.
    - `"best_fit"`: whole documents, packed by best fit decreasing; only longer ones than `length` are cut. What is
      left of a row is filled with token 0, as a document of its own without labels. Building it takes time and memory
      for each document (24 bytes), the two others do not.

    The order of the Trainer comes on top: with `train_sampling_strategy="sequential"` rows are served as they are
    here; with the default, `"random"`, the Trainer shuffles them once more, which costs it a permutation in memory.

    Args:
        file ([`TokenFile`]): The tokens.
        length (`int`): Tokens of a row, at least 2.
        shuffle (`int`, *optional*): Seed of the order of blocks, at least 0; the order of the file without.
        documents (`str`, *optional*, defaults to `"cross"`): See above.
        passes (`int`, *optional*, defaults to 1): Times that the dataset holds all blocks, each time in another order.
        readahead (`int`, *optional*, defaults to 0): The system is asked to read this many rows ahead of the one that
            is read, at most 1024. It changes no row. Worth a try where the file is larger than memory and rows are
            served in the order of this dataset; with files in memory, or two cores, it costs time.

    Attributes:
        blocks_per_pass (`int`): Rows of a pass.
        dropped_tokens (`int`): Tokens at the end of the file that fill no block; 0 with `"best_fit"`.

    Raises:
        ValueError: an argument out of range.
        RefusedError: the file has fewer tokens than one row.

    Example:
    ```python
    blocks = TokenBlocks(TokenFile("corpus", tokenizer), length=2048, shuffle=0, passes=3)
    args = TrainingArguments("out", train_sampling_strategy="sequential", num_train_epochs=1)
    Trainer(model, args, train_dataset=blocks).train()
    SFTTrainer(
        model, SFTConfig("out", dataset_kwargs={"skip_prepare_dataset": True}), train_dataset=blocks.as_dataset()
    )
    ```
    """

    def __init__(
        self,
        file: TokenFile,
        length: int,
        *,
        shuffle: int | None = None,
        documents: Literal["cross", "reset", "best_fit"] = "cross",
        passes: int = 1,
        readahead: int = 0,
    ) -> None:
        if not isinstance(file, TokenFile):
            raise ValueError(f"file={file!r} must be a TokenFile, such as TokenFile('folder').")
        if documents not in _DOCUMENTS:
            raise ValueError(f"documents={documents!r} is not known. Use one of {', '.join(map(repr, _DOCUMENTS))}.")
        if check_count("readahead", readahead, 0) > 1024:
            raise ValueError(f"readahead={readahead!r} must be at most 1024 rows.")
        self.file, self.length = file, check_count("length", length, 2)
        self.shuffle = None if shuffle is None else check_count("shuffle", shuffle, 0)
        self.documents, self.passes, self.readahead = documents, check_count("passes", passes), readahead
        self._bins = _Bins.of(file, length) if documents == "best_fit" else None
        self.blocks_per_pass = file.num_tokens // length if self._bins is None else self._bins.count
        self.dropped_tokens = file.num_tokens % length if self._bins is None else 0
        if not self.blocks_per_pass:
            raise RefusedError(
                f"{file} has {file.num_tokens:,} tokens, which fill no row of length={length}. Choose a shorter one."
            )
        file.advise(random=shuffle is not None)

    def __len__(self) -> int:
        return self.blocks_per_pass * self.passes

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = self._checked(index)
        if self.readahead:
            for ahead in range(index + 1, min(index + 1 + self.readahead, len(self))):
                for begin, end in self._spans(ahead):
                    self.file.will_need(begin, end)
        return self._row(index)

    def _checked(self, index: Any) -> int:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} is not in [0, {len(self)}).")
        return index % len(self)

    def block_of(self, index: int) -> int:
        """Return which block of the file row `index` is: the order, without reading anything."""
        number, place = divmod(self._checked(index), self.blocks_per_pass)
        return place if self.shuffle is None else shuffled_index(place, self.blocks_per_pass, self.shuffle, number)

    def _spans(self, index: int) -> list[tuple[int, int]]:
        """Return the pieces of the file that make a row."""
        block = self.block_of(index)
        if self._bins is not None:
            return self._bins.spans(block)
        return [(block * self.length, (block + 1) * self.length)]

    def _parts(self, index: int) -> tuple[np.ndarray, list[int]]:
        """Return the tokens of a row, without padding, and how many each document has."""
        spans = self._spans(index)
        tokens = np.concatenate([self.file.tokens(begin, end) for begin, end in spans])
        if self.documents == "cross":
            return tokens, [len(tokens)]
        if self.documents == "best_fit":
            return tokens, [end - begin for begin, end in spans]
        begin, end = spans[0]
        bounds = [begin, *self.file.starts_within(begin, end).tolist(), end]
        return tokens, [after - before for before, after in zip(bounds, bounds[1:], strict=False)]

    def _row(self, index: int) -> dict[str, torch.Tensor]:
        tokens, lengths = self._parts(index)
        missing = self.length - len(tokens)
        row = torch.zeros(self.length, dtype=torch.int64)
        row[: len(tokens)] = torch.from_numpy(tokens)
        labels = row.clone()
        if self.documents == "cross":
            return {"input_ids": row, "labels": labels}
        positions = torch.cat([torch.arange(length) for length in [*lengths, missing] if length])
        labels[positions == 0] = -100
        labels[len(tokens) :] = -100
        return {"input_ids": row, "labels": labels, "position_ids": positions}

    def as_dataset(self) -> Any:
        """
        Return the rows as a `datasets.Dataset`, which `SFTTrainer` asks for; pass it
        `dataset_kwargs={"skip_prepare_dataset": True}`, as nothing is left to prepare.

        Its rows are lists: `input_ids`, `labels`, and, where documents are kept apart, `seq_lengths`, which TRL's
        packing reads (`padding_free=True`) and which leave padding out. It holds one number for each row in memory.
        """
        from datasets import Dataset as HFDataset

        # In the column that no Trainer takes away as unused.
        return HFDataset.from_dict({"input_ids": range(len(self))}).with_transform(self._listed)

    def _listed(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for index in batch["input_ids"]:
            tokens, lengths = self._parts(index)
            labels = tokens.tolist()
            if self.documents != "cross":
                for place in np.cumsum([0, *lengths[:-1]]).tolist():
                    labels[place] = -100
                found.setdefault("seq_lengths", []).append(lengths)
            found["input_ids"].append(tokens.tolist())
            found["labels"].append(labels)
        return found

    def __repr__(self) -> str:
        return (
            f"TokenBlocks({self.file!r}, length={self.length}, shuffle={self.shuffle}, documents={self.documents!r}, "
            f"passes={self.passes})"
        )


class _Bins:
    """Documents, or pieces of long ones, by the row that they are packed into."""

    def __init__(self, begins: np.ndarray, ends: np.ndarray, bounds: np.ndarray) -> None:
        self.begins, self.ends, self.bounds = begins, ends, bounds
        self.count = len(bounds) - 1

    @classmethod
    def of(cls, file: TokenFile, length: int) -> _Bins:
        starts = np.asarray(file.starts)
        pieces = -(-np.diff(starts) // length)  # of an empty document none
        owner = np.repeat(np.arange(len(pieces)), pieces)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begins = starts[:-1][owner] + within * length
        ends = np.minimum(begins + length, starts[1:][owner])
        rows = pack_best_fit((ends - begins).tolist(), length)
        order = np.array([piece for row in rows for piece in row], np.int64)
        bounds = np.cumsum([0, *map(len, rows)])
        return cls(begins[order], ends[order], bounds)

    def spans(self, row: int) -> list[tuple[int, int]]:
        first, last = self.bounds[row], self.bounds[row + 1]
        return list(zip(self.begins[first:last].tolist(), self.ends[first:last].tolist(), strict=True))
