"""2:4 sparse training of the FFN, emulated from scratch, beside dense models with all and with half of its products.

    python -m bench.sparse_24

The criterion, set before the first run: go if (1) forward and backward of the FFN block are at least 1.15x faster than
dense, measured on a GPU (`bench.gpu.run_all`), or until then counted at the lowest gain of a sparse product; and (2)
the held-out loss is above dense by no more than the standard deviation of dense over the seeds; and (3) on every seed
it is below a dense model with half of the FFN's products. Each arm tunes its own learning rate over the same values.

The counted times are a model, not a measurement: dense bf16 products at 790 TFLOP/s, memory at 4.3 TB/s, sparse
products 2x (ideal) or 1.2x to 1.5x as fast (assumed).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from bench._ffn_study import (
    INTERMEDIATE,
    LEARNING_RATES,
    SEEDS,
    TUNING_SEED,
    UPDATES,
    build,
    ffn_linears,
    losses,
    mean_difference,
    train,
    tuned,
)
from bench._schema import command_line, headline, write_result
from bench.prototypes.sparse_24 import Sparse24Linear, flip_rate, masked_decay_, transposable_mask
from bench.schedules import Data

REFRESH, DENSE_FROM = 40, UPDATES - UPDATES // 6
DECAYS, FLIP_RATIO, DECAY_UPDATES = (0.0, 2e-4, 2e-3, 2e-2), (0.6, 0.95), UPDATES // 4
DENSE, HALF, MASKED, SOFT = "dense", "dense, half of the FFN", "2:4, transposable mask", "2:4, soft threshold"
TERAFLOPS, TERABYTES = 790.0, 4.3
TOKENS, LENGTH, HIDDEN, FFN, KEY_VALUE = 16_384, 8192, 4096, 14_336, 1024
SPEEDS = {"1_2": 1.2, "1_5": 1.5, "ideal": 2.0}


def masked_run(data: Data, learning_rate: float, decay: float, seed: int, until: int = UPDATES) -> dict[str, Any]:
    """
    Train with transposable masks, and dense at the end; return the loss, the flip rates and the seconds of the search.
    """
    model, flips, seconds = build(seed), [], []
    linears = [Sparse24Linear(linear) for _, _, linear in ffn_linears(model)]
    for (parent, name, _), linear in zip(ffn_linears(model), linears, strict=True):
        setattr(parent, name, linear)

    def before(_: Any, update: int) -> None:
        if update == DENSE_FROM:
            for linear in linears:
                linear.dense = True
        elif update and update % REFRESH == 0 and update < DENSE_FROM:
            start = time.process_time()
            flips.append(statistics.fmean(linear.refresh() for linear in linears))
            seconds.append(time.process_time() - start)

    def between(_: Any, update: int) -> None:
        if update < DENSE_FROM:
            for linear in linears:
                masked_decay_(linear.weight, linear.mask, decay)

    loss = train(data, model, learning_rate, seed, before=before, between=between, until=until)
    return {
        "loss": round(loss, 5),
        "decay": decay,
        "flip_rates": flips,
        "mask_search_seconds": statistics.median(seconds),
    }


def dense_flips(data: Data, learning_rate: float, seed: int, until: int) -> list[float]:
    """Return the flip rates of the masks that a dense run would have had."""
    model, masks, flips = build(seed), [], []

    def before(model: Any, update: int) -> None:
        if update % REFRESH == 0:
            new = [transposable_mask(linear.weight) for _, _, linear in ffn_linears(model)]
            if masks:
                flips.append(statistics.fmean(flip_rate(a, b) for a, b in zip(masks, new, strict=True)))
            masks[:] = new

    train(data, model, learning_rate, seed, before=before, until=until)
    return flips


def chosen_decay(data: Data, learning_rate: float) -> tuple[float, dict[float, float]]:
    """Return the smallest decay whose flip rate over dense's lies in `FLIP_RATIO` early in the run, and all ratios."""
    dense = statistics.fmean(dense_flips(data, learning_rate, TUNING_SEED, DECAY_UPDATES + 1))
    ratios = {
        decay: statistics.fmean(masked_run(data, learning_rate, decay, TUNING_SEED, DECAY_UPDATES + 1)["flip_rates"])
        / dense
        for decay in DECAYS
    }
    low, high = FLIP_RATIO
    return min(DECAYS, key=lambda d: (max(low - ratios[d], ratios[d] - high, 0.0), d)), ratios


def soft_run(data: Data, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train with the soft threshold from the first update to the last; the loss is that of the 2:4 weights."""
    model = build(seed)
    for parent, name, linear in ffn_linears(model):
        setattr(parent, name, Sparse24Linear(linear, soft=True))
    return {"loss": round(train(data, model, learning_rate, seed), 5)}


def dense_run(data: Data, intermediate: int) -> Callable[[float, int], dict[str, Any]]:
    def run(learning_rate: float, seed: int) -> dict[str, Any]:
        return {"loss": round(train(data, build(seed, intermediate), learning_rate, seed), 5)}

    return run


# --- counted ---------------------------------------------------------------------------------------------------------


def _milliseconds(flops: float = 0.0, bytes_moved: float = 0.0) -> float:
    return 1e3 * max(flops / (TERAFLOPS * 1e12), bytes_moved / (TERABYTES * 1e12))


def counted() -> list[dict[str, Any]]:
    """
    Return the times of one layer of Llama 3 8B, 16384 tokens in rows of 8192, forward and backward, by the model
    above.

    Per update a mask costs: read the bf16 weight and the mask, write the packed weight and its packed transpose (half
    of the values and 2 bits for each: 1.125 bytes per weight); read `dy`, write it packed; every 40th update the
    search.
    """
    weights, gradients = 3 * HIDDEN * FFN, TOKENS * (2 * FFN + HIDDEN)
    product = _milliseconds(2 * TOKENS * weights)
    rest = 3 * _milliseconds(2 * TOKENS * (2 * HIDDEN**2 + 2 * HIDDEN * KEY_VALUE) + 2 * TOKENS * LENGTH * HIDDEN)
    packing = _milliseconds(bytes_moved=weights * (2 + 0.125 + 2 * 1.125))
    pruning = _milliseconds(bytes_moved=gradients * (2 + 1.125))
    search = _milliseconds(2 * 90 * weights, weights * (2 + 0.125)) / REFRESH
    rows = []
    for name, speed in SPEEDS.items():
        masked = 3 * product / speed + packing + pruning + search
        soft = 2 * product / speed + product + _milliseconds(bytes_moved=weights * (2 + 1.125)) + pruning
        for method, block, share in ((MASKED, masked, 5 / 6), (SOFT, soft, 1.0)):
            layer = (3 * product + rest) / (share * block + (1 - share) * 3 * product + rest)
            rows.append(
                {
                    "counted": method,
                    "sparse_product_speed": name,
                    "dense_ffn_ms": round(3 * product, 3),
                    "sparse_ffn_ms": round(block, 3),
                    "packing_pruning_search_ms": [round(t, 4) for t in (packing, pruning, search)],
                    "ffn_speedup": round(3 * product / block, 3),
                    "run_speedup": round(layer, 3),
                }
            )
    return rows


def tried() -> list[dict[str, Any]]:
    """Return what torch's own 2:4 functions say on this device."""
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    pruned = weight * transposable_mask(weight)
    calls: dict[str, Callable[[], Any]] = {
        "torch.sparse.to_sparse_semi_structured": lambda: torch.sparse.to_sparse_semi_structured(pruned),
        "torch._cslt_compress": lambda: torch._cslt_compress(pruned),
        "torch._sparse_semi_structured_tile": lambda: torch._sparse_semi_structured_tile(weight),
        "torch._sparse_semi_structured_mm": lambda: torch._sparse_semi_structured_mm(
            pruned[:, :32].contiguous(), torch.zeros(64, 4, dtype=torch.int16), weight
        ),
    }
    rows = []
    for name, call in calls.items():
        try:
            call()
            said = "runs"
        except (RuntimeError, NotImplementedError) as error:
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        rows.append({"tried": name, "device": "cpu", "outcome": said})
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, data = time.process_time(), Data()
    decay, ratios = chosen_decay(data, LEARNING_RATES[0])
    print(f"decay {decay:g}, flip rates over dense's {ratios}", flush=True)
    rows: list[dict[str, Any]] = []
    for arm, intermediate in ((DENSE, INTERMEDIATE), (HALF, INTERMEDIATE // 2)):
        rows += tuned(arm, dense_run(data, intermediate))
    rows += tuned(MASKED, lambda lr, seed: masked_run(data, lr, decay, seed))
    rows += tuned(SOFT, lambda lr, seed: soft_run(data, lr, seed))
    deviation = statistics.stdev(losses(rows, DENSE))
    model = counted()
    speedups = {(row["counted"], row["sparse_product_speed"]): row for row in model}
    figures = []
    for name, arm in (("mask", MASKED), ("soft", SOFT)):
        gap = mean_difference(losses(rows, arm), losses(rows, DENSE))
        half = [a - b for a, b in zip(losses(rows, arm), losses(rows, HALF), strict=True)]
        figures += [
            headline(f"{name}_loss_minus_dense", round(gap, 4)),
            headline(f"{name}_loss_minus_dense_over_seed_sd", round(gap / deviation, 2), "<= 1"),
            headline(f"{name}_largest_loss_minus_half_ffn", round(max(half), 4), "< 0"),
            headline(f"{name}_counted_ffn_speedup_1_2", speedups[arm, "1_2"]["ffn_speedup"], ">= 1.15"),
            *(
                headline(f"{name}_counted_ffn_speedup_{speed}", speedups[arm, speed]["ffn_speedup"])
                for speed in ("1_5", "ideal")
            ),
            *(headline(f"{name}_counted_run_speedup_{s}", speedups[arm, s]["run_speedup"]) for s in SPEEDS),
        ]
    write_result(
        "sparse_24",
        command=command_line("bench.sparse_24"),
        seeds=SEEDS,
        headline=[
            *figures,
            headline("dense_seed_sd", round(deviation, 4)),
            headline("half_ffn_loss_minus_dense", round(mean_difference(losses(rows, HALF), losses(rows, DENSE)), 4)),
            headline("flip_rate_over_dense", round(ratios[decay], 3)),
            headline("extra_bytes_a_weight", 2 * 1.125 + 0.125),
        ],
        rows=[
            *rows,
            {"decay": decay, "flip_rate_over_dense": {f"{d:g}": r for d, r in ratios.items()}},
            *model,
            *tried(),
        ],
    )
    print(f"{time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
