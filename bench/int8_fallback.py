"""Int8 with fallback on a model whose gated MLPs have outliers, and the counted step time of a Llama-8B layer.

    python -m bench.int8_fallback

The outliers are put in by hand: some channels of `up_proj` are scaled up and those of `down_proj` down by as much,
which leaves the function as it is. Losses and errors are of an emulation on the CPU; milliseconds are counted
(`bench/_low_precision.py`, with the criterion).
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench import _low_precision as low
from bench._schema import command_line, headline, write_result
from bench.prototypes import jetfire
from bench.prototypes.int8_fallback import BLOCK, FallbackQuantizer, quantize_by_block

OUTLIER_CHANNELS, OUTLIER_FACTOR = slice(0, low.INTERMEDIATE, 96), 64.0
FORMATS = {
    "bf16": low.to_bf16,
    "int8 by row": low.int8_by_row,
    "fp8 by row": low.fp8_by_row,
}


@torch.no_grad()
def with_outliers(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Give the gated activations four channels of outliers, and leave the function as it is."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[OUTLIER_CHANNELS] *= OUTLIER_FACTOR
        layer.mlp.down_proj.weight[:, OUTLIER_CHANNELS] /= OUTLIER_FACTOR
    return model


def quantizers(model: LlamaForCausalLM) -> list[Any]:
    return [m.quantize for m in model.model.layers.modules() if isinstance(m, low.QuantizedLinear)]


def adapt(model: LlamaForCausalLM) -> None:
    for quantizer in quantizers(model):
        quantizer.adapt()


def rates(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the share of input blocks that fell back in training, for each linear and over all of them."""
    rates = [statistics.fmean(quantizer.history) for quantizer in quantizers(model)]
    return {"fallback_rates": [round(rate, 3) for rate in rates], "fallback_rate": round(statistics.fmean(rates), 4)}


def glu_operands(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs like a gated MLP's with a few single outliers, normal weights and gradients."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(512, 1024, generator=generator) for _ in range(2))
    x = torch.nn.functional.silu(gate) * up
    token, channel = (torch.randint(n, (8,), generator=generator) for n in x.shape)
    x[token, channel] *= 500
    return x, torch.randn(256, 1024, generator=generator), torch.randn(512, 256, generator=generator)


def error_rows(seed: int) -> list[dict[str, Any]]:
    """Return the errors of the three products; the threshold is set so that a fifth of the blocks fall back."""
    x, weight, grad = glu_operands(seed)
    fallback, maxima = FallbackQuantizer(), jetfire.block_int8(x, BLOCK)[1] * 127
    fallback.threshold = float(maxima.flatten().quantile(0.8))
    formats = {**FORMATS, "int8 by block": quantize_by_block, "Jetfire": jetfire.quantize, "fallback": fallback}
    return [
        {"product errors": name, "seed": seed}
        | {k: round(v, 5) for k, v in low.product_errors(x, weight, grad, quantizer).items()}
        for name, quantizer in formats.items()
    ]


def main() -> None:
    def model(make: Any, in_bf16: tuple[str, ...] = ()) -> Any:
        return lambda seed: low.quantize_layers(with_outliers(low.build(seed)), make, in_bf16)

    arms = {name: low.Arm(model=model(lambda quantizer=quantizer: quantizer)) for name, quantizer in FORMATS.items()}
    arms["int8 by row but down_proj"] = low.Arm(model=model(lambda: low.int8_by_row, ("down_proj",)))
    arms["fallback"] = low.Arm(model=model(FallbackQuantizer), after_step=adapt, report=rates)
    rows = low.study(arms)
    rate = statistics.fmean(row["fallback_rate"] for row in rows if row.get("arm") == "fallback")
    rows += [row for seed in low.SEEDS for row in error_rows(seed)]
    # inputs are factors of y and of dW: two products of three are repeated for the blocks that fall back
    counted = low.counted_rows(
        lambda c: low.step_seconds(c, c.int8, low.BLOCK_PASS, products=3 + 2 * rate, block=BLOCK),
        low.usable_alternatives(rows),
    )

    def error(name: str) -> float:
        return statistics.fmean(row["y"] for row in rows if row.get("product errors") == name)

    write_result(
        "int8_fallback",
        command=command_line("bench.int8_fallback"),
        seeds=low.SEEDS,
        headline=[
            headline("fallback_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "fallback", "bf16"), low.LOSS_GOAL),
            *(headline(f"fallback_counted_time_ratio_{row['card']}", row["ratio"], low.RATIO_GOAL) for row in counted),
            headline("fallback_rate", round(rate, 3)),
            headline("fallback_error_over_int8_by_row", round(error("fallback") / error("int8 by row"), 3)),
            headline("fallback_error_over_jetfire", round(error("fallback") / error("Jetfire"), 3)),
            headline("int8_by_row_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "int8 by row", "bf16")),
            headline("fp8_by_row_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "fp8 by row", "bf16")),
        ],
        rows=[*rows, *counted],
    )


if __name__ == "__main__":
    main()
