"""`write_token_file`: tokenise a corpus once, into one flat file."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .._files import save_aside
from ..functional.data import check_count
from .token_files import META, OFFSETS, SCHEMA, TOKENS, TokenFile, tokenizer_hash

logger = logging.getLogger(__name__)
#: largest vocabulary whose tokens have two bytes
_SMALL = 1 << 16

_Encoded = tuple[np.ndarray, np.ndarray]


class _Encoder:
    """Turns rows into tokens; it is sent to each worker once."""

    def __init__(self, tokenizer: Any, column: str, bos: int | None, eos: int | None) -> None:
        self.tokenizer, self.column = tokenizer, column
        self.before, self.behind = ([token] if token is not None else [] for token in (bos, eos))
        self.vocab = len(tokenizer)
        self.dtype = "uint16" if self.vocab <= _SMALL else "uint32"

    def __call__(self, first: int, rows: list[Any]) -> _Encoded:
        """Return the tokens of some rows, one after the other, and how many each has."""
        values = [self._value(first + place, row) for place, row in enumerate(rows)]
        if isinstance(values[0], str):
            # Not told that a document is longer than the model: it is cut into blocks later.
            encoded = self.tokenizer(values, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            encoded = values
        documents = [self._document(first + place, tokens) for place, tokens in enumerate(encoded)]
        lengths = np.array([len(document) for document in documents], np.int64)
        return np.concatenate(documents).astype(self.dtype), lengths

    def _value(self, number: int, row: Any) -> Any:
        if isinstance(row, Mapping):
            if self.column not in row:
                raise ValueError(
                    f"Row {number} has no column {self.column!r}. It has {', '.join(map(str, row))[:300]}."
                )
            row = row[self.column]
        if not isinstance(row, str) and (not hasattr(row, "__len__") or isinstance(row, (bytes, dict))):
            raise ValueError(
                f"Row {number} has a {type(row).__name__} in column {self.column!r}, and a text or a list of tokens "
                "is needed. Name the column with column=."
            )
        return row

    def _document(self, number: int, tokens: Any) -> np.ndarray:
        if isinstance(tokens, str):
            raise ValueError(f"Row {number} is a text, and the rows before it are tokens. Write one kind into a file.")
        document = np.array([*self.before, *tokens, *self.behind])
        if not document.size:
            return np.empty(0, np.int64)
        if document.ndim != 1 or document.dtype.kind not in "iu" or document.min() < 0 or document.max() >= self.vocab:
            raise ValueError(
                f"Row {number} has tokens that are no integers in [0, {self.vocab}), the vocabulary of the tokenizer: "
                f"{repr(document)[:80]}."
            )
        return document


#: of a worker
_encoder: _Encoder


def _start_worker(encoder: _Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _encoder = encoder


def _encode(first: int, rows: list[Any]) -> _Encoded:
    return _encoder(first, rows)


def write_token_file(
    rows: Iterable[Any],
    tokenizer: Any,
    folder: str | Path,
    *,
    column: str = "text",
    bos: bool = False,
    eos: bool = True,
    workers: int = 1,
    batch_rows: int = 256,
    overwrite: bool = False,
) -> TokenFile:
    """
    Tokenise a corpus into a folder that [`TokenFile`] opens.

    Rows are read once, as a stream; no more than `batch_rows x workers x 2` of them are in memory. Tokens are those
    of `tokenizer(text, add_special_tokens=False)`, with BOS and EOS as asked for, whatever the tokenizer adds by
    itself. All is written beside `folder` and renamed at the end: whatever kills the process, `folder` holds the whole
    file or what was there before, and the next call begins anew. The files are the same, to the byte, for any number
    of workers. With several ranks, write before training, or in `with args.main_process_first():`.

    Args:
        rows (`Iterable`): Rows with a column of texts or of tokens, or the texts or lists of tokens themselves: a
            `datasets.Dataset`, a streaming one, a generator.
        tokenizer (`PreTrainedTokenizerBase`): What tokenises. Its hash is stored, also where rows hold tokens already.
        folder (`str` or `Path`): Where it goes.
        column (`str`, *optional*, defaults to `"text"`): Of the text, or of the tokens.
        bos, eos (`bool`, *optional*, defaults to `False` and `True`): Whether each document begins with the BOS token
            and ends with the EOS token.
        workers (`int`, *optional*, defaults to 1): Processes that tokenise; with 1 it is this one.
        batch_rows (`int`, *optional*, defaults to 256): Rows of one call of the tokenizer.
        overwrite (`bool`, *optional*, defaults to `False`): Replace what is at `folder`.

    Raises:
        ValueError: no row, a row without the column, tokens outside of the vocabulary, a tokenizer without the token
            that is asked for.
        FileExistsError: something is at `folder`.

    Example:
    ```python
    file = write_token_file(load_dataset("json", data_files="corpus.jsonl", split="train"), tokenizer, "corpus")
    blocks = TokenBlocks(file, length=2048, shuffle=0)
    ```
    """
    check_count("workers", workers)
    check_count("batch_rows", batch_rows)
    folder = Path(folder)
    if isinstance(rows, (str, bytes)):
        raise ValueError(f"rows={str(rows)[:80]!r} is one text. Pass rows, or a list of texts.")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists. Pass overwrite=True to replace it, or write into another folder.")
    _tell_leftovers(folder)
    ends = {name: _special(tokenizer, name) if wanted else None for name, wanted in (("bos", bos), ("eos", eos))}
    encoder = _Encoder(tokenizer, column, ends["bos"], ends["eos"])

    def write(part: Path) -> None:
        part.mkdir()
        told = _write_numbers(part, _encoded(rows, encoder, workers, batch_rows), encoder.dtype)
        meta = {
            "schema": SCHEMA,
            "dtype": encoder.dtype,
            "vocab": encoder.vocab,
            "tokenizer": {"name": str(tokenizer.name_or_path), "sha256": tokenizer_hash(tokenizer)},
            **ends,
            **told,
        }
        (part / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    save_aside(folder, write)
    return TokenFile(folder)


def _special(tokenizer: Any, name: str) -> int:
    token = getattr(tokenizer, f"{name}_token_id", None)
    if token is None:
        raise ValueError(
            f"{name}=True, and the tokenizer has no {name.upper()} token. Set tokenizer.{name}_token, or pass "
            f"{name}=False."
        )
    return token


def _encoded(rows: Iterable[Any], encoder: _Encoder, workers: int, batch_rows: int) -> Iterator[_Encoded]:
    """Yield the tokens of one batch of rows after the other, in the order of the rows."""
    stream, place = iter(rows), itertools.count(0, batch_rows)
    batches = ((next(place), batch) for batch in iter(lambda: list(itertools.islice(stream, batch_rows)), []))
    if workers == 1:
        yield from (encoder(first, batch) for first, batch in batches)
        return
    waiting: deque[Future[_Encoded]] = deque()
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        try:
            for first, batch in batches:
                waiting.append(pool.submit(_encode, first, batch))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _write_numbers(part: Path, encoded: Iterable[_Encoded], dtype: str) -> dict[str, Any]:
    """Write tokens and offsets into the folder in progress, and return their counts and sums."""
    tokens = documents = 0
    sums = {name: hashlib.sha256() for name in (TOKENS, OFFSETS)}
    with (part / TOKENS).open("wb") as numbers, (part / OFFSETS).open("wb") as offsets:

        def put(name: str, file: Any, values: np.ndarray, kind: str) -> None:
            content = values.astype(np.dtype(kind).newbyteorder("<")).tobytes()
            file.write(content)
            sums[name].update(content)

        put(OFFSETS, offsets, np.zeros(1, np.int64), "int64")
        for values, lengths in encoded:
            put(TOKENS, numbers, values, dtype)
            put(OFFSETS, offsets, tokens + np.cumsum(lengths), "int64")
            tokens, documents = tokens + len(values), documents + len(lengths)
    if not tokens:
        raise ValueError(f"There are no tokens to write: {documents} rows were read.")
    return {"tokens": tokens, "documents": documents, "sha256": {name: sum.hexdigest() for name, sum in sums.items()}}


def _tell_leftovers(folder: Path) -> None:
    """Name what a killed call left beside the folder: it may be large, and another process may be writing it now."""
    found = sorted(str(path) for path in folder.parent.glob(f"_????????_{folder.name}"))
    if found:
        logger.warning(
            "Left by calls that were killed, unless another process is writing them now: %s", ", ".join(found)
        )
