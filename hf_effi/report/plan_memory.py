"""`hf-effi plan memory`: what a training step will need, switch by switch, before a GPU is touched."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from ..functional.memory import (
    OPTIMIZERS,
    MemoryTable,
    StepFlops,
    Switches,
    cheapest_fit,
    exact_switch_sets,
    extra_time,
    kv_cache_bytes,
    memory_table,
)
from ..functional.options import refuse_idle

#: name on the command line -> what the data-parallel ranks share
SHARDINGS = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
COLUMNS = ("parameters", "gradients", "optimizer", "weight_copies", "activations", "working", "logits", "kv_cache")
#: what turns on each way to keep activations
_ACTIVATION_SWITCHES = {
    "selective": "activation_checkpointing=True with SelectiveCheckpointCallback()",
    "checkpoint": "activation_checkpointing=True",
    "offload": "activation_checkpointing=True with ActivationOffloadCallback()",
    "stream": "PatchCallback(stream_layers)",
}
ESTIMATES = (
    "Exact: parameters, gradients, optimizer state, KV cache, and what autograd saves, which is read off the model's own",
    "forward pass with fused attention. Estimated: tiled loss, tiled MLP, stream, sequence parallelism, gathered layers,",
    "the time column (FLOPs that are repeated). Not counted: temporaries, fragmentation, the CUDA context (--headroom).",
)


@dataclass(frozen=True)
class MemoryPlan:
    """
    What [`plan_memory`] returns.

    Args:
        rows (`tuple[tuple[Switches, MemoryTable, float], ...]`): Each set of switches with its table and the estimated
            extra time of a step.
        chosen (`Switches` or `None`): The fastest set that fits; `None` if none does, or without a budget.
        budget_bytes (`int` or `None`): What had to fit, headroom taken off.
    """

    rows: tuple[tuple[Switches, MemoryTable, float], ...]
    chosen: Switches | None
    budget_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "budget_bytes": self.budget_bytes,
            "chosen": None if self.chosen is None else describe_switches(self.chosen),
            "rows": [
                {"switches": describe_switches(switches), "extra_time": round(time, 4), **table.as_dict()}
                for switches, table, time in self.rows
            ],
        }


def describe_switches(switches: Switches) -> str:
    """
    Return a short name of a set of switches.

    Example:
    ```python
    >>> describe_switches(Switches(activations="checkpoint", tiled_loss=True))
    'checkpoint + tiled loss'

    ```
    """
    extra = [name for name, on in (("tiled loss", switches.tiled_loss), ("tiled MLP", switches.tiled_mlp)) if on]
    return " + ".join([switches.activations, *extra])


def how_to_switch_on(switches: Switches) -> str:
    """
    Return what to write for a set of switches.

    Example:
    ```python
    >>> how_to_switch_on(Switches(activations="checkpoint", tiled_loss=True))
    'activation_checkpointing=True; PatchCallback(tile_loss), which TRL trainers do not need'

    ```
    """
    parts = [_ACTIVATION_SWITCHES[switches.activations]] if switches.activations != "keep" else []
    if switches.tiled_loss:
        parts.append("PatchCallback(tile_loss), which TRL trainers do not need")
    if switches.tiled_mlp:
        parts.append("PatchCallback(tile_mlp)")
    return "; ".join(parts) or "nothing to switch on"


def plan_memory(
    config: Any,
    *,
    seq_len: int,
    batch: int = 1,
    gpu_gib: float | None = None,
    headroom: float = 0.1,
    dtype: str = "float32",
    autocast: bool = False,
    optimizer: str = "adamw_torch",
    sharding: str = "ddp",
    ranks: int = 1,
    sequence_parallel_size: int = 1,
    lora_rank: int | None = None,
    lora_targets: list[str] | str = "all-linear",
    four_bit: bool = False,
    generate: tuple[int, int] | None = None,
) -> MemoryPlan:
    """
    Plan the memory of a training step from a model's config. No weights are read, and nothing runs on a device.

    Args:
        config (`PreTrainedConfig` or `str`): The model: a config, a folder, a `config.json` or a name on the Hub.
        seq_len (`int`): Tokens of a row.
        batch (`int`, *optional*, defaults to `1`): Rows of a micro-batch on one device.
        gpu_gib (`float`, *optional*): Memory of a device in GiB; without it nothing is chosen.
        headroom (`float`, *optional*, defaults to `0.1`): Fraction of it left for what is not counted.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of the weights.
        autocast (`bool`, *optional*, defaults to `False`): `bf16=True` of the training arguments.
        optimizer (`str`, *optional*, defaults to `"adamw_torch"`): `adamw_torch`, `adamw_8bit`, `adafactor` or `sgd`.
        sharding (`str`, *optional*, defaults to `"ddp"`): `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`.
        ranks (`int`, *optional*, defaults to `1`): Devices that share under `sharding`.
        sequence_parallel_size (`int`, *optional*, defaults to `1`): Devices that share each row.
        lora_rank (`int`, *optional*): Train LoRA matrices of this rank only.
        lora_targets (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): As in PEFT.
        four_bit (`bool`, *optional*, defaults to `False`): Keep the frozen linear weights in 4 bits.
        generate (`tuple[int, int]`, *optional*): Sequences and tokens per sequence that GRPO generates at once on a
            device.

    Raises:
        ValueError: an argument out of range, or a model that cannot be traced.

    Example:
    ```python
    plan = plan_memory("path/to/model", seq_len=8192, gpu_gib=80, dtype="bfloat16")
    print(plan.chosen, plan.rows[0][1].peak / 2**30)
    ```
    """
    from .trace_memory import TracedModel, load_config

    _check(seq_len=seq_len, batch=batch, ranks=ranks, sequence_parallel_size=sequence_parallel_size)
    if generate is not None:
        _check(generate_sequences=generate[0], generate_tokens=generate[1])
    if gpu_gib is not None and not 0 < gpu_gib < math.inf:
        raise ValueError(f"gpu_gib={gpu_gib!r} must be a number above 0.")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom!r} must lie in [0, 1).")
    refuse_idle("headroom", headroom, 0.1, gpu_gib is not None, "with gpu_gib=, the memory that it is a part of")
    refuse_idle("lora_targets", lora_targets, "all-linear", lora_rank is not None, "with lora_rank=")
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r} is not known. Known: {', '.join(SHARDINGS)}.")
    if seq_len % sequence_parallel_size:
        raise ValueError(f"seq_len={seq_len} is no multiple of sequence_parallel_size={sequence_parallel_size}.")
    base = Switches(
        optimizer=optimizer,
        shard_stage=SHARDINGS[sharding],
        shard_ranks=ranks,
        sequence_parallel_size=sequence_parallel_size,
    )
    traced = TracedModel(
        load_config(config) if isinstance(config, str) else config,
        dtype=dtype,
        autocast=autocast,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
        four_bit=four_bit,
    )
    trace = traced.trace(batch, seq_len // sequence_parallel_size)
    flops = traced.flops(batch, seq_len)
    kv_cache = 0 if generate is None else kv_cache_bytes(*generate, **traced.kv_shape(), itemsize=trace.itemsize)
    budget = None if gpu_gib is None else int(gpu_gib * (1 - headroom) * 2**30)
    return _plan(traced.parameters, trace, flops, base, budget, kv_cache)


def _check(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def _plan(
    parameters: Any, trace: Any, flops: StepFlops, base: Switches, budget: int | None, kv_cache: int
) -> MemoryPlan:
    rows = tuple(
        (switches, memory_table(parameters, trace, switches, kv_cache), extra_time(switches, flops))
        for switches in exact_switch_sets(base)
    )
    chosen = None if budget is None else cheapest_fit(parameters, trace, flops, base, budget, kv_cache)
    return MemoryPlan(rows, chosen, budget)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi plan memory` to `parser`."""
    parser.add_argument("config", metavar="CONFIG", help="config.json, a folder with one, or a model on the Hub")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a micro-batch on one device (default 1)")
    parser.add_argument(
        "--gpu-gib",
        type=float,
        help="memory of a device; nothing is chosen without it; exit code 1 where nothing fits",
    )
    parser.add_argument("--headroom", type=float, default=0.1, help="fraction for what is not counted (default 0.1)")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights (default float32)")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast, as bf16=True of the training arguments")
    parser.add_argument("--optimizer", default="adamw_torch", help=f"{', '.join(OPTIMIZERS)} (default adamw_torch)")
    parser.add_argument("--sharding", default="ddp", help=f"{', '.join(SHARDINGS)} (default ddp)")
    parser.add_argument("--ranks", type=int, default=1, help="devices that share under --sharding (default 1)")
    parser.add_argument("--sequence-parallel-size", type=int, default=1, help="devices that share a row (default 1)")
    parser.add_argument("--lora-rank", type=int, help="train LoRA matrices of this rank only")
    parser.add_argument(
        "--lora-targets", default="all-linear", help="comma-separated module names (default all-linear)"
    )
    parser.add_argument("--load-in-4bit", action="store_true", help="frozen linear weights in 4 bits")
    parser.add_argument(
        "--generate",
        type=int,
        nargs=2,
        metavar=("SEQUENCES", "TOKENS"),
        help="what GRPO generates at once on a device",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    """Print the table; return the exit status: 1 where nothing fits, 2 for a bad value."""
    targets = args.lora_targets if args.lora_targets == "all-linear" else args.lora_targets.split(",")
    try:
        plan = plan_memory(
            args.config,
            seq_len=args.seq_len,
            batch=args.batch,
            gpu_gib=args.gpu_gib,
            headroom=args.headroom,
            dtype=args.dtype,
            autocast=args.bf16,
            optimizer=args.optimizer,
            sharding=args.sharding,
            ranks=args.ranks,
            sequence_parallel_size=args.sequence_parallel_size,
            lora_rank=args.lora_rank,
            lora_targets=targets,
            four_bit=args.load_in_4bit,
            generate=tuple(args.generate) if args.generate else None,
        )
    except ValueError as error:
        print(f"hf-effi plan memory: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan.as_dict(), indent=2) if args.json else format_plan(plan))
    return 1 if plan.budget_bytes is not None and plan.chosen is None else 0


def format_plan(plan: MemoryPlan) -> str:
    """Return the table as text, in GiB, one row a set of switches."""
    titles = ("params", "grads", "optim", "copies", "activ", "working", "logits", "KV")
    lines = ["GiB on one device" + " " * 20 + "".join(f"{t:>9}" for t in (*titles, "peak", "host", "time"))]
    for switches, table, time in plan.rows:
        values = [*(getattr(table, column) for column in COLUMNS), table.peak, table.host]
        fits = plan.budget_bytes is not None and table.peak <= plan.budget_bytes
        mark = "*" if switches == plan.chosen else "+" if fits else " "
        cells = "".join(f"{value / 2**30:9.2f}" for value in values)
        lines.append(f"{mark} {describe_switches(switches):<35}{cells}{time:>+9.0%}")
    lines.append("")
    if plan.budget_bytes is not None:
        budget = f"{plan.budget_bytes / 2**30:.1f} GiB"
        found = "nothing fits" if plan.chosen is None else f"fastest that fits (*): {describe_switches(plan.chosen)}"
        lines.append(f"Budget {budget}: {found}. Sets marked + fit too.")
        if plan.chosen is not None:
            lines.append(f"In code: {how_to_switch_on(plan.chosen)}.")
        else:
            least = min(table.peak for _, table, _ in plan.rows)
            lines.append(
                f"The smallest set needs {least / 2**30:.1f} GiB. Ways on: --sharding fsdp --ranks N, "
                "--sequence-parallel-size N, --lora-rank, --load-in-4bit, --optimizer adamw_8bit, a shorter --seq-len."
            )
    return "\n".join([*lines, *ESTIMATES])
