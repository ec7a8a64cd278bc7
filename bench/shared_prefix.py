"""Tokens, CPU time and gradients of a training step on prompts with several completions, in three layouts.

`python -m bench.shared_prefix` writes `bench/results/shared_prefix.json`. Padded rows on SDPA (what a stock Trainer
does), padding-free rows on `hf_effi_varlen`, each with its own prompt, and shared prompts, on the same rows and
weights. Times are CPU-seconds of forward and backward in one process with one thread; each ratio is one of medians
over alternated runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench._schema import command_line, headline, write_result
from hf_effi.attention.shared_prefix import check_shared_prefix
from hf_effi.attention.varlen import register_varlen_attention
from hf_effi.functional.shared_prefix import IGNORED, plan_shared_prefix

PROMPTS, GROUP, ROUNDS, VOCABULARY = 2, 8, 5, 512
LAYOUTS = ("padded", "packed", "shared")
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "use_cache": False,
}


class Shape(NamedTuple):
    """Tokens of a prompt, and the mean (before it is cut) and most tokens of a completion."""

    prompt: int
    mean: int
    most: int

    def __str__(self) -> str:
        return f"p{self.prompt}_g{GROUP}_c{self.mean}"


#: (1024, 8, 400), (8192, 8, 512) and (256, 8, 2048) of GRPO runs, scaled down by 8, 16 and 16
SHAPES = (Shape(128, 50, 128), Shape(512, 32, 64), Shape(16, 128, 256))

Rows = list[tuple[list[int], list[int]]]


def draw_rows(shape: Shape, seed: int) -> Rows:
    """Return `PROMPTS` prompts with `GROUP` completions each, whose lengths are exponential and cut at the most."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for prompt in (ids(shape.prompt) for _ in range(PROMPTS)):
        lengths = torch.empty(GROUP).exponential_(1 / shape.mean, generator=generator).ceil().clamp(1, shape.most)
        rows += [(prompt, ids(int(length))) for length in lengths]
    return rows


def padded_batch(rows: Rows) -> dict[str, Any]:
    width = max(len(prompt) + len(completion) for prompt, completion in rows)

    def filled(cells: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([cell + [fill] * (width - len(cell)) for cell in cells])

    return {
        "input_ids": filled([prompt + completion for prompt, completion in rows], 0),
        "attention_mask": filled([[1] * (len(prompt) + len(completion)) for prompt, completion in rows], 0),
        "labels": filled([[IGNORED] * len(prompt) + completion for prompt, completion in rows], IGNORED),
    }


def packed_batch(rows: Rows) -> dict[str, Any]:
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    labels = [[IGNORED] * len(prompt) + completion for prompt, completion in rows]
    return {
        "input_ids": torch.tensor(
            [[*itertools.chain.from_iterable(prompt + completion for prompt, completion in rows)]]
        ),
        "labels": torch.tensor([[*itertools.chain.from_iterable(labels)]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def shared_batch(rows: Rows) -> dict[str, Any]:
    layout = plan_shared_prefix([prompt for prompt, _ in rows], [len(completion) for _, completion in rows])
    return layout.model_inputs([prompt + completion for prompt, completion in rows])


def step(model: LlamaForCausalLM, batch: dict[str, Any]) -> float:
    """Return the CPU-seconds of a forward and backward; the gradients stay."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    model(**batch).loss.backward()
    return time.process_time() - began


def gradient_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest error of any gradient, relative to the largest entry of its tensor."""
    pairs = zip(found, expected, strict=True)
    return max(((left - right).abs().max() / right.abs().max()).item() for left, right in pairs)


def measure(shape: Shape, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    padded = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    varlen = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    varlen.load_state_dict(padded.state_dict())
    varlen.set_attn_implementation(register_varlen_attention())
    check_shared_prefix(varlen)
    rows = draw_rows(shape, seed)
    models = {"padded": padded, "packed": varlen, "shared": varlen}
    batches = {"padded": padded_batch(rows), "packed": packed_batch(rows), "shared": shared_batch(rows)}
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    gradients: dict[str, list[Tensor]] = {}
    for _ in range(ROUNDS + 1):  # the first round warms up
        for name in LAYOUTS:
            seconds[name].append(step(models[name], batches[name]))
            gradients[name] = [weight.grad for weight in models[name].parameters()]
    return [
        {
            "shape": str(shape),
            "seed": seed,
            "layout": name,
            "tokens_forwarded": batches[name]["input_ids"].numel(),
            "cpu_seconds": round(statistics.median(seconds[name][1:]), 4),
            "max_relative_gradient_error": gradient_error(gradients[name], gradients["padded"]),
        }
        for name in LAYOUTS
    ]


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headlines: ratios are medians over seeds, the error is the largest."""

    def ratio(shape: str, field: str, below: str) -> float:
        found = {(row["seed"], row["layout"]): row[field] for row in rows if row["shape"] == shape}
        seeds = sorted({seed for seed, _ in found})
        return round(statistics.median(found[seed, "shared"] / found[seed, below] for seed in seeds), 4)

    error = max(row["max_relative_gradient_error"] for row in rows if row["layout"] == "shared")
    found = [headline("max_relative_gradient_error", float(f"{error:.2g}"), "<= 1e-5")]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found += [
            headline(f"tokens_over_padded_{shape}", ratio(shape, "tokens_forwarded", "padded"), "< 1"),
            headline(f"tokens_over_packed_{shape}", ratio(shape, "tokens_forwarded", "packed"), "< 1"),
            headline(f"cpu_seconds_over_padded_{shape}", ratio(shape, "cpu_seconds", "padded"), "< 1"),
            headline(f"cpu_seconds_over_packed_{shape}", ratio(shape, "cpu_seconds", "packed"), "< 1"),
        ]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        for shape in SHAPES:
            rows += measure(shape, seed)
            for row in rows[-len(LAYOUTS) :]:
                print(row, flush=True)
    found = figures(rows)
    for figure in found:
        print(figure)
    write_result(
        "shared_prefix", command=command_line("bench.shared_prefix"), seeds=args.seeds, headline=found, rows=rows
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
