"""Rows per second, time to the first batch and memory: a token file beside `datasets` on the same rows.

    python -m bench.token_files            # about 5 minutes on one core
    python -m bench.token_files --quick    # seconds: does every part run; nothing is written

A synthetic corpus of documents (lengths log-normal, 400 tokens in the median, ids below 32,000) is written as a token
file and as a `datasets` folder of the same packed rows (`input_ids`, int32, what TRL's "wrapped" packing leaves). Both
lie in the file cache when they are read. Three ways to serve them, each by a `DataLoader` of the same batches of
tensors, one thread, no workers, random order:

- `blocks`: `TokenBlocks(shuffle=seed)`, in its own order;
- `datasets_torch`: `load_from_disk(...).with_format("torch")` and a random sampler;
- `datasets_list`: the same without a format, lists that the collator makes tensors of, as TRL's does.

Rows per second: all rows of the corpus in turns of 200 batches that alternate between the ways, median of the turns.
Time to the first batch and memory: a process of its own for each way and seed, from after the imports; memory is what
was added when all rows have been read once, anonymous and of files, from /proc/self/smaps_rollup. Another length: from
the tokenised documents (a token file; a `datasets` folder of documents that is packed by `trl.pack_dataset`) to the
first batch of rows of twice the length, beside the same with the token file. The goals were set before the first run:
not slower, not later, no more memory than `datasets` in torch format, and a new length in a tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from torch.utils.data import DataLoader, SequentialSampler

from bench._schema import ROOT, command_line, headline, write_result
from hf_effi.data import TokenBlocks, TokenFile
from hf_effi.data.token_writer import write_token_file

WAYS = ("blocks", "datasets_torch", "datasets_list")
VOCAB, BATCH, MEDIAN = 32_000, 8, 400


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        tokens (`int`): Of the corpus, about.
        length (`int`): Of a row.
        turn (`int`): Batches of a turn.
        turns (`int`): Of each way.
        seeds (`tuple[int, ...]`): Corpus and order.
    """

    tokens: int = 20_000_000
    length: int = 1024
    turn: int = 200
    turns: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)


WHOLE, QUICK = Size(), Size(tokens=60_000, length=64, turn=10, turns=2, seeds=(0,))


class Numbers:
    """Stands for a tokenizer: the documents are numbers already."""

    name_or_path, special_tokens_map = "synthetic", {}

    def __len__(self) -> int:
        return VOCAB

    def get_vocab(self) -> dict[str, int]:
        return {"vocab": VOCAB}


def documents(size: Size, seed: int) -> list[np.ndarray]:
    """Return documents of random tokens."""
    draw = np.random.default_rng(seed)
    lengths = np.maximum(draw.lognormal(np.log(MEDIAN), 1.0, size.tokens // MEDIAN), 1).astype(np.int64)
    ends = np.cumsum(lengths)
    lengths = lengths[: int(np.searchsorted(ends, size.tokens)) + 1]
    tokens = draw.integers(0, VOCAB, int(lengths.sum()), dtype=np.int32)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def prepare(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Write the corpus in its three forms and return their bytes."""
    texts = documents(size, seed)
    file = write_token_file(texts, Numbers(), folder / "tokens", eos=False, column="input_ids")
    blocks = TokenBlocks(file, size.length)
    rows = [file.tokens(i * size.length, (i + 1) * size.length).astype(np.int32) for i in range(len(blocks))]
    Dataset.from_dict({"input_ids": rows}).save_to_disk(str(folder / "packed"))
    Dataset.from_dict({"input_ids": texts}).save_to_disk(str(folder / "documents"))
    sizes = {name: sum(f.stat().st_size for f in (folder / name).rglob("*")) for name in ("tokens", "packed")}
    return {"rows": len(blocks), **{f"{name}_bytes": value for name, value in sizes.items()}}


def joined(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate as the default and TRL's collator do: stack tensors, or make tensors of lists."""
    if isinstance(rows[0]["input_ids"], torch.Tensor):
        tokens = torch.stack([row["input_ids"] for row in rows])
    else:
        tokens = torch.stack([torch.tensor(row["input_ids"]) for row in rows])
    return {"input_ids": tokens, "labels": tokens.clone()}


def loader(way: str, folder: Path, length: int, seed: int) -> DataLoader:
    """Open the rows in one of the ways."""
    if way == "blocks":
        blocks = TokenBlocks(TokenFile(folder / "tokens"), length, shuffle=seed)
        return DataLoader(blocks, BATCH, sampler=SequentialSampler(blocks), collate_fn=joined, drop_last=True)
    rows = load_from_disk(str(folder / "packed"))
    rows = rows.with_format("torch") if way == "datasets_torch" else rows
    order = torch.Generator().manual_seed(seed)
    return DataLoader(rows, BATCH, shuffle=True, generator=order, collate_fn=joined, drop_last=True)


def endless(way: str, folder: Path, size: Size, seed: int) -> Iterator[Any]:
    while True:
        yield from loader(way, folder, size.length, seed)


def speeds(folder: Path, size: Size, seed: int) -> dict[str, float]:
    """Return the rows per second of each way: medians of turns that alternate."""
    streams = {way: endless(way, folder, size, seed) for way in WAYS}
    for stream in streams.values():
        next(stream)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    order = random.Random(seed)
    for _ in range(size.turns):
        for way in order.sample(WAYS, len(WAYS)):
            begin = time.perf_counter()
            for _ in range(size.turn):
                next(streams[way])
            found[way].append(size.turn * BATCH / (time.perf_counter() - begin))
    return {way: statistics.median(values) for way, values in found.items()}


def resident() -> dict[str, int]:
    """Return the resident bytes of this process: its own, and pages of files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    return {"own": values["Anonymous"], "files": values["Rss"] - values["Anonymous"]}


def child(way: str, folder: Path, length: int, seed: int) -> dict[str, float]:
    """Open, wait for the first batch, read all rows: in a process of its own."""
    before, begin = resident(), time.perf_counter()
    batches = iter(loader(way, folder, length, seed))
    next(batches)
    first = time.perf_counter() - begin
    for _ in batches:
        pass
    after = resident()
    return {"first_batch_seconds": first, **{f"{name}_bytes": after[name] - before[name] for name in after}}


def new_length(way: str, folder: Path, length: int, seed: int) -> dict[str, float]:
    """From tokenised documents to the first batch of another length: in a process of its own."""
    from trl import pack_dataset

    begin = time.perf_counter()
    if way == "blocks":
        next(iter(loader(way, folder, length, seed)))
    else:
        # Without a cache file of an earlier call.
        rows = pack_dataset(
            load_from_disk(str(folder / "documents")), length, "wrapped", {"load_from_cache_file": False}
        ).with_format("torch")
        next(iter(DataLoader(rows, BATCH, shuffle=True, collate_fn=joined)))
    return {"new_length_seconds": time.perf_counter() - begin}


PARTS = {"child": child, "new_length": new_length}


def in_a_process(part: str, *arguments: Any) -> dict[str, float]:
    """Run `child` or `new_length` in a new process."""
    command = [sys.executable, "-m", "bench.token_files", "--child", part, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{part} of {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: Size, seed: int) -> list[dict[str, Any]]:
    """Return one row for each way. A quick look stays in this process."""
    quick = size == QUICK
    apart = (lambda part, *arguments: PARTS[part](*arguments)) if quick else in_a_process
    with tempfile.TemporaryDirectory(prefix="token_files_") as name:
        folder = Path(name)
        told = prepare(folder, size, seed)
        rate = speeds(folder, size, seed)
        rows = []
        for way in WAYS:
            row = {"seed": seed, "way": way, "length": size.length, **told, "rows_per_second": round(rate[way], 1)}
            row |= apart("child", way, folder, size.length, seed)
            if way != "datasets_list":
                row |= apart("new_length", way, folder, 2 * size.length, seed)
            rows.append(row)
            print(row, flush=True)
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: medians over seeds of the ratio of both in one seed."""

    def ratio(value: Any, other: str = "datasets_torch") -> float:
        by = {(row["seed"], row["way"]): value(row) for row in rows if row["way"] in ("blocks", other)}
        seeds = sorted({seed for seed, _ in by})
        return round(statistics.median(by[seed, "blocks"] / by[seed, other] for seed in seeds), 4)

    def memory(row: dict[str, Any]) -> float:
        return row["own_bytes"] + row["files_bytes"]

    return [
        headline("token_file_rows_per_second_ratio", ratio(lambda row: row["rows_per_second"]), ">= 1"),
        headline("token_file_first_batch_ratio", ratio(lambda row: row["first_batch_seconds"]), "<= 1"),
        headline("token_file_resident_bytes_ratio", ratio(memory), "<= 1"),
        headline("token_file_new_length_ratio", ratio(lambda row: row["new_length_seconds"]), "<= 0.1"),
        headline(
            "token_file_rows_per_second_ratio_to_lists", ratio(lambda row: row["rows_per_second"], "datasets_list")
        ),
        headline("token_file_bytes_ratio", round(rows[0]["tokens_bytes"] / rows[0]["packed_bytes"], 4)),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every part in seconds; nothing is written")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not args.quick:
        disable_progress_bars()
    if args.child:
        part, way, folder, length, seed = args.child
        print(json.dumps(PARTS[part](way, Path(folder), int(length), int(seed))))
        return []
    size = QUICK if args.quick else WHOLE
    rows = [row for seed in size.seeds for row in measure(size, seed)]
    found = figures(rows)
    for figure in found:
        print(figure)
    if not args.quick:
        write_result(
            "token_files", command=command_line("bench.token_files"), seeds=size.seeds, headline=found, rows=rows
        )
    return rows


if __name__ == "__main__":
    main()
