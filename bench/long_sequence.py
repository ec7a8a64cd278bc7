"""How long a sequence survives under a hard memory cap, and what that costs in time.

    python -m bench.long_sequence [--seeds 3] [--cap-mib 64] [--repeats 5]

Each probe is a fork: a Llama with 8 layers is built, one short step warms it up, then `RLIMIT_DATA` is set to
what the process uses plus the cap, and one forward and backward of the language-model loss runs. The longest length
that survives is found by a galloping search and bisection, to 5 % or 64 tokens. For `offload` the host is a file
mapping, which the cap does not count: a CPU has no second memory. `2 ranks` are two processes with the cap each. Time
is CPU seconds a token of the same step in one process without a cap, the arms in turn; the ratio is of medians, over
plain checkpointing.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from bench._schema import command_line, headline, load_results, write_result
from hf_effi.kernels import tile_mlp
from hf_effi.memory import tile_loss
from hf_effi.memory.layer_modes import LayerModes
from hf_effi.memory.offload import ActivationOffloader
from hf_effi.memory.stream_layer import stream_layers
from hf_effi.parallel import attention_scope, make_sequence_group, sharded_forward, split_batch

NO_MEMORY = 3
VOCAB, HIDDEN, MLP, LAYERS, HEADS, WARM_UP = 8192, 128, 512, 8, 4, 256
TIME_LENGTH = 2048
LOGIT_SHARDS, STREAM_CHUNKS = 32, 8
FORK = multiprocessing.get_context("fork")
#: large blocks go back to the system when they are freed, so that the cap sees what is in use
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
#: arm -> its switches; each row of the ladder adds one
ARMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "checkpoint": ("checkpoint",),
    "+ tiled loss": ("checkpoint", "loss"),
    "+ tiled MLP": ("checkpoint", "loss", "mlp"),
    "+ offload": ("checkpoint", "loss", "mlp", "offload"),
    "StreamLayer + tiled loss + offload": ("loss", "stream", "offload"),
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
            offloader = ActivationOffloader(allocate=file_buffers(folder))
            if "stream" in switches:  # a streamed layer saves its input itself
                stack.enter_context(offloader.saving())
            else:
                stack.enter_context(LayerModes(model, "offload", offloader=offloader))
        yield


def file_buffers(folder: str) -> Callable[[int], torch.Tensor]:
    """Return an allocator of shared file mappings, which `RLIMIT_DATA` does not count."""
    made = iter(range(1 << 20))
    return lambda size: torch.from_file(f"{folder}/{next(made)}", shared=True, size=size, dtype=torch.uint8)


def step(model: LlamaForCausalLM, length: int, seed: int, group: Any = None) -> float:
    """One forward and backward; returns the loss."""
    tokens = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    with contextlib.ExitStack() as stack:
        batch = {"input_ids": tokens, "labels": tokens}
        if group is not None:
            layout, shard = split_batch(batch, group)
            batch = {**shard, "num_items_in_batch": length - 1}
            stack.enter_context(attention_scope(["sdpa"]))
            stack.enter_context(sharded_forward(model, layout))
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    return float(loss.detach())


# --- the longest sequence under a cap --------------------------------------------------------------------------------


def data_bytes() -> int:
    """Return what counts against `RLIMIT_DATA` now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def probe(arm: str, length: int, seed: int, cap_mib: int, rank: int, port: int) -> None:
    """What a child does: exit 0 if the step survives the cap, `NO_MEMORY` if memory ran out."""
    group = None
    if "ranks" in ARMS[arm]:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        group = make_sequence_group(2)
    model = build(seed)
    with switched_on(model, ARMS[arm]):
        step(model, WARM_UP, seed, group)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (cap_mib << 20), resource.RLIM_INFINITY))
        try:
            step(model, length, seed, group)
        except (RuntimeError, MemoryError) as error:
            no_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
            # The other rank sees a broken connection. At once: a clean-up may want memory.
            os._exit(NO_MEMORY if no_memory or group else 1)
    os._exit(0)


def survives(arm: str, length: int, seed: int, cap_mib: int) -> bool:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        FORK.Process(target=probe, args=(arm, length, seed, cap_mib, rank, port))
        for rank in range(2 if "ranks" in ARMS[arm] else 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    if not set(codes) <= {0, NO_MEMORY}:
        raise RuntimeError(f"{arm} at {length}: the probe ended with {codes}, not for want of memory.")
    return not any(codes)


def longest(arm: str, seed: int, cap_mib: int, guess: int) -> int:
    """
    Return the longest length, to 5 % or 64 tokens, that survives: a galloping search from `guess`, then bisection.
    """
    low, high, length, reach = 0, 0, guess, max(64, guess // 20)
    while not (low and high) and length >= 32:
        if survives(arm, length, seed, cap_mib):
            low, length = length, length + reach
        else:
            high, length = length, length - reach
        reach *= 2
    while high - low > max(64, low // 20):
        middle = (low + high) // 2 // 32 * 32
        low, high = (middle, high) if survives(arm, middle, seed, cap_mib) else (low, middle)
    return low


# --- time per token --------------------------------------------------------------------------------------------------


def seconds_per_token(seed: int, repeats: int) -> dict[str, float]:
    """Return the median CPU seconds per token of each arm that runs in one process; arms take turns."""
    arms = [arm for arm, switches in ARMS.items() if "ranks" not in switches]
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    model = build(seed)
    for repeat in range(repeats + 1):
        for arm in arms:
            with switched_on(model, ARMS[arm]):
                start = time.process_time()
                step(model, TIME_LENGTH, seed)
                if repeat:  # the first turn warms up
                    found[arm].append((time.process_time() - start) / TIME_LENGTH)
    return {arm: statistics.median(values) for arm, values in found.items()}


# --- the result ------------------------------------------------------------------------------------------------------


def main(seeds: range, cap_mib: int, repeats: int) -> None:
    rows, known = [], known_lengths()
    for seed in seeds:
        # In a process of its own: after a backward, autograd does not work in forked children.
        with ProcessPoolExecutor(1, FORK) as pool:
            times = pool.submit(seconds_per_token, seed, repeats).result()
        for arm in ARMS:
            known[arm] = longest(arm, seed, cap_mib, known.get(arm) or max(known.values(), default=256))
            relative = times[arm] / times["checkpoint"] if arm in times else None
            rows.append({"seed": seed, "arm": arm, "longest": known[arm], "time_over_checkpoint": relative})
            print(f"seed {seed}  {arm:<36} {known[arm]:>7} tokens   time {relative or float('nan'):.3f}", flush=True)
        # After each seed: a run that is cut short has its results.
        write_result(
            "long_sequence",
            command=command_line("bench.long_sequence"),
            seeds=range(seeds.start, seed + 1),
            headline=summarize(rows),
            rows=[*rows, {"cap_mib": cap_mib, "time_length": TIME_LENGTH, "repeats": repeats}],
        )


def known_lengths() -> dict[str, int]:
    """Return where the searches begin: at the lengths of the last result, if there is one."""
    rows = load_results().get("long_sequence", {"rows": []})["rows"]
    return {row["arm"]: row["longest"] for row in rows if "arm" in row}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Return the two headline figures: of the one-process arm that goes furthest within the time that the goal allows.
    """

    def ratios(arm: str) -> tuple[float, float]:
        plain = {row["seed"]: row["longest"] for row in rows if row["arm"] == "plain"}
        mine = [row for row in rows if row["arm"] == arm]
        return (
            statistics.median(row["longest"] / plain[row["seed"]] for row in mine),
            statistics.median(row["time_over_checkpoint"] for row in mine),
        )

    measured = [ratios(arm) for arm, switches in ARMS.items() if "ranks" not in switches]
    length, seconds = max([pair for pair in measured if pair[1] <= 1.1] or measured)
    return [headline("max_length_ratio", length, ">= 8"), headline("time_per_token_ratio", seconds, "<= 1.1")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--cap-mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "bench.long_sequence", *sys.argv[1:]], os.environ | ALLOCATOR)
    main(range(args.first_seed, args.first_seed + args.seeds), args.cap_mib, args.repeats)
