"""Static fp8 casts in a unit-scaled decoder beside its standard twin, and the counted step time of a Llama-8B layer.

    python -m bench.unit_scaling

Each arm tunes its own LR by the same rule; the unit-scaled grid begins at 16 times the standard one, as its weights
have variance 1. Losses are of an emulation on the CPU; milliseconds are counted (`bench/_low_precision.py`, with the
criterion).
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch

from bench import _low_precision as low
from bench._schema import command_line, headline, write_result
from bench.prototypes.unit_scaling import StaticCast, build_unit_scaled, dynamic_cast, loss_scale
from bench.schedules import BATCH, LENGTH

FORMATS = {"bf16": low.to_bf16, "fp8 by tensor": dynamic_cast}
adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0)


def casts(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the shares of elements that the casts of the whole run clipped, and that they turned into zero."""
    casts = [m.quantize for m in model.modules() if isinstance(getattr(m, "quantize", None), StaticCast)]
    elements = sum(cast.elements for cast in casts)
    return {
        "overflow_fraction": sum(cast.overflows for cast in casts) / elements,
        "underflow_fraction": sum(cast.underflows for cast in casts) / elements,
    }


def main() -> None:
    arms = {
        name: low.Arm(
            model=lambda seed, quantizer=quantizer: low.quantize_layers(low.build(seed), lambda: quantizer),
            optimizer=adamw,
        )
        for name, quantizer in FORMATS.items()
    }
    arms["unit scaling"] = low.Arm(
        model=build_unit_scaled,
        optimizer=adamw,
        learning_rates=[16 * lr for lr in low.LEARNING_RATES],
        loss_scale=loss_scale(BATCH * LENGTH, low.HIDDEN),
        report=casts,
    )
    rows = low.study(arms)
    ours = [row for row in rows if row["arm"] == "unit scaling"]
    counted = low.counted_rows(
        lambda c: None if c.fp8 is None else low.step_seconds(c, c.fp8, low.BLOCK_PASS), ("bf16", "fp8 by row")
    )
    for row in counted:
        card = low.CARDS[row["card"]]
        row["fp8 by tensor ms"] = round(1e3 * low.step_seconds(card, card.fp8, low.TENSOR_AMAX_PASS), 2)
    write_result(
        "unit_scaling",
        command=command_line("bench.unit_scaling"),
        seeds=low.SEEDS,
        headline=[
            headline(
                "unit_scaling_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "unit scaling", "bf16"), low.LOSS_GOAL
            ),
            *(
                headline(f"unit_scaling_counted_time_ratio_{row['card']}", row["ratio"], low.RATIO_GOAL)
                for row in counted
            ),
            headline("fp8_by_tensor_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "fp8 by tensor", "bf16")),
            headline("overflow_fraction", statistics.fmean(row["overflow_fraction"] for row in ours)),
            headline("underflow_fraction", statistics.fmean(row["underflow_fraction"] for row in ours)),
        ],
        rows=[*rows, *counted],
    )


if __name__ == "__main__":
    main()
