"""Jetfire's int8 blocks in every linear of a small decoder, and the counted step time of a Llama-8B layer.

    python -m bench.jetfire

Losses and errors are of an emulation on the CPU; milliseconds are counted (`bench/_low_precision.py`, with the
criterion).
"""

from __future__ import annotations

import torch

from bench import _low_precision as low
from bench._schema import command_line, headline, write_result
from bench.prototypes.jetfire import BLOCK, quantize

FORMATS = {"bf16": low.to_bf16, "int8 by row": low.int8_by_row, "fp8 by row": low.fp8_by_row, "Jetfire": quantize}
#: Bytes of a saved linear input over bf16: one byte, and an fp32 scale for each block.
SAVED_BYTES_RATIO = (1 + 4 / BLOCK**2) / 2


def arm(quantizer: low.Quantizer) -> low.Arm:
    return low.Arm(model=lambda seed: low.quantize_layers(low.build(seed), lambda: quantizer))


def operands(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return normal inputs, weights and gradients; one channel in 64 of the inputs is 20 times larger."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, grad = (torch.randn(256, n, generator=generator) for n in (512, 512, 256))
    x[:, ::64] *= 20
    return x, weight, grad


def main() -> None:
    rows = low.study({"fp32": low.Arm(), **{name: arm(quantizer) for name, quantizer in FORMATS.items()}})
    for seed in low.SEEDS:
        for name, quantizer in FORMATS.items():
            errors = low.product_errors(*operands(seed), quantizer)
            rows.append({"product errors": name, "seed": seed, **{k: round(v, 5) for k, v in errors.items()}})
    usable = low.usable_alternatives(rows)
    counted = low.counted_rows(lambda c: low.step_seconds(c, c.int8, low.BLOCK_PASS, block=BLOCK), usable)
    free = low.counted_rows(lambda c: low.step_seconds(c, c.int8, low.BLOCK_PASS), usable)
    for row, other in zip(counted, free, strict=True):
        row["ratio with scaling for nothing"] = other["ratio"]
    write_result(
        "jetfire",
        command=command_line("bench.jetfire"),
        seeds=low.SEEDS,
        headline=[
            headline("jetfire_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "Jetfire", "bf16"), low.LOSS_GOAL),
            *(headline(f"jetfire_counted_time_ratio_{row['card']}", row["ratio"], low.RATIO_GOAL) for row in counted),
            headline("int8_by_row_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "int8 by row", "bf16")),
            headline("fp8_by_row_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "fp8 by row", "bf16")),
            headline("saved_linear_input_bytes_over_bf16", round(SAVED_BYTES_RATIO, 4)),
        ],
        rows=[*rows, *counted],
    )


if __name__ == "__main__":
    main()
