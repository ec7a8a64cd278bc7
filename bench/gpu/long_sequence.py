"""The single-GPU ladder of ALST: the longest sequence of each rung on this card, and the seconds that it takes.

    python -m bench.gpu.long_sequence [--layers 4] [--seconds 420] [--dry-run-cpu]

One forward and backward of a random Llama with the widths of the 8B model (bf16, no optimizer) per probe; fewer
layers, so that weights and, for the offload, 2 bytes x hidden size x layers x tokens of host memory are there. Lengths
double until memory, a probe's time limit or `--max-length` ends a rung; the last one that ended well is reported,
never an estimate. `use_kernels` is transformers' own tiled MLP from the Hub, `liger tiled` the same from the installed
package; where one is absent the table says why. The result goes to `bench/results/long_sequence_gpu.json`; with
`--dry-run-cpu` a tiny model runs the same code and nothing is kept.

For comparison, ArcticTraining's recipes for one H200 (8B, parameters offloaded, FlashAttention 3) reach 65k, 300k with
a fused loss, 650k with offloaded checkpoints, 1.2M with a tiled MLP too: the paper's figures, not ours.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi.attention import register_varlen_attention
from hf_effi.kernels import tile_mlp
from hf_effi.memory import stream_layers, tile_loss
from hf_effi.memory.layer_modes import LayerModes
from hf_effi.memory.offload import ActivationOffloader

#: rung -> its switches
RUNGS: dict[str, tuple[str, ...]] = {
    "checkpoint": ("checkpoint",),
    "+ tiled loss": ("checkpoint", "loss"),
    "+ offload": ("checkpoint", "loss", "offload"),
    "+ tiled MLP": ("checkpoint", "loss", "offload", "mlp"),
    "  or use_kernels": ("checkpoint", "loss", "offload", "use_kernels"),
    "  or liger tiled": ("checkpoint", "loss", "offload", "liger"),
    "StreamLayer + tiled loss + offload": ("loss", "stream", "offload"),
}
PAPER = {"checkpoint": 65_000, "+ tiled loss": 300_000, "+ offload": 650_000, "+ tiled MLP": 1_200_000}


class Unavailable(Exception):
    """A rung that cannot run here; the message says why."""


def build(layers: int, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    wide = device == "cuda"
    config = LlamaConfig(
        vocab_size=128_256 if wide else 64,
        hidden_size=4096 if wide else 16,
        intermediate_size=14_336 if wide else 40,
        num_attention_heads=32 if wide else 4,
        num_key_value_heads=8 if wide else 2,
        num_hidden_layers=layers,
        max_position_embeddings=1 << 22,
        attn_implementation=register_varlen_attention() if wide else "sdpa",
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16 if wide else torch.float32).train()


@contextlib.contextmanager
def switched_on(model: LlamaForCausalLM, switches: tuple[str, ...]) -> Iterator[None]:
    """Apply what a rung consists of, and take it off again."""
    with contextlib.ExitStack() as stack:
        if "checkpoint" in switches:
            model.activation_checkpointing_enable()
            stack.callback(model.activation_checkpointing_disable)
        if "loss" in switches:
            stack.enter_context(tile_loss(model))
        if "mlp" in switches:
            stack.enter_context(tile_mlp(model))
        if "use_kernels" in switches:
            stack.enter_context(hub_kernels(model))
        if "liger" in switches:
            stack.enter_context(liger_tiled(model))
        if "stream" in switches:
            stack.enter_context(stream_layers(model, num_chunks=8))
        if "offload" in switches and "stream" in switches:  # a streamed layer saves its input itself
            stack.enter_context(ActivationOffloader().saving())
        elif "offload" in switches:
            stack.enter_context(LayerModes(model, "offload"))
        yield


@contextlib.contextmanager
def hub_kernels(model: LlamaForCausalLM) -> Iterator[None]:
    try:
        model.set_use_kernels(True)
    except Exception as error:  # no `kernels` package, no network: transformers raises several kinds
        raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0][:80]}") from error
    try:
        yield
    finally:
        model.set_use_kernels(False)


@contextlib.contextmanager
def liger_tiled(model: LlamaForCausalLM) -> Iterator[None]:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("liger-kernel is not installed")
    if model.device.type != "cuda":
        raise Unavailable("its Triton kernels need a GPU")
    from liger_kernel.transformers.tiled_mlp import LigerTiledSwiGLUMLP

    before = [layer.mlp for layer in model.model.layers]
    try:
        for layer in model.model.layers:
            tiled = LigerTiledSwiGLUMLP(model.config).to(model.device, model.dtype)
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(tiled, name, getattr(layer.mlp, name))
            layer.mlp = tiled
        yield
    finally:
        for layer, mlp in zip(model.model.layers, before, strict=True):
            layer.mlp = mlp


def probe(model: LlamaForCausalLM, length: int) -> dict[str, float] | None:
    """One step at `length`; `None` if memory ran out."""
    on_gpu = model.device.type == "cuda"
    tokens = torch.randint(model.config.vocab_size, (1, length), device=model.device)
    model.zero_grad()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"seconds": time.perf_counter() - start, "peak_gib": peak}


def climb(model: LlamaForCausalLM, rung: str, start: int, limit: int, seconds: float) -> dict[str, Any]:
    """Double the length until memory, time or `limit` ends the rung."""
    row: dict[str, Any] = {"rung": rung, "longest": 0, "ended_by": "--max-length", "paper": PAPER.get(rung)}
    begin, length = time.perf_counter(), start
    try:
        with switched_on(model, RUNGS[rung]):
            while length <= limit:
                found = probe(model, length)
                gc.collect()
                if model.device.type == "cuda":
                    torch.cuda.empty_cache()
                if found is None:
                    row["ended_by"] = "memory"
                    break
                row |= {"longest": length, **found}
                # The next probe takes up to four times as long: attention is quadratic.
                if time.perf_counter() - begin + 4 * found["seconds"] > seconds:
                    row["ended_by"] = "time"
                    break
                length *= 2
    except Unavailable as error:
        row["ended_by"] = f"not available: {error}"
    return row


def main(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    device = "cpu" if args.dry_run_cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "bench.gpu.long_sequence needs a CUDA device; --dry-run-cpu runs the same code on a tiny model."
        )
    model = build(args.layers, device)
    start, limit = (64, 256) if args.dry_run_cpu else (16_384, args.max_length)
    rows = []
    for rung in RUNGS:
        rows.append(climb(model, rung, start, limit, args.seconds / len(RUNGS)))
        last = rows[-1]
        print(
            f"{rung:<36}{last['longest']:>10}  {last.get('seconds', 0):8.2f} s  ended by {last['ended_by']}",
            flush=True,
        )
    lengths = {row["rung"]: row["longest"] for row in rows}
    ratio = max(lengths.values()) / lengths["checkpoint"] if lengths["checkpoint"] else None
    write_result(
        "long_sequence_gpu",
        command=command_line("bench.gpu.long_sequence"),
        seeds=[0],
        headline=[headline("max_length_over_checkpoint", ratio)],
        rows=[*rows, {"layers": args.layers, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}],
        folder=folder,
    )
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=420, help="for all rungs together")
    parser.add_argument("--max-length", type=int, default=2_097_152)
    parser.add_argument("--dry-run-cpu", action="store_true", help="a tiny model on the CPU; nothing is kept")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    if options.dry_run_cpu:
        with tempfile.TemporaryDirectory() as scratch:
            main(options, Path(scratch))
    else:
        main(options, RESULTS)
