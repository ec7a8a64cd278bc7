"""What the questions to a loaded model cost when a feature is switched on: seconds, bytes, and the share of a short
run.

`python -m bench.probe_cost` writes `bench/results/probe_cost.json`. Two Llamas in fp32, of 0.3 and of 100 million
parameters; for each feature all that it asks at the start, from the call that switches it on to its answer, which is
"equal" here, so that no question is left out. CPU seconds of one thread; bytes are those of the tensors that are alive
at once beside the model, counted in a run of its own with the first seed. The share is of 100 updates (forward,
backward, AdamW) of one row of 256 tokens, the shortest run that one would call training: longer rows, more rows and
more updates make it smaller.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from bench._counters import LiveBytes
from bench._schema import command_line, headline, write_result
from hf_effi.attention import _varlen_probe, register_varlen_attention
from hf_effi.attention.shared_prefix import check_shared_prefix
from hf_effi.kernels import tile_mlp
from hf_effi.memory import stream_layers, tile_loss
from hf_effi.memory.chunk_probe import chunks_are_exact
from hf_effi.patching import Finding, draws_random_numbers, longest_exact_call
from hf_effi.trainers.grpo.config import EXACT_SAVINGS
from hf_effi.trainers.grpo.forward_probe import measured_reasons

SIZES: dict[str, dict[str, int]] = {
    "0.3M": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 1024},
    "100M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "vocab_size": 32_000},
}
TOKENS, UPDATES, TIMED_UPDATES = 256, 100, 3


def make_model(size: str, seed: int) -> LlamaForCausalLM:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES[size], num_attention_heads=SIZES[size]["hidden_size"] // 32, num_key_value_heads=2)
    return LlamaForCausalLM(config).train()


def _must_be_equal(*findings: Finding) -> None:
    for finding in findings:
        if not finding.equal:
            raise RuntimeError(f"A Llama is equal under every feature, and this one is not: {finding}.")


def ask_exact_savings(model: nn.Module) -> None:
    """Ask what `exact_savings` asks before the first update."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if reasons := measured_reasons(model, EXACT_SAVINGS, None, 0):
        raise RuntimeError(f"A Llama is equal under every saving, and this one is not: {reasons}.")


def ask_chunk_flow(model: nn.Module) -> None:
    """Ask what `chunk_flow=` asks when the Trainer is made, and at its first packed batch."""
    found = [chunks_are_exact(model, layout) for layout in ("padded", "packed")]
    _must_be_equal(draws_random_numbers(model), *found)
    longest_exact_call(model)


def ask_varlen_attention(model: nn.Module) -> None:
    """Ask what `hf_effi_varlen` asks at the first call of each layout."""
    name = register_varlen_attention()
    model.set_attn_implementation(name)
    with torch.no_grad():
        _must_be_equal(*(_varlen_probe._ask(model, layout, name) for layout in ("plain", "packed", "padded")))


def ask_shared_prefix(model: nn.Module) -> None:
    """Ask what a run with shared prompts asks."""
    model.set_attn_implementation(register_varlen_attention())
    check_shared_prefix(model)


ASKED: dict[str, Callable[[nn.Module], Any]] = {
    "exact_savings": ask_exact_savings,
    "chunk_flow": ask_chunk_flow,
    "varlen_attention": ask_varlen_attention,
    "shared_prefix": ask_shared_prefix,
    "stream_layer": stream_layers,
    "tiled_mlp": tile_mlp,
    "tiled_loss": tile_loss,
}


def measure_update(size: str, seed: int) -> float:
    """Return the CPU seconds of an update, the median of a few."""
    model = make_model(size, seed)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(SIZES[size]["vocab_size"], (1, TOKENS))
    took = []
    for _ in range(1 + TIMED_UPDATES):
        began = time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.process_time() - began)
    return statistics.median(took[1:])


def measure(feature: str, size: str, seed: int, update_seconds: float) -> dict[str, Any]:
    """Return the seconds of what one feature asks of a model that nobody has asked yet."""
    model = make_model(size, seed)
    began = time.process_time()
    ASKED[feature](model)
    seconds = time.process_time() - began
    return {
        "feature": feature,
        "model": size,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": seconds,
        "update_cpu_seconds": update_seconds,
        "share_of_100_updates": seconds / (UPDATES * update_seconds),
    }


def count_bytes(feature: str, size: str, seed: int) -> dict[str, Any]:
    """Return the bytes of the tensors alive at once beside the model; the same for every seed."""
    model = make_model(size, seed)
    with LiveBytes() as alive:
        ASKED[feature](model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"peak_bytes": alive.peak, "peak_over_weights": alive.peak / weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in SIZES:
        for seed in args.seeds:
            update_seconds = measure_update(size, seed)
            for feature in ASKED:
                row = measure(feature, size, seed, update_seconds)
                rows.append({**row, **(count_bytes(feature, size, seed) if seed == args.seeds[0] else {})})
                print({k: round(v, 5) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)

    figures = []
    for key, goal in (("cpu_seconds", "<= 30"), ("peak_over_weights", None), ("share_of_100_updates", None)):
        for size in SIZES:
            for feature in ASKED:
                mine = [row for row in rows if (row["model"], row["feature"]) == (size, feature)]
                found = [row[key] for row in mine if key in row]
                figures.append(headline(f"{key}_{feature}_{size}", statistics.median(found), goal))
    path = write_result(
        "probe_cost", command=command_line("bench.probe_cost"), seeds=args.seeds, headline=figures, rows=rows
    )
    print(path)


if __name__ == "__main__":
    main()
