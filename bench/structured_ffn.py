"""FFNs of structured factors, with and without self-guided training, beside plain dense FFNs of three widths.

    python -m bench.structured_ffn

The criterion, set before the first run: go if one structure has, on every seed, a lower held-out loss than a plain
dense model both at equal training products and at equal measured CPU time. The dense model of the same cost is made
narrower: its loss is read from the dense curve over three widths, by straight lines between them; at the products of
the unguided structures a model of one layer instead of two counts as well, where it is the better one. Products are
those of the FFN that is trained; CPU time is that of forward and backward at hidden size 512, where the structures are
relatively faster. A guide counts for the share of the updates in which it is computed. Each arm tunes its own learning
rate over the same values.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from bench._counters import GemmCounter
from bench._ffn_study import (
    HIDDEN,
    INTERMEDIATE,
    SEEDS,
    UPDATES,
    build,
    ffn_linears,
    losses,
    mean_difference,
    train,
    tuned,
)
from bench._schema import command_line, headline, write_result
from bench.prototypes.structured_ffn import BlockDense, BlockShuffle, LowRank, StructuredLinear, guide_alpha
from bench.schedules import Data

SHARE, BLOCKS = 0.3125, 4
WIDTHS = (SHARE, 0.5, 1.0)
SIZES, TOKENS, ROUNDS = ((HIDDEN, INTERMEDIATE), (512, 2048)), 512, 9
SHALLOW = "dense, one layer"
#: with a guide or not -> share of the updates in which it is computed
GUIDES = {"": 0.0, ", guided": 0.5}


def dense_arm(width: float) -> str:
    return f"dense, width {width:g}"


def low_rank(inputs: int, outputs: int) -> StructuredLinear:
    return LowRank(inputs, outputs, int(SHARE * inputs * outputs / (inputs + outputs)))


def block_dense(inputs: int, outputs: int) -> StructuredLinear:
    rank = int(SHARE * inputs * outputs / (inputs / BLOCKS + outputs)) // BLOCKS * BLOCKS
    return BlockDense(inputs, outputs, rank, BLOCKS)


def block_shuffle(inputs: int, outputs: int) -> StructuredLinear:
    return BlockShuffle(inputs, outputs, BLOCKS)


STRUCTURES: dict[str, Callable[[int, int], StructuredLinear]] = {
    "LowRank": low_rank,
    "BlockDense": block_dense,
    "BlockShuffle": block_shuffle,
}


def structured_run(data: Data, structure: str, guide: str) -> Callable[[float, int], dict[str, Any]]:
    """Return a run whose FFN projections are all of one structure."""

    def run(learning_rate: float, seed: int) -> dict[str, Any]:
        model, layers = build(seed), []
        for parent, name, linear in ffn_linears(model):
            layers.append(STRUCTURES[structure](linear.in_features, linear.out_features))
            setattr(parent, name, layers[-1].add_guide() if guide else layers[-1])

        def before(_: nn.Module, update: int) -> None:
            for layer in layers:
                layer.alpha = guide_alpha(update, UPDATES)

        return {"loss": round(train(data, model, learning_rate, seed, before=before if guide else None), 5)}

    return run


def dense_run(data: Data, width: float = 1.0, layers: int = 2) -> Callable[[float, int], dict[str, Any]]:
    def run(learning_rate: float, seed: int) -> dict[str, Any]:
        model = build(seed, round(width * INTERMEDIATE), layers)
        return {"loss": round(train(data, model, learning_rate, seed), 5)}

    return run


# --- cost of the FFN block -------------------------------------------------------------------------------------------


def block(hidden: int, intermediate: int, structure: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate))
    if structure is not None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(mlp, name)
            setattr(mlp, name, STRUCTURES[structure](linear.in_features, linear.out_features))
    return mlp


def step(mlp: nn.Module, x: torch.Tensor) -> None:
    torch.autograd.grad(mlp(x).sum(), [x, *mlp.parameters()])


def costs() -> list[dict[str, Any]]:
    """Return multiply-adds and CPU time of forward and backward over dense; medians of alternated rounds."""
    rows = []
    for hidden, intermediate in SIZES:
        x = torch.randn(TOKENS, hidden, requires_grad=True)
        blocks = {dense_arm(width): block(hidden, round(width * intermediate)) for width in WIDTHS}
        blocks |= {name: block(hidden, intermediate, name) for name in STRUCTURES}
        products, samples = {}, {name: [] for name in blocks}
        for name, mlp in blocks.items():
            with GemmCounter() as counter:
                step(mlp, x)
            products[name] = counter.multiply_adds
        for _ in range(ROUNDS):
            for name, mlp in blocks.items():
                start = time.process_time()
                for _ in range(max(1, 512 // hidden)):
                    step(mlp, x)
                samples[name].append(time.process_time() - start)
        medians = {name: statistics.median(values) for name, values in samples.items()}
        full = dense_arm(1.0)
        rows += [
            {
                "block": name,
                "hidden": hidden,
                "multiply_adds": products[name],
                "products_over_dense": round(products[name] / products[full], 4),
                "cpu_time_over_dense": round(medians[name] / medians[full], 4),
            }
            for name in blocks
        ]
    return rows


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return `y` at `x` by straight lines, the first of them prolonged to the left; the last `y` right of the end."""
    pairs = list(zip(xs, ys, strict=True))
    for (left, low), (right, high) in zip(pairs, pairs[1:], strict=False):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return ys[-1]


def gaps(rows: list[dict[str, Any]], block_rows: list[dict[str, Any]], structure: str, guide: str) -> dict[str, Any]:
    """Return, seed by seed, the loss minus that of a dense model with as many products, and with as much CPU time."""
    found: dict[str, Any] = {"verdict": structure + guide}
    for name, (hidden, _) in zip(("products", "cpu_time"), SIZES, strict=True):
        cost = {row["block"]: row[f"{name}_over_dense"] for row in block_rows if row["hidden"] == hidden}
        share = cost[structure] + GUIDES[guide]
        widths = [cost[dense_arm(width)] for width in WIDTHS]
        found[f"{name}_over_dense"] = share
        found[f"loss_minus_dense_at_equal_{name}"] = [
            round(row["loss"] - _dense_loss(rows, row["seed"], share, widths, name == "products" and not guide), 5)
            for row in rows
            if row.get("arm") == structure + guide
        ]
    equal = [value for key, values in found.items() if key.startswith("loss_minus") for value in values]
    return {**found, "wins": max(equal) < 0}


def _dense_loss(
    rows: list[dict[str, Any]], seed: int, share: float, widths: Sequence[float], or_shallow: bool
) -> float:
    of_seed = {row["arm"]: row["loss"] for row in rows if row.get("seed") == seed}
    narrow = interpolate(share, widths, [of_seed[dense_arm(width)] for width in WIDTHS])
    return min(narrow, of_seed[SHALLOW]) if or_shallow else narrow


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, data = time.process_time(), Data()
    block_rows, rows = costs(), []
    for width in WIDTHS:
        rows += tuned(dense_arm(width), dense_run(data, width))
    rows += tuned(SHALLOW, dense_run(data, layers=1))
    for structure in STRUCTURES:
        for guide in GUIDES:
            rows += tuned(structure + guide, structured_run(data, structure, guide))
    verdicts = [gaps(rows, block_rows, structure, guide) for structure in STRUCTURES for guide in GUIDES]
    full = losses(rows, dense_arm(1.0))

    def best(name: str) -> float:
        return min(max(verdict[f"loss_minus_dense_at_equal_{name}"]) for verdict in verdicts)

    large = {row["block"]: row for row in block_rows if row["hidden"] == SIZES[-1][0]}
    write_result(
        "structured_ffn",
        command=command_line("bench.structured_ffn"),
        seeds=SEEDS,
        headline=[
            headline("structures_that_win", sum(verdict["wins"] for verdict in verdicts), ">= 1"),
            headline("best_worst_seed_gap_at_equal_products", round(best("products"), 4), "< 0"),
            headline("best_worst_seed_gap_at_equal_cpu_time", round(best("cpu_time"), 4), "< 0"),
            headline("dense_seed_sd", round(statistics.stdev(full), 4)),
            headline("narrow_dense_loss_minus_dense", round(mean_difference(losses(rows, dense_arm(SHARE)), full), 4)),
            *(
                headline(f"{name.lower()}{guide.replace(', ', '_')}_loss_minus_dense", round(gap, 4))
                for name in STRUCTURES
                for guide in GUIDES
                for gap in [mean_difference(losses(rows, name + guide), full)]
            ),
            *(
                headline(f"{name.lower()}_{cost}_over_dense", large[name][f"{cost}_over_dense"])
                for name in STRUCTURES
                for cost in ("products", "cpu_time")
            ),
        ],
        rows=[*rows, *block_rows, *verdicts],
    )
    print(f"{time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
