"""`TokenFile`: the tokens of a corpus in one flat file that is mapped, not loaded; also files of other projects."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from .._untrusted import load_json, shorten
from ..errors import BrokenFileError, MismatchError

TOKENS, OFFSETS, META = "tokens.bin", "docs.idx", "meta.json"
SCHEMA = 1
#: bytes that a check reads at a time
_CHUNK = 1 << 24


class MappedNumbers:
    """
    Numbers in a file, mapped when they are first asked for; pickled as a path, and mapped again where it arrives.

    Args:
        file (`Path`): Little-endian numbers.
        dtype (`str`): Their kind, such as `"uint16"`.
        begin (`int`, *optional*, defaults to 0): Bytes before the first one.
        count (`int`, *optional*): How many there are; up to the end of the file by default.

    Raises:
        BrokenFileError: there is no such file, or it is too short.
    """

    def __init__(self, file: Path, dtype: str, begin: int = 0, count: int | None = None) -> None:
        self.file, self.dtype, self.begin = Path(os.path.abspath(file)), np.dtype(dtype).newbyteorder("<"), begin
        size, _ = self._seen = self._stat()
        self.count = (size - begin) // self.dtype.itemsize if count is None else count
        if begin + self.count * self.dtype.itemsize > size:
            raise BrokenFileError(
                f"{self.file} has {size:,} bytes, and {begin + self.count * self.dtype.itemsize:,} are needed: it was "
                "cut off or copied in part. Copy or write it again."
            )
        self._map: mmap.mmap | None = None
        self._view: np.ndarray | None = None
        self.advice: int | None = None

    def _stat(self) -> tuple[int, int]:
        try:
            found = self.file.stat()
        except OSError as error:
            raise BrokenFileError(f"{self.file} cannot be read: {error.strerror}.") from None
        return found.st_size, found.st_mtime_ns

    @property
    def view(self) -> np.ndarray:
        """The numbers as an array that reads from the file."""
        if self._view is None:
            if self._stat() != self._seen:
                raise MismatchError(
                    f"{self.file} has changed since it was opened: a run would go on with other tokens. Write token "
                    "files into a new folder, and open them after they are written."
                )
            if self.count == 0:
                return np.empty(0, self.dtype)
            with self.file.open("rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            if self.advice is not None and hasattr(self._map, "madvise"):
                self._map.madvise(self.advice)
            self._view = np.frombuffer(self._map, self.dtype, self.count, self.begin)
        return self._view

    def advise(self, random: bool) -> None:
        """Tell the system whether reads jump, so that it does not read pages ahead that nobody asks for."""
        self.advice = getattr(mmap, "MADV_RANDOM" if random else "MADV_SEQUENTIAL", None)
        if self._map is not None and self.advice is not None:
            self._map.madvise(self.advice)

    def will_need(self, begin: int, end: int) -> None:
        """Ask the system to read the numbers `[begin, end)` now, and do not wait for it."""
        if not len(self.view[begin:end]) or self._map is None:
            return
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
            first, last = (self.begin + place * self.dtype.itemsize for place in (begin, end))
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, last - page)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "_view": None}


class TokenFile:
    """
    The tokens of a corpus as [`write_token_file`] wrote them: one flat file, and where each document begins.

    A folder with `tokens.bin` (uint16 where the vocabulary has at most 65,536 tokens, else uint32), `docs.idx` (int64,
    one offset more than there are documents) and `meta.json`. Opening reads the last alone and compares sizes, so that
    it takes as long for 100 GB as for 1 MB; [`~TokenFile.verify`] reads all. Pickled as a path.

    Args:
        folder (`str` or `Path`): What [`write_token_file`] wrote.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The one that the run has; it is compared with the one that
            wrote the file.

    Attributes:
        num_tokens, num_documents (`int`): What it holds.
        meta (`dict`): `meta.json`: dtype, vocab, tokenizer, BOS and EOS, SHA-256 of both files.

    Raises:
        BrokenFileError: a file is missing, damaged, or of another size than was written.
        MismatchError: it was written by another tokenizer.

    Example:
    ```python
    file = TokenFile("corpus", tokenizer)
    print(file.num_tokens, file.document(0))
    ```
    """

    meta: dict[str, Any]

    def __init__(self, folder: str | Path, tokenizer: Any = None) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self._tokens = self._sized(TOKENS, self.meta["dtype"], self.meta["tokens"])
        self._offsets = self._sized(OFFSETS, "int64", self.meta["documents"] + 1)
        self._check_ends()
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)

    def _sized(self, name: str, dtype: str, count: int) -> MappedNumbers:
        numbers = MappedNumbers(self.folder / name, dtype)
        if numbers.count != count or (self.folder / name).stat().st_size % numbers.dtype.itemsize:
            raise BrokenFileError(
                f"{self.folder / name} has {(self.folder / name).stat().st_size:,} bytes, and {META} tells of "
                f"{count:,} numbers of {numbers.dtype.itemsize} bytes: it was cut off, or belongs to another file. "
                "Write it again."
            )
        return numbers

    def _check_ends(self) -> None:
        starts = self.starts
        if not len(starts) or starts[0] != 0 or starts[-1] != self.num_tokens:
            raise BrokenFileError(
                f"The documents of {self.folder} go from {shorten(starts[:1].tolist())} to "
                f"{shorten(starts[-1:].tolist())}, and its tokens from 0 to {self.num_tokens:,}. Write it again."
            )

    # ---- what it holds ----

    @property
    def num_tokens(self) -> int:
        return self._tokens.count

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def starts(self) -> np.ndarray:
        """Where each document begins, and at last where the last one ends; shape `(num_documents + 1,)`."""
        return self._offsets.view

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Return a copy of the tokens `[begin, end)` as int64."""
        if not 0 <= begin <= end <= self.num_tokens:
            raise ValueError(f"[{begin}, {end}) must lie within [0, {self.num_tokens}).")
        return self._tokens.view[begin:end].astype(np.int64)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document as int64."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} is not in [0, {self.num_documents}).")
        return self.tokens(int(self.starts[index]), int(self.starts[index + 1]))

    def starts_within(self, begin: int, end: int) -> np.ndarray:
        """Return where documents begin after `begin` and before `end`, ascending and each once."""
        low, high = np.searchsorted(self.starts, [begin + 1, end])
        return np.unique(self.starts[low:high])

    def advise(self, random: bool) -> None:
        """See [`MappedNumbers`]; for the tokens."""
        self._tokens.advise(random)

    def will_need(self, begin: int, end: int) -> None:
        """Ask the system to read these tokens now, and do not wait for it."""
        self._tokens.will_need(begin, end)

    # ---- checks ----

    def check_tokenizer(self, tokenizer: Any) -> None:
        """
        Compare a tokenizer with the one that wrote the file.

        Raises:
            MismatchError: it is another one.
        """
        stored, found = self.meta["tokenizer"], tokenizer_hash(tokenizer)
        if stored["sha256"] != found:
            raise MismatchError(
                f"{self.folder} was written by the tokenizer {stored['name']!r} ({stored['sha256'][:12]}), and this "
                f"is {getattr(tokenizer, 'name_or_path', '')!r} ({found[:12]}): its numbers mean other tokens. Load "
                "that tokenizer, or write the file again with this one."
            )

    def verify(self) -> None:
        """
        Read every byte and compare it with `meta.json`; documents must not run backwards, and tokens be in range.

        Raises:
            BrokenFileError: the first thing that is wrong.
        """
        for name, stored in self.meta["sha256"].items():
            if (found := _sha256(self.folder / name)) != stored:
                raise BrokenFileError(
                    f"{self.folder / name} is damaged: its SHA-256 is {found[:12]}…, and {stored[:12]}… was written. "
                    "Copy it again, or write it again."
                )
        self._verify_numbers()

    def _verify_numbers(self) -> None:
        if (np.diff(self.starts) < 0).any():
            raise BrokenFileError(f"{self.folder}: a document ends before it begins. Write it again.")
        vocab = self.meta.get("vocab", 1 << 63)  # files of other projects do not say
        step = _CHUNK // 4
        for begin in range(0, self.num_tokens, step):
            most = int(self._tokens.view[begin : begin + step].max())
            if most >= vocab:
                raise BrokenFileError(
                    f"{self.folder} has the token {most}, and a vocabulary of {vocab}. Write it again."
                )

    def __repr__(self) -> str:
        holds = f"{self.num_tokens:,} tokens, {self.num_documents:,} documents"
        return f"{type(self).__name__}({str(self.folder)!r}: {holds})"


class _OfAnotherProject(TokenFile):
    """Tokens of a file that says nothing of its tokenizer; the starts are made when they are first asked for."""

    _made: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        if self._made is None:
            self._made = self._make_starts()
        return self._made

    def _make_starts(self) -> np.ndarray:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def check_tokenizer(self, tokenizer: Any) -> None:
        raise ValueError(f"{self.folder} does not say which tokenizer wrote it, so that none can be compared.")


class MegatronTokenFile(_OfAnotherProject):
    """
    Tokens that Megatron-LM wrote: `PREFIX.bin` and `PREFIX.idx` (version 1).

    The files have no vocabulary and no tokenizer in them, so that neither is compared.

    Args:
        prefix (`str` or `Path`): The common part of both names.

    Raises:
        BrokenFileError: a file is missing, damaged, of another version, or holds no integers.

    Example:
    ```python
    blocks = TokenBlocks(MegatronTokenFile("data/corpus_text_document"), length=2048, shuffle=0)
    ```
    """

    _MAGIC = b"MMIDIDX\x00\x00"
    _KINDS = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
    _HEADER = 34

    def __init__(self, prefix: str | Path) -> None:
        self.folder = Path(prefix)
        index = Path(f"{prefix}.idx")
        try:
            with index.open("rb") as opened:
                head = opened.read(self._HEADER)
        except OSError as error:
            raise BrokenFileError(f"{index} cannot be read: {error.strerror}.") from None
        version, kind = int.from_bytes(head[9:17], "little"), head[17] if len(head) == self._HEADER else 0
        if head[:9] != self._MAGIC or version != 1 or kind not in self._KINDS:
            raise BrokenFileError(
                f"{index} is no index of Megatron-LM of version 1 with integers (magic {head[:9]!r}, version "
                f"{version}, kind {kind}; kinds {sorted(self._KINDS)} are read)."
            )
        sequences, documents = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
        if documents < 1:
            raise BrokenFileError(f"{index} has no documents.")
        self._lengths = MappedNumbers(index, "int32", self._HEADER, sequences)
        self._documents = MappedNumbers(index, "int64", self._HEADER + 12 * sequences, documents)
        self._tokens = MappedNumbers(Path(f"{prefix}.bin"), self._KINDS[kind])
        self.meta = {"dtype": self._KINDS[kind], "tokens": self.num_tokens, "documents": documents - 1, "sha256": {}}
        self._check_ends()

    def _make_starts(self) -> np.ndarray:
        ends = np.concatenate([[0], np.cumsum(self._lengths.view, dtype=np.int64)])
        return ends[self._documents.view]


class NanotronTokenFile(_OfAnotherProject):
    """
    Tokens that datatrove wrote for nanotron: `NAME.ds` and `NAME.ds.index`, the ends of the documents as uint64.

    Args:
        file (`str` or `Path`): The `.ds` file. Its tokens have 2 or 4 bytes, which its size tells.

    Raises:
        BrokenFileError: a file is missing or damaged.

    Example:
    ```python
    blocks = TokenBlocks(NanotronTokenFile("data/00000_shuffled.ds"), length=2048)
    ```
    """

    def __init__(self, file: str | Path) -> None:
        self.folder = Path(file)
        self._ends = MappedNumbers(Path(f"{file}.index"), "uint64")
        count = int(self._ends.view[-1]) if self._ends.count else 0
        size = MappedNumbers(self.folder, "uint8").count
        if not count or size not in (2 * count, 4 * count):
            raise BrokenFileError(
                f"{file} has {size:,} bytes, and its index tells of {count:,} tokens, of 2 or 4 bytes each. Copy both "
                "again."
            )
        dtype = "uint16" if size == 2 * count else "uint32"
        self._tokens = MappedNumbers(self.folder, dtype)
        self.meta = {"dtype": dtype, "tokens": count, "documents": self._ends.count, "sha256": {}}
        self._check_ends()

    def _make_starts(self) -> np.ndarray:
        return np.concatenate([[0], self._ends.view.astype(np.int64)])


def tokenizer_hash(tokenizer: Any) -> str:
    """
    Return the SHA-256 of what decides which numbers a text gets: all of a fast tokenizer but its padding and
    truncation, which a call may set; vocabulary and special tokens of a slow one.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        parts = json.loads(core.to_str())
        parts.pop("padding", None)
        parts.pop("truncation", None)
    else:
        parts = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    parts["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    file = folder / META
    if not file.is_file():
        raise BrokenFileError(
            f"{folder} has no {META}: it is no folder of a token file, or was copied in part. Make one by "
            "write_token_file or `hf-effi tokens write`; for files of Megatron-LM there is MegatronTokenFile."
        )
    meta = load_json(file)
    counts = ("tokens", "documents", "vocab")
    good = isinstance(meta, dict) and all(type(meta.get(name)) is int and meta[name] > 0 for name in counts)
    good = good and meta.get("dtype") in ("uint16", "uint32") and isinstance(meta.get("tokenizer"), dict)
    good = good and all(isinstance(meta["tokenizer"].get(name), str) for name in ("name", "sha256"))
    sums = meta.get("sha256") if good else None
    if (
        not isinstance(sums, dict)
        or set(sums) != {TOKENS, OFFSETS}
        or not all(isinstance(s, str) for s in sums.values())
    ):
        raise BrokenFileError(f"{file} is damaged: it lacks dtype, vocab, tokenizer, tokens, documents or sha256.")
    if meta.get("schema") != SCHEMA:
        raise BrokenFileError(
            f"{file} has schema {shorten(meta.get('schema'))}, and this version reads {SCHEMA}. Update hf_effi, or "
            "write the file again."
        )
    return meta


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
