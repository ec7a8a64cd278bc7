"""What tiled and chunked computation costs and saves, counted: `python -m bench.tiled_compute`.

One training step of a small Qwen3 on one sequence per row, against plain activation checkpointing: multiply-adds of
the matrix products outside of the attention kernel, and the most bytes of tensors that were alive at once beside
weights and gradients. Counts, not times: the same on every machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from bench._counters import GemmCounter, LiveBytes
from bench._schema import command_line, headline, write_result
from hf_effi.kernels.tiled_mlp import tile_mlp
from hf_effi.memory import tiled_loss
from hf_effi.memory.chunk_flow import ChunkFlow
from hf_effi.memory.stream_layer import stream_layers
from hf_effi.memory.tiled_loss import tile_loss
from hf_effi.trainers.mixins.chunk_flow import ChunkFlowMixin

SEEDS = (0, 1, 2)
LENGTHS = (512, 2048)
LOSS, MLP = partial(tile_loss, num_shards=16), partial(tile_mlp, num_shards=16)


@dataclass(frozen=True)
class Arm:
    """What is switched on."""

    checkpoint: bool = True
    patches: tuple[Callable[[Any], Any], ...] = ()
    chunk_flow: ChunkFlow | None = None


ARMS = {
    "plain": Arm(checkpoint=False),
    "checkpoint": Arm(),
    "+ tile_loss": Arm(patches=(LOSS,)),
    "+ tile_loss + tile_mlp": Arm(patches=(LOSS, MLP)),
    "+ tile_loss + stream_layers(3)": Arm(patches=(LOSS, partial(stream_layers, num_chunks=3))),
    "+ tile_loss + stream_layers(8)": Arm(patches=(LOSS, partial(stream_layers, num_chunks=8))),
    "tile_loss + chunk_flow(1/8, K=1)": Arm(checkpoint=False, patches=(LOSS,), chunk_flow=ChunkFlow(1, 1)),
    "tile_loss + chunk_flow(1/8, K=4)": Arm(checkpoint=False, patches=(LOSS,), chunk_flow=ChunkFlow(1, 4)),
}


class ChunkTrainer(ChunkFlowMixin, Trainer):
    """What runs one step."""


def build(seed: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max(LENGTHS),
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).train()


def measure(name: str, length: int, seed: int) -> dict[str, Any]:
    """Return the counts of one training step, and the gradient."""
    arm, model = ARMS[name], build(seed)
    flow = arm.chunk_flow and ChunkFlow(length // 8, arm.chunk_flow.max_live_chunks)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        args = TrainingArguments(folder, use_cpu=True, report_to="none")
        trainer = ChunkTrainer(model, args, chunk_flow=flow)
        trainer.current_gradient_accumulation_steps = 1
        if arm.checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for patch in arm.patches:
            stack.enter_context(patch(model))
        ids = torch.randint(0, model.config.vocab_size, (1, length))
        gemms, memory = stack.enter_context(GemmCounter()), stack.enter_context(LiveBytes())
        trainer.training_step(model, {"input_ids": ids, "labels": ids}, torch.tensor(length - 1))
    return {
        "arm": name,
        "length": length,
        "seed": seed,
        "multiply_adds": gemms.multiply_adds,
        "activation_bytes": memory.peak - sum(weight.numel() * 4 for weight in model.parameters()),
        "gradient": torch.cat([weight.grad.flatten() for weight in model.parameters()]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    torch.set_num_threads(1)
    # torch's own operator works out of sight of the counters.
    tiled_loss.chunked_linear_cross_entropy = lambda: None
    rows = []
    for seed in SEEDS:
        for length in LENGTHS:
            found = {arm: measure(arm, length, seed) for arm in ARMS}
            reference, base = found["plain"]["gradient"], found["checkpoint"]
            for row in found.values():
                error = (row.pop("gradient") - reference).norm() / reference.norm()
                row["relative_gradient_error"] = float(error)
                row["multiply_adds_to_checkpoint"] = row["multiply_adds"] / base["multiply_adds"]
                row["bytes_to_checkpoint"] = row["activation_bytes"] / base["activation_bytes"]
                rows.append(row)
                print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    longest = [row for row in rows if row["length"] == LENGTHS[-1]]

    def worst(arm: str, key: str) -> float:
        return max(row[key] for row in longest if row["arm"] == arm)

    chunked = "tile_loss + chunk_flow(1/8, K=1)"
    both, streamed = "+ tile_loss + tile_mlp", "+ tile_loss + stream_layers(8)"
    write_result(
        "tiled_compute",
        command=command_line("bench.tiled_compute"),
        seeds=SEEDS,
        headline=[
            headline("max_relative_gradient_error", max(r["relative_gradient_error"] for r in rows), "<= 1e-5"),
            headline("tiled_multiply_adds_to_checkpoint", worst(both, "multiply_adds_to_checkpoint"), "<= 1"),
            headline("tiled_bytes_to_checkpoint", worst(both, "bytes_to_checkpoint")),
            headline("streamed_multiply_adds_to_checkpoint", worst(streamed, "multiply_adds_to_checkpoint")),
            headline("streamed_bytes_to_checkpoint", worst(streamed, "bytes_to_checkpoint")),
            headline("chunked_multiply_adds_to_checkpoint", worst(chunked, "multiply_adds_to_checkpoint")),
            headline("chunked_bytes_to_checkpoint", worst(chunked, "bytes_to_checkpoint")),
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
