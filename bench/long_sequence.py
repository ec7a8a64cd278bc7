"""How long a sequence survives under a hard memory cap, and what that costs in time.

    python -m bench.long_sequence [--seeds 3] [--cap-mib 160] [--repeats 5]

Each probe is a fresh process: a Llama with 8 layers is built, one short step warms it up, then `RLIMIT_DATA` is set to
what the process uses plus the cap, and one forward and backward of the language-model loss runs. The longest length that
survives is found by doubling and bisection to 5 %. For `offload` the host is a file mapping, which the cap does not
count: a CPU has no second memory. `2 ranks` are two processes with the cap each. Time is CPU seconds a token of the same
step in one process without a cap, the arms in turn; the ratio is of medians, over plain checkpointing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bench._schema import command_line, headline, write_result
from hf_effi import tile_loss, tile_mlp
from hf_effi.parallel import attention_scope, make_sequence_group, sharded_forward, split_batch
from hf_effi.parallel.layer_modes import LayerModes
from hf_effi.parallel.stream_layer import stream_layers

VOCAB, HIDDEN, MLP, LAYERS, HEADS, WARM_UP = 8192, 128, 512, 8, 4, 256
TIME_LENGTH = 2048
LOGIT_SHARDS, STREAM_CHUNKS = 32, 8
#: arm -> its switches; each row of the ladder adds one
ARMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "checkpoint": ("checkpoint",),
    "+ tiled loss": ("checkpoint", "loss"),
    "+ tiled MLP": ("checkpoint", "loss", "mlp"),
    "+ offload": ("checkpoint", "loss", "mlp", "offload"),
    "StreamLayer + tiled loss + offload": ("checkpoint", "loss", "stream", "offload"),
    "+ tiled MLP, 2 ranks": ("checkpoint", "loss", "mlp", "ranks"),
}


def build(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=1 << 20,
        )
    ).train()


@contextlib.contextmanager
def switched_on(model: LlamaForCausalLM, switches: tuple[str, ...]) -> Iterator[None]:
    """Apply what an arm consists of, and take it off again."""
    with contextlib.ExitStack() as stack:
        if "checkpoint" in switches:
            model.activation_checkpointing_enable()
            stack.callback(model.activation_checkpointing_disable)
        if "loss" in switches:
            stack.enter_context(tile_loss(model, num_shards=LOGIT_SHARDS))
        if "mlp" in switches:
            stack.enter_context(tile_mlp(model))
        if "stream" in switches:
            stack.enter_context(stream_layers(model, num_chunks=STREAM_CHUNKS))
        if "offload" in switches:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(LayerModes(model, "offload", allocate_host=file_buffers(folder)))
        yield


def file_buffers(folder: str) -> Callable[[int], torch.Tensor]:
    """Return an allocator of shared file mappings, which `RLIMIT_DATA` does not count."""
    made = iter(range(1 << 20))
    return lambda size: torch.from_file(f"{folder}/{next(made)}", shared=True, size=size, dtype=torch.uint8)


def step(model: LlamaForCausalLM, length: int, seed: int, group: Any = None) -> float:
    """One forward and backward; returns the loss."""
    tokens = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    if group is None:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    else:
        layout, shard = split_batch({"input_ids": tokens, "labels": tokens}, group)
        with attention_scope(), sharded_forward(model, layout):
            loss = model(**shard, num_items_in_batch=length - 1).loss
    loss.backward()
    return float(loss.detach())


# --- the longest sequence under a cap --------------------------------------------------------------------------------


def data_bytes() -> int:
    """Return what counts against `RLIMIT_DATA` now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def probe(arm: str, length: int, seed: int, cap_mib: int) -> None:
    """What a child does: exit 0 if the step survives the cap, 1 if memory ran out."""
    group = None
    if "ranks" in ARMS[arm]:
        dist.init_process_group("gloo")
        group = make_sequence_group(2)
    model = build(seed)
    with switched_on(model, ARMS[arm]):
        step(model, WARM_UP, seed, group)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (cap_mib << 20), resource.RLIM_INFINITY))
        try:
            step(model, length, seed, group)
        except (RuntimeError, MemoryError) as error:
            # At once: the other rank waits in a collective, and a clean-up may want memory.
            os._exit(1 if "allocate" in str(error) or isinstance(error, MemoryError) or group else 2)
    os._exit(0)


def survives(arm: str, length: int, seed: int, cap_mib: int) -> bool:
    call = [sys.executable, "-m", "bench.long_sequence", "--probe", arm, "--length", str(length)]
    call += ["--first-seed", str(seed), "--cap-mib", str(cap_mib)]
    # Large blocks go back to the system when they are freed, so that the cap sees what is in use.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    if "ranks" not in ARMS[arm]:
        code = subprocess.run(call, env=env, capture_output=True, check=False).returncode
        if code not in (0, 1):
            raise RuntimeError(f"{arm} at {length}: the probe ended with {code}, not for want of memory.")
        return code == 0
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                call,
                env={**env, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"},
                stdout=subprocess.DEVNULL,
                stderr=open(f"{folder}/{rank}", "w"),  # noqa: SIM115
            )
            for rank in range(2)
        ]
        return [rank.wait() for rank in ranks] == [0, 0]


def longest(arm: str, seed: int, cap_mib: int, start: int) -> int:
    """Return the longest length, to 5 %, that survives; `start` should."""
    low, high = 0, start
    while survives(arm, high, seed, cap_mib):
        low, high = high, 2 * high
    while high - low > max(64, low // 20):
        middle = (low + high) // 2 // 32 * 32
        low, high = (middle, high) if survives(arm, middle, seed, cap_mib) else (low, middle)
    return low
