"""Memory and time of what decoder layers keep, the planner's error, and packed and sparse attention, on a CPU.

`python -m bench.activation_memory` writes `bench/results/activation_memory.json`. Times are CPU-seconds of one process
with one thread; each ratio is one of medians over runs that alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from bench._schema import command_line, headline, write_result
from hf_effi.attention.varlen import register_varlen_attention
from hf_effi.functional.layer_plan import MODES, plan_layer_modes
from hf_effi.functional.memory import Switches, memory_table
from hf_effi.functional.segment_attention import AttentionPattern, segment_attention
from hf_effi.memory.layer_modes import LayerModes
from hf_effi.memory.layer_profile import LayerProbe
from hf_effi.report.trace_memory import TracedModel

LENGTH, LAYERS = 1024, 6
ROUNDS = 5
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "use_cache": False,
}


def make_model(seed: int, **over: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG, **over})).train()


def cpu_seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def alternate(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median CPU-seconds of each run; one round warms up and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            times[name].append(cpu_seconds(run))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def held_after_forward(model: LlamaForCausalLM, modes: Any, ids: torch.Tensor) -> int:
    """Return the bytes alive between forward and backward, host buffers of the offloader taken off."""
    with LayerModes(model, modes) as layers:
        model(input_ids=ids, labels=ids).loss.backward()  # warms up: gradients and buffers exist
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            before = _total(tracker)
            loss = model(input_ids=ids, labels=ids).loss
            held = _total(tracker) - before
            loss.backward()
    # The tracker counts host buffers like any other memory of a CPU.
    return held - (layers.offloader.stats.host_bytes if layers.offloader else 0)


def _total(tracker: MemTracker) -> int:
    snapshot = tracker.get_tracker_snapshot("current")
    return snapshot[torch.device("cpu")]["Total"]


def measure_modes(seed: int) -> list[dict[str, Any]]:
    model = make_model(seed)
    model.activation_checkpointing_enable()
    ids = torch.randint(0, 512, (1, LENGTH))
    with LayerProbe(model) as probe:
        model(input_ids=ids, labels=ids).loss.backward()
    costs = probe.costs()
    budget = sum(cost.modes["keep"].size for cost in costs) // 2
    plans: dict[str, Any] = {mode: mode for mode in MODES}
    plans["half the budget"] = list(plan_layer_modes(costs, budget))

    def step(modes: Any) -> Callable[[], None]:
        def run() -> None:
            with LayerModes(model, modes):
                model(input_ids=ids, labels=ids).loss.backward()

        return run

    seconds = alternate({name: step(modes) for name, modes in plans.items()})
    traced = TracedModel(model.config)
    trace = traced.trace(1, LENGTH)
    rows = []
    for name, modes in plans.items():
        held = held_after_forward(model, modes, ids)
        row = {
            "part": "modes",
            "seed": seed,
            "modes": name,
            "held_bytes": held,
            "cpu_seconds": round(seconds[name], 4),
        }
        if name in MODES:
            table = memory_table(traced.parameters, trace, Switches(activations=name))
            row["planned_bytes"] = table.activations + trace.logits
        rows.append(row)
    return rows


def measure_packing(seed: int, documents: int = 32, length: int = 4096) -> list[dict[str, Any]]:
    """One packed row of equal documents, with SDPA and a mask and with varlen."""
    model = make_model(seed, num_hidden_layers=2)
    ids = torch.randint(0, 512, (1, length))
    positions = torch.arange(length // documents).repeat(documents)[None]
    name = register_varlen_attention()

    def step(attention: str) -> Callable[[], None]:
        def run() -> None:
            model.set_attn_implementation(attention)
            model(input_ids=ids, labels=ids, position_ids=positions).loss.backward()

        return run

    seconds = alternate({"sdpa": step("sdpa"), name: step(name)})
    return [
        {"part": "packing", "seed": seed, "attention": attention, "tokens": length, "cpu_seconds": round(value, 4)}
        for attention, value in seconds.items()
    ]


def measure_sparse(seed: int, length: int = 8192) -> list[dict[str, Any]]:
    """One attention layer over one document, full and with sinks and a window."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(length, 4, 64, requires_grad=True) for _ in range(3))

    def step(pattern: AttentionPattern | None) -> Callable[[], None]:
        return lambda: segment_attention(q, k, v, [0, length], [0, length], pattern=pattern).sum().backward()

    seconds = alternate({"full": step(None), "window": step(AttentionPattern(window=512, sink=4))})
    return [
        {"part": "sparse", "seed": seed, "attention": attention, "tokens": length, "cpu_seconds": round(value, 4)}
        for attention, value in seconds.items()
    ]


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headlines: medians over seeds."""

    def ratio(part: str, key: str, field: str, above: str, below: str) -> float:
        found = {(r["seed"], r[key]): r[field] for r in rows if r["part"] == part}
        seeds = sorted({seed for seed, _ in found})
        return round(statistics.median(found[seed, above] / found[seed, below] for seed in seeds), 4)

    planned = [r for r in rows if "planned_bytes" in r and r["modes"] in ("keep", "selective", "checkpoint")]
    error = max(abs(r["planned_bytes"] / r["held_bytes"] - 1) for r in planned)
    return [
        headline("planner_max_relative_error", round(error, 4), "<= 0.05"),
        headline("held_bytes_checkpoint_over_keep", ratio("modes", "modes", "held_bytes", "checkpoint", "keep")),
        headline("held_bytes_offload_over_checkpoint", ratio("modes", "modes", "held_bytes", "offload", "checkpoint")),
        headline(
            "selective_time_over_checkpoint", ratio("modes", "modes", "cpu_seconds", "selective", "checkpoint"), "< 1"
        ),
        headline(
            "budget_time_over_checkpoint",
            ratio("modes", "modes", "cpu_seconds", "half the budget", "checkpoint"),
            "< 1",
        ),
        headline("offload_time_over_checkpoint", ratio("modes", "modes", "cpu_seconds", "offload", "checkpoint")),
        headline(
            "packed_varlen_time_over_sdpa",
            ratio("packing", "attention", "cpu_seconds", "hf_effi_varlen", "sdpa"),
            "< 1",
        ),
        headline(
            "window_time_over_full_attention", ratio("sparse", "attention", "cpu_seconds", "window", "full"), "< 1"
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        for part in (measure_modes, measure_packing, measure_sparse):
            rows += part(seed)
            print(rows[-1], flush=True)
    found = figures(rows)
    for figure in found:
        print(figure)
    write_result(
        "activation_memory",
        command=command_line("bench.activation_memory"),
        seeds=args.seeds,
        headline=found,
        rows=rows,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
