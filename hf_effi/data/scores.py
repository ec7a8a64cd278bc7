"""
Scores computed once: written into the dataset as a column, with a fingerprint per row, resumable after an
interruption.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import save_json
from ..errors import BrokenFileError, MismatchError
from ..functional.class_paths import class_path
from ..functional.data import check_count, perplexity, word_rarity
from .row_measures import RowLoss

Batch = dict[str, list[Any]]


class RowScorer(ABC):
    """A function of a batch (`dict` of columns) that returns one number per row and can say what it is."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor | Sequence[float]:
        """Return one number per row. A row's number must not depend on the rows beside it."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that changes whenever the scores may."""

    @abstractmethod
    def columns_in(self, names: list[str]) -> list[str]:
        """Return the columns that are read, of those that there are."""


def _require(missing: set[str], names: list[str]) -> None:
    if missing:
        raise ValueError(f"The dataset has no column {sorted(missing)}. It has {names}.")


def model_fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of the names, types, shapes and bytes of all weights: equal weights, equal hash, on any device."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _adapter_state(module: Any) -> tuple[Any, ...]:
    """Return what decides how a PEFT layer uses its weights, beside the weights."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return tuple(getattr(module, name, None) for name in names)


class ModelScore(RowScorer):
    """
    Mean loss of each row under a causal language model, in nats, or its perplexity.

    Reads `input_ids` and, where there are, `labels` (else every token but the first counts) and `attention_mask`. Rows
    are padded on the right. A row without a labelled token scores NaN.

    Args:
        model: Causal language model; it is put into eval mode while it scores, and back.
        kind (`str`, *optional*, defaults to `"loss"`): `"loss"` or `"perplexity"`.

    Raises:
        ValueError: another kind, or, when called, a row whose columns differ in length.
    """

    def __init__(self, model: Any, kind: str = "loss") -> None:
        if kind not in ("loss", "perplexity"):
            raise ValueError(f"kind={kind!r} is not known. Use 'loss' or 'perplexity'.")
        self.model, self.kind = model, kind

    def columns_in(self, names: list[str]) -> list[str]:
        _require({"input_ids"} - set(names), names)
        return [name for name in ("input_ids", "labels", "attention_mask") if name in names]

    def fingerprint(self) -> str:
        config: Any = getattr(self.model, "config", None)
        # Weights alone do not fix the loss: heads, rotary base and the like stand in the config.
        settings = config.to_json_string(use_diff=True) if hasattr(config, "to_json_string") else ""
        adapters = [_adapter_state(module) for module in self.model.modules() if hasattr(module, "active_adapters")]
        # A class of yours may have a name of transformers', and a subclass of this one computes something else.
        model = type(self.model)
        named = model.__name__ if model.__module__.startswith(("transformers.", "peft.")) else class_path(model)
        parts = (self.kind, named, settings, adapters or "", model_fingerprint(self.model))
        own = [] if type(self).__module__.startswith("hf_effi.") else [class_path(type(self))]
        return " ".join([*own, "ModelScore", *map(str, parts)])

    def __call__(self, batch: Batch) -> Tensor:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        data = _padded(rows)
        # The first label predicts nothing: its position has no predecessor.
        empty = (data["labels"][:, 1:] == -100).all(1)
        training = self.model.training
        self.model.eval()
        try:
            losses = RowLoss(rows, lambda _: data, len(rows))(self.model, list(range(len(rows))))
        finally:
            self.model.train(training)
        losses[empty] = float("nan")
        return losses if self.kind == "loss" else perplexity(losses)


def _padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a right-padded batch; positions that the dataset itself masks are cut out first."""
    cut = []
    for row in rows:
        sizes = {name: len(values) for name, values in row.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"A row has columns of different lengths: {sizes}. Give each token one entry in each.")
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        keep = torch.as_tensor(row.get("attention_mask", [1] * len(ids))).bool()
        cut.append((ids[keep], torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.long)[keep]))
    shape = len(rows), max(1, *(len(ids) for ids, _ in cut))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for place, (row_ids, row_labels) in enumerate(cut):
        ids[place, : len(row_ids)], mask[place, : len(row_ids)] = row_ids, 1
        labels[place, : len(row_ids)] = row_labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class ColumnScore(RowScorer):
    """
    A pure function of columns that are there: `row_lengths`, `learnability`, `rarity_under`, `instruct_mining`, your
    own.

    Args:
        function (`Callable`): Called with one list per column, and returns one number per row. It must be importable
            by name, which is its fingerprint together with `settings`: rename it when you change what it computes.
        columns (`Sequence[str]` or `Mapping[str, str]`): Columns in the order of the arguments; a mapping is passed as
            one argument `{key: values of the column}`.
        settings: Keyword arguments of the function, JSON-able.

    Raises:
        ValueError: a lambda or a local function, a function whose value for a row depends on the others, or
            settings that are no JSON.

    Example:
    ```python
    >>> from hf_effi.functional.data import row_lengths
    >>> ColumnScore(row_lengths, ["input_ids"])({"input_ids": [[1, 2], [3]]}).tolist()
    [2.0, 1.0]
    ```
    """

    def __init__(
        self, function: Callable[..., Any], columns: Sequence[str] | Mapping[str, str], **settings: Any
    ) -> None:
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '<object>')}"
        if "<" in name:
            raise ValueError(f"{name} cannot be named in a fingerprint. Define the function in a module.")
        if function is word_rarity:
            raise ValueError(
                "word_rarity depends on all rows at once. Use ColumnScore(rarity_under, ['input_ids'], "
                "counts=token_counts(dataset['input_ids']))."
            )
        if isinstance(columns, str) or not columns:
            raise ValueError(f"columns={columns!r} must be a list of names, or a mapping to names, not empty.")
        self.function, self.columns, self.settings = function, columns, settings
        try:
            # Lists, not mappings: JSON would turn the token 1 into the string "1".
            shown = [[key, _plain(value)] for key, value in sorted(settings.items())]
            chosen = _plain(columns) if isinstance(columns, Mapping) else list(columns)
            self._fingerprint = json.dumps(["ColumnScore", name, chosen, shown])
        except TypeError as error:
            raise ValueError(f"settings of {name} are no JSON: {error}. Use numbers, strings, lists.") from error

    def columns_in(self, names: list[str]) -> list[str]:
        wanted = list(self.columns.values()) if isinstance(self.columns, Mapping) else list(self.columns)
        _require(set(wanted) - set(names), names)
        return wanted

    def fingerprint(self) -> str:
        return self._fingerprint

    def __call__(self, batch: Batch) -> Tensor | Sequence[float]:
        if isinstance(self.columns, Mapping):
            return self.function({key: batch[name] for key, name in self.columns.items()}, **self.settings)
        return self.function(*(batch[name] for name in self.columns), **self.settings)


def _plain(value: Any) -> Any:
    return [[key, _plain(inner)] for key, inner in value.items()] if isinstance(value, Mapping) else value


def _as_json(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return repr(value)
    raise ValueError(f"A value of type {type(value).__name__} cannot be hashed. Name the columns to read: columns=.")


def _marks(batch: Batch, scorer: str) -> list[int]:
    """Return one signed 64-bit hash per row, of the scorer and of what it reads in this row."""
    names = sorted(batch)
    head = hashlib.sha256(json.dumps([scorer, names]).encode())
    found = []
    for values in zip(*(batch[name] for name in names), strict=True):
        row = head.copy()
        row.update(json.dumps(values, default=_as_json, sort_keys=True).encode())
        found.append(int.from_bytes(row.digest()[:8], "big", signed=True))
    return found


class _Shards:
    """Finished shards on disk, one file each, named by what they hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, marks: list[int]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]}.json"

    def read(self, marks: list[int]) -> list[float] | None:
        path = self.path(marks)
        if not path.exists():
            return None
        try:
            scores = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BrokenFileError(
                f"{path} is damaged ({error}). Delete it; its rows are then scored again."
            ) from error
        if not isinstance(scores, list) or len(scores) != len(marks):
            raise BrokenFileError(f"{path} does not hold {len(marks)} scores. Delete it; its rows are scored again.")
        return scores

    def write(self, marks: list[int], scores: list[float]) -> None:
        save_json(self.path(marks), scores)  # in full or not at all, also when two processes write it


def _identify(score_fn: Any, fingerprint: str | None, columns: Sequence[str] | None, names: list[str]) -> tuple:
    """Return what identifies the scorer, and the columns it reads."""
    if isinstance(score_fn, RowScorer):
        if fingerprint is not None or columns is not None:
            raise ValueError(f"{type(score_fn).__name__} knows its fingerprint and columns; leave both out.")
        return score_fn.fingerprint(), score_fn.columns_in(names)
    if not callable(score_fn):
        raise ValueError(f"score_fn={score_fn!r} must be a RowScorer or a function of a batch.")
    if not fingerprint:
        raise ValueError(
            "A plain score_fn needs fingerprint='...': a string that you change whenever its scores may change, such "
            "as 'judge-v2 prompt-3'."
        )
    chosen = names if columns is None else list(columns)
    _require(set(chosen) - set(names), names)
    if not chosen:
        raise ValueError("columns=[] leaves nothing to score. Name at least one column.")
    return f"plain {fingerprint}", chosen


def _score(score_fn: Callable[[Batch], Any], batch: Batch, first: int, size: int, nan: str) -> list[float]:
    scores = torch.as_tensor(score_fn(batch)).detach().to("cpu", torch.float64)
    if scores.shape != (size,):
        raise ValueError(f"score_fn returned shape {tuple(scores.shape)} for {size} rows. Return one number per row.")
    missing = scores.isnan().nonzero().flatten()
    if nan == "error" and missing.numel():
        raise ValueError(
            f"The score of row {first + int(missing[0])} is NaN. Drop or repair the row, or pass nan='keep' and have "
            "the sampler treat it: QualityAscendingSampler(..., nan='median')."
        )
    return scores.tolist()


def _check_existing(dataset: Any, name: str, mark_name: str, marks_of: Callable[[int], list[int]], size: int) -> None:
    fix = "Choose another name, or pass overwrite=True."
    if name not in dataset.column_names or mark_name not in dataset.column_names:
        there = name if name in dataset.column_names else mark_name
        raise MismatchError(
            f"The column {there!r} exists without its partner ({name!r}, {mark_name!r}): its origin is unknown. {fix}"
        )
    plain = dataset.select_columns([mark_name]).with_format(None)
    for first in range(0, len(dataset), size):
        stored = plain[first : first + size][mark_name]
        for row, (old, new) in enumerate(zip(stored, marks_of(first), strict=True), first):
            if old != new:
                raise MismatchError(
                    f"The column {name!r} has another fingerprint in row {row}: it was scored by another scorer, with "
                    f"other settings, or the row was changed since. {fix}"
                )


def add_score(
    dataset: Any,
    name: str,
    score_fn: RowScorer | Callable[[Batch], Tensor | Sequence[float]],
    *,
    batch_size: int = 8,
    shard_size: int = 1024,
    cache_dir: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    columns: Sequence[str] | None = None,
    nan: str = "error",
    overwrite: bool = False,
    progress: bool = True,
) -> Any:
    """
    Return the dataset with the column `name`, one score per row, and `name + "_fingerprint"`, one hash per row.

    The hash covers the scorer (weights, settings) and what it reads of the row, so that it stays right when rows are
    shuffled, filtered or concatenated. A dataset that has the column for these rows and this scorer comes back as it
    is. Finished shards are kept in `cache_dir`: after an interruption, call it again with the same `shard_size`.

    Args:
        dataset (`datasets.Dataset`): Map-style.
        name (`str`): Column to write.
        score_fn (`RowScorer` or `Callable`): [`ModelScore`], [`ColumnScore`], or a function of a batch (`dict` of
            lists).
        batch_size (`int`, *optional*, defaults to 8): Rows scored at once. Not in the fingerprint: another padding may
            change the last bits of a loss.
        shard_size (`int`, *optional*, defaults to 1024): Rows that an interruption can cost.
        cache_dir (`str`, *optional*): Folder of the shards; `effi_scores` in the cache of `datasets` if `None`.
        fingerprint (`str`, *optional*): Names a plain function, and must change when its scores may.
        columns (`Sequence[str]`, *optional*): What a plain function reads; every column if `None`.
        nan (`str`, *optional*, defaults to `"error"`): `"error"` or `"keep"`.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a column of another fingerprint.
        progress (`bool`, *optional*, defaults to `True`): One bar over the rows.

    Raises:
        MismatchError: the column exists and belongs to other rows or another scorer.
        ValueError: a dataset without length or rows, a plain function without a fingerprint, a NaN, a wrong
            number of scores, a missing column, a damaged shard, or an argument out of range.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "add_column") and hasattr(dataset, "select_columns")):
        raise ValueError(f"dataset is a {type(dataset).__name__}. Pass a datasets.Dataset: one split, not streaming.")
    if len(dataset) == 0:
        raise ValueError("The dataset has no row to score.")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} must be the name of a column, not empty.")
    if nan not in ("error", "keep"):
        raise ValueError(f"nan={nan!r} is not known. Use 'error' or 'keep'.")
    check_count("batch_size", batch_size)
    check_count("shard_size", shard_size)
    mark_name = f"{name}_fingerprint"
    mine = {name, mark_name}
    inputs = [column for column in dataset.column_names if column not in mine]
    scorer, read = _identify(score_fn, fingerprint, columns, inputs)
    plain = dataset.select_columns(read).with_format(None)

    def marks_of(first: int) -> list[int]:
        return _marks(plain[first : first + shard_size], scorer)

    present = mine & set(dataset.column_names)
    if present and not overwrite:
        _check_existing(dataset, name, mark_name, marks_of, shard_size)
        return dataset
    scores, marks = _all_scores(
        plain,
        score_fn,
        scorer,
        name=name,
        batch_size=batch_size,
        shard_size=shard_size,
        cache_dir=cache_dir,
        nan=nan,
        progress=progress,
    )
    return dataset.remove_columns(sorted(present)).add_column(name, scores).add_column(mark_name, marks)


def _all_scores(
    plain: Any,
    score_fn: Callable[[Batch], Any],
    scorer: str,
    *,
    name: str,
    batch_size: int,
    shard_size: int,
    cache_dir: str | os.PathLike | None,
    nan: str,
    progress: bool,
) -> tuple[list[float], list[int]]:
    # Here, so that the samplers stay light for those who do not score.
    import datasets
    from transformers.utils import logging as hf_logging

    shards = _Shards(Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "effi_scores"))
    scores: list[float] = []
    marks: list[int] = []
    with hf_logging.tqdm(total=len(plain), desc=f"Scoring {name}", unit="row", disable=not progress) as bar:
        for first in range(0, len(plain), shard_size):
            shard = plain[first : first + shard_size]
            found = _marks(shard, scorer)
            done = shards.read(found)
            if done is not None and nan == "error" and any(score != score for score in done):
                done = None  # kept under nan='keep'; scored again, so that the error names the row
            if done is None:
                done = []
                for begin in range(0, len(found), batch_size):
                    batch = {key: values[begin : begin + batch_size] for key, values in shard.items()}
                    size = min(batch_size, len(found) - begin)
                    done += _score(score_fn, batch, first + begin, size, nan)
                    bar.update(size)
                shards.write(found, done)
            else:
                bar.update(len(found))
            scores += done
            marks += found
    return scores, marks
