"""What measured rewards cost: BLEU on token ids beside NLTK's, and texts that were made to take long.

`python -m bench.rewards` writes `bench/results/rewards.json`; it needs nltk (`pip install nltk`), which nothing else
here does. One thread, CPU seconds.

BLEU: candidates are references of which three words in ten were replaced, half to whole as long as the length of the
row, from 32,000 words with the frequencies of a text. `sentence_bleu` of the whole batch and a loop over NLTK's take
turns; a figure is the median over seeds of the ratio of medians, and the headline the smallest of the lengths at a
batch of 256. `from_lists` is with making the padded tensors out of lists of ids, which is what `BLEUReward` does.
`rows` counts n-grams as the paper does, by `torch.unique(dim=0)`. Errors are those of all four smoothings, on the same
batches and on short ones with few words and several references.

Hostile: milliseconds of `JSONReward` on texts of 1 MB; the headline is the slowest.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench._sandbox_throughput import measure as measure_sandbox
from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi.functional.rewards import SMOOTHINGS, sentence_bleu
from hf_effi.rewards import BLEUReward, JSONReward

BATCHES, LENGTHS, WORDS, REPLACED = (32, 256), (64, 256, 1024), 32_000, 0.3
#: (references, candidate, smoothing) -> BLEU of one sentence
Scorer = Callable[[list[list[int]], list[int], str], float]


def nltk_scorer() -> Scorer:
    """
    Return NLTK's BLEU of one sentence.

    Raises:
        SystemExit: nltk is not installed.
    """
    if importlib.util.find_spec("nltk") is None:
        raise SystemExit("bench.rewards compares with NLTK: pip install nltk")
    from nltk.translate.bleu_score import SmoothingFunction
    from nltk.translate.bleu_score import sentence_bleu as theirs

    methods = {name: getattr(SmoothingFunction(), f"method{place}") for place, name in enumerate(SMOOTHINGS)}

    def score(references: list[list[int]], candidate: list[int], smoothing: str) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without smoothing it warns of each 0
            return float(theirs(references, candidate, smoothing_function=methods[smoothing]))

    return score


def texts(batch: int, length: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return candidates and references, lists of ids."""
    drawn = torch.Generator().manual_seed(seed)
    words = (math.log(WORDS) * torch.rand(2, batch, length, generator=drawn)).exp().long()
    kept = torch.rand(batch, length, generator=drawn) >= REPLACED
    candidates, references = torch.where(kept, words[0], words[1]).tolist(), words[0].tolist()
    ends = torch.randint(length // 2, length + 1, (2, batch), generator=drawn).tolist()
    return tuple(  # type: ignore[return-value]
        [row[:end] for row, end in zip(rows, row_ends, strict=True)]
        for rows, row_ends in zip((candidates, references), ends, strict=True)
    )


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return rows of ids as one tensor, with 0 behind."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)


def seconds_of(call: Callable[[], Any]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def measure_bleu(batch: int, length: int, repeats: int, seed: int, theirs: Scorer) -> dict[str, Any]:
    """Return the seconds of each way, which take turns, and their ratio."""
    candidates, references = texts(batch, length, seed)
    ids, others = padded(candidates), padded(references)
    reward, given = BLEUReward(smoothing="floor"), {"completions": [""] * batch, "completion_ids": candidates}
    ways: dict[str, Callable[[], Any]] = {
        "nltk": lambda: [theirs([r], c, "floor") for c, r in zip(candidates, references, strict=True)],
        "ours": lambda: sentence_bleu(ids, others, 0, smoothing="floor"),
        "rows": lambda: sentence_bleu(ids, others, 0, smoothing="floor", counting="rows"),
        "from_lists": lambda: reward(**given, reference=references),
    }
    ways["ours"]()  # the first call of an operation is slower
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            taken[name].append(seconds_of(call))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    speedup = medians["nltk"] / max(medians["ours"], 1e-9)
    seconds = {f"{name}_seconds": round(value, 6) for name, value in medians.items()}
    return {"part": "bleu", "batch": batch, "length": length, "seed": seed, **seconds, "speedup": round(speedup, 2)}


def measure_errors(length: int, batch: int, seed: int, theirs: Scorer) -> dict[str, Any]:
    """Return the largest difference from NLTK's values, over smoothings and two kinds of texts."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 9, (batch,), generator=drawn).tolist()
    few = [torch.randint(1, 5, (size,), generator=drawn).tolist() for size in sizes]
    several = [[torch.randint(1, 5, (1 + size % 6,), generator=drawn).tolist() for _ in range(3)] for size in sizes]
    candidates, references = texts(batch, length, seed)
    worst = 0.0
    for left, right in ((candidates, [[one] for one in references]), (few, several)):
        flat = padded([one for row in right for one in row])
        ids, others = padded(left), flat.view(len(left), -1, flat.size(1))
        for smoothing in SMOOTHINGS:
            wanted = [theirs(refs, one, smoothing) for refs, one in zip(right, left, strict=True)]
            for counting in ("hash", "rows"):
                found = sentence_bleu(ids, others, 0, smoothing=smoothing, counting=counting)
                worst = max(worst, float((found - torch.tensor(wanted, dtype=torch.double)).abs().max()))
    return {"part": "error", "batch": batch, "length": length, "seed": seed, "largest_error": worst}


def measure_hostile(size: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Return the milliseconds that the reward of JSON takes for texts of `size` characters each."""
    kinds = {"deep": "[", "deep objects": '{"a":', "values": "1,", "quotation marks": '"', "backslashes": "\\"}
    kinds |= {"escaped quotes": '\\"', "objects": "{},", "prose in brackets": "{a} ", "digits": "9"}
    reward = JSONReward({"type": "array", "items": {"type": "integer"}}, gate=None)
    found = []
    for kind, piece in kinds.items():
        # Another text in each call: the reward remembers the last one.
        texts = ["[" + " " * number + piece * (size // len(piece)) for number in range(repeats)]
        taken = statistics.median(seconds_of(lambda text=text: reward(completions=[text])) for text in texts)
        found.append({"part": "hostile", "kind": kind, "seed": seed, "milliseconds": round(1000 * taken, 3)})
    return found


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headlines of BLEU, from its rows."""
    largest = max(row["batch"] for row in rows if row["part"] == "bleu")
    speedups: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["part"] == "bleu":
            speedups.setdefault((row["batch"], row["length"]), []).append(row["speedup"])
    medians = {size: round(statistics.median(values), 2) for size, values in speedups.items()}
    found = [headline("bleu_speedup_over_nltk", min(v for (b, _), v in medians.items() if b == largest), ">= 10")]
    found += [headline(f"bleu_speedup_over_nltk_batch_{b}_length_{n}", value) for (b, n), value in medians.items()]
    error = max(row["largest_error"] for row in rows if row["part"] == "error")
    slowest = max((row["milliseconds"] for row in rows if row["part"] == "hostile"), default=None)
    return [
        *found,
        headline("bleu_max_error_vs_nltk", error, "<= 1e-6"),
        headline("json_hostile_milliseconds", slowest, "< 50"),
    ]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS, theirs: Scorer | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    theirs = theirs or nltk_scorer()
    seeds = list(range(args.seeds))
    batches, lengths, repeats = ((2, 4), (8,), 1) if args.quick else (BATCHES, LENGTHS, args.repeats)
    rows = [
        measure_bleu(batch, length, repeats, seed, theirs) for batch in batches for length in lengths for seed in seeds
    ]
    rows += [measure_errors(lengths[0], batches[-1], seed, theirs) for seed in seeds]
    size = 10_000 if args.quick else 1_000_000
    rows += [row for seed in seeds for row in measure_hostile(size, repeats, seed)]
    headlines = figures(rows)
    if not args.quick:
        of_sandbox, more = measure_sandbox(seeds)
        headlines, rows = [*headlines, *of_sandbox], [*rows, *more]
    for row in rows:
        print(row)
    return write_result(
        "rewards", command=command_line("bench.rewards"), seeds=seeds, headline=headlines, rows=rows, folder=folder
    )


if __name__ == "__main__":
    main()
