"""COAT's two halves beside what a user already has: Adam's moments in fp8, and saved activations in fp8.

    python -m bench.coat

Losses, errors and bytes are measured on the CPU, with real fp8 storage; milliseconds are counted
(`bench/_low_precision.py`, with the criterion). Activations are compared at equal bytes with layers that keep,
recompute in part, or recompute everything.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from bench import _low_precision as low
from bench._schema import command_line, headline, write_result
from bench.prototypes.coat import CoatAdamW, SavedInFp8, compress, restore
from bench.schedules import Data

MLP, WIDTH, KEYS = low.MLP, low.WIDTH, low.KEYS
#: Elements a token and layer saves with fused norms and flash attention: inputs and outputs of both norms, gate, up,
#: their product; and what attention saves (queries, keys, values, output).
ACTIVATIONS, ATTENTION = 4 * WIDTH + 3 * MLP, 2 * WIDTH + 2 * KEYS
adamw8bit = functools.partial(bitsandbytes.optim.AdamW8bit, betas=(0.9, 0.95), weight_decay=0.1)


def state_bytes(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """
    Return the bytes of the moments a parameter, in matrices that bitsandbytes quantises (4096 elements and more).
    """
    found = elements = 0
    for p in (p for p in model.parameters() if p.numel() >= 4096):
        elements += p.numel()
        # code books, which all parameters share, and the step count are no moments
        moments = {k: v for k, v in optimizer.state[p].items() if k != "step" and not k.startswith("qmap")}
        found += sum(leaf.nbytes for leaf in tree_leaves(moments) if isinstance(leaf, torch.Tensor))
    return {"state_bytes_per_parameter": round(found / elements, 4)}


def moment_errors(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the mean relative error of an element of m, of v and of the update direction, in both 8-bit formats."""

    def bnb(x: torch.Tensor, signed: bool) -> torch.Tensor:
        return dequantize_blockwise(*quantize_blockwise(x, code=create_dynamic_map(signed=signed), blocksize=256))

    found: dict[str, list[float]] = {}
    for p in (p for p in model.parameters() if p.numel() >= 4096):
        m, v = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
        kept = (m != 0) & (v != 0)
        coat = [restore(compress(x), x.shape) for x in (m, v)]
        for name, (m8, v8) in {"coat": coat, "bnb": (bnb(m, True), bnb(v, False))}.items():
            directions = [a / (b.clamp(min=0).sqrt() + 1e-8) for a, b in ((m, v), (m8, v8))]
            for key, (got, want) in {"m": (m8, m), "v": (v8, v), "update": directions[::-1]}.items():
                error = ((got - want).abs() / want.abs())[kept].median()
                found.setdefault(f"{name}_{key}_median_relative_error", []).append(float(error))
    return {name: round(statistics.fmean(errors), 4) for name, errors in found.items()}


def gradient_error(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return how far the gradients of a trained model move when activations are saved in fp8, and the bytes saved."""
    tokens, grads = Data().batch(low.TUNING_SEED, 0), []
    for prepare in (lambda model: None, SavedInFp8):
        saved = prepare(model)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return {
        "gradient_error": round(low.relative_error(grads[1], grads[0]), 5),
        "saved_bytes_over_bf16": round(saved.stored / saved.bf16, 4),
    }


def saved_model(seed: int) -> LlamaForCausalLM:
    model = low.build(seed)
    SavedInFp8(model)
    return model


def counted_activations(card: low.Card) -> dict[str, float]:
    """Return the counted step ratio of fp8 activations to the best mix of exact layers with the same bytes."""
    attention = 2 * low.TOKENS**2 * WIDTH / card.bf16
    forward = 2 * low.TOKENS * low.WEIGHTS / card.bf16
    layer = 3 * forward + 3.5 * attention
    fp8 = (ACTIVATIONS * (1 + 4 / 128) + 2 * ATTENTION, 6 * low.TOKENS * ACTIVATIONS / card.bandwidth)
    norms, product = 2 * WIDTH, MLP
    exact = [  # bytes per token, seconds per layer
        (2 * (ACTIVATIONS + ATTENTION), 0.0),
        # norm outputs and the gated product again, from what is kept: torch.compile's partitioner does it
        (2 * (ACTIVATIONS - norms - product + ATTENTION), 2 * low.TOKENS * (2 * norms + 3 * product) / card.bandwidth),
        (2 * 2 * WIDTH, forward),  # selective checkpointing: layer input and attention output
        (2 * WIDTH, forward + attention),  # plain checkpointing
    ]
    best = min(
        few + (many - few) * (fp8[0] - low_bytes) / (high_bytes - low_bytes)
        for (high_bytes, many), (low_bytes, few) in itertools.combinations(exact, 2)
        if low_bytes <= fp8[0] <= high_bytes
    )
    return {
        "saved_bytes_over_bf16": round(fp8[0] / exact[0][0], 3),
        "fp8 extra ms": round(1e3 * fp8[1], 2),
        "exact extra ms at equal bytes": round(1e3 * best, 2),
        "ratio": round((layer + fp8[1]) / (layer + best), 3),
    }


def main() -> None:
    rows = low.study(
        {
            "AdamW": low.Arm(report=lambda *run: state_bytes(*run) | moment_errors(*run) | gradient_error(*run)),
            "bitsandbytes AdamW8bit": low.Arm(optimizer=adamw8bit, report=state_bytes),
            "COAT moments": low.Arm(optimizer=CoatAdamW, report=state_bytes),
            "COAT activations": low.Arm(model=saved_model),
        }
    )
    counted = [
        {"card": name, "kind": "counted, not measured", **counted_activations(card)}
        for name, card in low.CARDS.items()
    ]

    def mean(arm: str, key: str) -> float:
        return statistics.fmean(row[key] for row in rows if row["arm"] == arm)

    state = {arm: mean(arm, "state_bytes_per_parameter") for arm in ("bitsandbytes AdamW8bit", "COAT moments")}
    write_result(
        "coat",
        command=command_line("bench.coat"),
        seeds=low.SEEDS,
        headline=[
            headline(
                "coat_moments_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "COAT moments", "AdamW"), low.LOSS_GOAL
            ),
            headline(
                "coat_state_bytes_over_bitsandbytes",
                round(state["COAT moments"] / state["bitsandbytes AdamW8bit"], 3),
                low.RATIO_GOAL,
            ),
            headline(
                "coat_activations_loss_gap_in_seed_sd",
                low.gap_in_seed_sd(rows, "COAT activations", "AdamW"),
                low.LOSS_GOAL,
            ),
            *(
                headline(f"coat_activations_counted_time_ratio_{row['card']}", row["ratio"], low.RATIO_GOAL)
                for row in counted
            ),
            headline("bitsandbytes_loss_gap_in_seed_sd", low.gap_in_seed_sd(rows, "bitsandbytes AdamW8bit", "AdamW")),
            headline("coat_state_bytes_per_parameter", round(state["COAT moments"], 3)),
            headline("gradient_error_with_fp8_activations", round(mean("AdamW", "gradient_error"), 4)),
        ],
        rows=[*rows, *counted],
    )


if __name__ == "__main__":
    main()
