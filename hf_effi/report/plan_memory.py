"""`hf-effi plan memory`: what a training step will need, switch by switch, before a GPU is touched."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from ..functional.memory import (
    OPTIMIZERS,
    ForwardTrace,
    MemoryTable,
    StepFlops,
    Switches,
    cheapest_fit,
    extra_time,
    memory_table,
    possible_switch_sets,
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
#: what is an estimate in every plan, and what no plan counts
ESTIMATED = (
    "selective, offload, gradients of the logits, tiled loss, tiled MLP, stream, recomputed layers, exchange buffers "
    "of sequence parallelism, layers gathered by ZeRO-3 or FSDP, the time column (FLOPs that are repeated)"
)
NOT_COUNTED = "temporaries, fragmentation, the CUDA context (leave --headroom)"


@dataclass(frozen=True)
class MemoryPlan:
    """
    What [`plan_memory`] returns.

    Args:
        rows (`tuple[tuple[Switches, MemoryTable, float], ...]`): Each set of switches with its table and the estimated
            extra time of a step.
        chosen (`Switches` or `None`): The fastest set that fits; `None` if none does, or without a budget.
        budget_bytes (`int` or `None`): What had to fit, headroom taken off.
        exact (`tuple[str, ...]`): Columns that are those of a real step to the byte.
        not_modelled (`tuple[str, ...]`): What this plan leaves out or takes for granted, one sentence each.
    """

    rows: tuple[tuple[Switches, MemoryTable, float], ...]
    chosen: Switches | None
    budget_bytes: int | None
    exact: tuple[str, ...] = ()
    not_modelled: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "budget_bytes": self.budget_bytes,
            "chosen": None if self.chosen is None else describe_switches(self.chosen),
            "exact": list(self.exact),
            "estimated": ESTIMATED,
            "not_counted": NOT_COUNTED,
            "not_modelled": list(self.not_modelled),
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
    attention: str | None = None,
    padded: bool = False,
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

    The model's own code runs on tensors without data, as it would on a CPU, so that any family is counted as it is:
    `exact` of the result names the columns that are those of a real step, `not_modelled` what the plan leaves out.

    Args:
        config (`PreTrainedConfig`, `torch.nn.Module` or `str`): The model: a config, a folder, a `config.json`, a name
            on the Hub, or a model, which is left as it is (`dtype`, `attention`, LoRA and 4 bits are then its own).
        seq_len (`int`): Tokens of a row; of the encoder and of the decoder, where there are two.
        batch (`int`, *optional*, defaults to `1`): Rows of a micro-batch on one device.
        gpu_gib (`float`, *optional*): Memory of a device in GiB; without it nothing is chosen.
        headroom (`float`, *optional*, defaults to `0.1`): Fraction of it left for what is not counted.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of the weights.
        autocast (`bool`, *optional*, defaults to `False`): `bf16=True` of the training arguments.
        attention (`str`, *optional*): `sdpa` or `eager`; any other, such as `flash_attention_2`, is counted as fused
            attention without masks. By default what the config says, or what transformers takes.
        padded (`bool`, *optional*, defaults to `False`): Whether rows are padded or packed: SDPA then keeps a mask of
            `seq_len**2` values for each layer and row.
        optimizer (`str`, *optional*, defaults to `"adamw_torch"`): A name of `TrainingArguments.optim`; `OPTIMIZERS`
            are counted, the state of others is named as left out.
        sharding (`str`, *optional*, defaults to `"ddp"`): `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`.
        ranks (`int`, *optional*, defaults to `1`): Devices that share under `sharding`.
        sequence_parallel_size (`int`, *optional*, defaults to `1`): Devices that share each row.
        lora_rank (`int`, *optional*): Train LoRA matrices of this rank only.
        lora_targets (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): As in PEFT.
        four_bit (`bool`, *optional*, defaults to `False`): Keep the frozen linear weights in 4 bits.
        generate (`tuple[int, int]`, *optional*): Sequences and tokens per sequence that GRPO generates at once on a
            device.

    Raises:
        ValueError: an argument out of range, one that does nothing beside the others, or a model that cannot be
            traced.

    Example:
    ```python
    plan = plan_memory("path/to/model", seq_len=8192, gpu_gib=80, dtype="bfloat16")
    print(plan.chosen, plan.rows[0][1].peak / 2**30)
    ```
    """
    from torch.nn import Module

    from .model_shapes import load_config
    from .trace_memory import TracedModel

    _check(seq_len=seq_len, batch=batch, ranks=ranks, sequence_parallel_size=sequence_parallel_size)
    if generate is not None:
        _check(generate_sequences=generate[0], generate_tokens=generate[1])
    if gpu_gib is not None and not 0 < gpu_gib < math.inf:
        raise ValueError(f"gpu_gib={gpu_gib!r} must be a number above 0.")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom!r} must lie in [0, 1).")
    refuse_idle("headroom", headroom, 0.1, gpu_gib is not None, "with gpu_gib=, the memory that it is a part of")
    refuse_idle("lora_targets", lora_targets, "all-linear", lora_rank is not None, "with lora_rank=")
    own = {"dtype": (dtype, "float32"), "attention": (attention, None), "lora_rank": (lora_rank, None)}
    for name, (value, default) in {**own, "four_bit": (four_bit, False)}.items():
        refuse_idle(name, value, default, not isinstance(config, Module), "with a config: a model has its own")
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r} is not known. Known: {', '.join(SHARDINGS)}.")
    if seq_len % sequence_parallel_size:
        raise ValueError(f"seq_len={seq_len} is no multiple of sequence_parallel_size={sequence_parallel_size}.")
    counted = _counted_optimizer(optimizer)
    base = Switches(
        optimizer=counted,
        shard_stage=SHARDINGS[sharding],
        shard_ranks=ranks,
        sequence_parallel_size=sequence_parallel_size,
    )
    traced = TracedModel(
        load_config(config) if isinstance(config, str) else config,
        dtype=dtype,
        autocast=autocast,
        attention=attention,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
        four_bit=four_bit,
    )
    trace = traced.trace(batch, seq_len // sequence_parallel_size, padded)
    kv_cache = None if generate is None else traced.cache_bytes(*generate)
    budget = None if gpu_gib is None else int(gpu_gib * (1 - headroom) * 2**30)
    plan = _plan(traced.parameters, trace, traced.flops(batch, seq_len), base, budget=budget, kv_cache=kv_cache or 0)
    left_out = [f"the state of optimizer {optimizer!r}, counted as 0"] if counted is None else []
    if generate is not None and kv_cache is None:
        left_out.append(f"the KV cache, counted as 0: {type(traced.model).__name__} returns none")
    left_out += _left_out(traced, trace)
    return dataclasses.replace(plan, exact=_exact(traced, base, kv_cache), not_modelled=tuple(left_out))


def _counted_optimizer(optimizer: str) -> str | None:
    """Return a name of `OPTIMIZERS`, or `None` for another that transformers knows."""
    from transformers.training_args import OptimizerNames

    if optimizer not in OPTIMIZERS and optimizer in {name.value for name in OptimizerNames}:
        return None
    return optimizer


def _exact(traced: Any, base: Switches, kv_cache: int | None) -> tuple[str, ...]:
    """
    Return the columns of which every byte is known: none that ranks share, which pad their shares, or that is guessed.
    """
    shared = base.shard_stage if base.shard_ranks > 1 else 0
    guessed = traced.run.invented
    as_stored = traced.quantization is None and not any(parameter.four_bit for parameter in traced.parameters)
    known = {
        "parameters": as_stored and shared < 3,
        "gradients": "values" not in guessed and shared < 2,
        "optimizer": "values" not in guessed and shared < 1 and base.optimizer is not None,
        "activations (keep, checkpoint)": not guessed and traced.stand_in is None and base.sequence_parallel_size == 1,
        "kv_cache": kv_cache is not None and not guessed & {"values", "length"},
    }
    return tuple(name for name, is_known in known.items() if is_known)


def _left_out(traced: Any, trace: ForwardTrace) -> list[str]:
    """Say what the trace took for granted or did not see."""
    from .trace_memory import SHORT_ROWS

    found = []
    if parts := traced.not_run():
        found.append(
            f"activations, gradients and optimizer state of {_named(parts)}: these parts do not run on rows of text "
            "alone"
        )
    if parts := traced.not_reached():
        found.append(f"gradients and optimizer state of {_named(parts)}: no gradient of the loss reaches these parts")
    if traced.recomputing:
        functions = ", ".join(sorted(traced.recomputing))
        found.append(f"what the backward pass of {functions} computes again: that is its own code")
    if "routing" in traced.run.invented:
        found.append("routing by value: experts (or selected keys) are taken to share the tokens evenly")
    if "values" in traced.run.invented:
        found.append("branches that depend on the values of activations, which are guessed")
    if "length" in traced.run.invented:
        found.append(
            f"rows of this length, since the model loops over tokens: figures of up to {SHORT_ROWS[-1]} tokens are "
            "continued, in which longer windows do not show"
        )
    if traced.stand_in is not None:
        found.append(f"attention {traced.stand_in!r}: counted as fused attention without masks")
    if traced.quantization is not None:
        found.append(
            f"quantization {traced.quantization!r} of the config: weights are counted in the dtype of the plan"
        )
    if not trace.layer_inputs:
        found.append("ways to keep less: the model does not support activation checkpointing")
    if (buffers := traced.buffer_bytes()) >= 2**20:
        found.append(f"buffers of the model, {buffers:,} bytes")
    return found


def _named(parts: dict[str, int]) -> str:
    """Return the names of parts with their parameters, the five largest at most."""
    largest = sorted(parts.items(), key=lambda item: -item[1])[:5]
    names = ", ".join(f"{name} ({parameters:,} parameters)" for name, parameters in largest)
    return names + " and others" * (len(parts) > len(largest))


def planned_and_saved(model: Any, batch: Any, activations: str = "keep", autocast: bool = False) -> tuple[int, int]:
    """
    Return what the planner says a training forward of this model saves, and what it really saves, in bytes.

    The model runs once for real; it must be on a CPU, and what [`plan_memory`] plans is what a CPU does.

    Args:
        model (`torch.nn.Module`): A model of transformers, also with adapters.
        batch (`Mapping`): Arguments of its forward pass, labels included.
        activations (`str`, *optional*, defaults to `"keep"`): `keep`, or `checkpoint` for a model with activation
            checkpointing on.
        autocast (`bool`, *optional*, defaults to `False`): Whether the pass runs under bf16 autocast.

    Raises:
        ValueError: another way to keep activations, or a model that cannot be traced.

    Example:
    ```python
    planned, saved = planned_and_saved(model, {"input_ids": ids, "labels": ids})
    assert abs(planned - saved) <= 0.01 * saved
    ```
    """
    import torch

    from ..functional.saved_bytes import SavedBytes
    from .trace_memory import TracedModel

    if activations not in ("keep", "checkpoint"):
        raise ValueError(f"activations={activations!r} must be 'keep' or 'checkpoint': the others are estimates.")
    traced = TracedModel(model, autocast=autocast)
    table = memory_table(traced.parameters, traced.trace_batch(batch), Switches(activations=activations))
    planned = table.saved + (table.weight_copies if activations == "keep" else 0)
    modes = [module.training for module in model.modules()]
    model.train()
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            with SavedBytes(exclude=model.parameters()) as saved:
                out = model(**batch)
            del out
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return planned, saved.total


def _check(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def _plan(
    parameters: Any, trace: Any, flops: StepFlops, base: Switches, *, budget: int | None, kv_cache: int
) -> MemoryPlan:
    rows = tuple(
        (switches, memory_table(parameters, trace, switches, kv_cache), extra_time(switches, flops))
        for switches in possible_switch_sets(trace, base)
    )
    chosen = (
        None
        if budget is None
        else cheapest_fit(parameters, trace, flops, base, budget_bytes=budget, kv_cache=kv_cache)
    )
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
    parser.add_argument("--attention", help="sdpa, eager, flash_attention_2 ... (default: what transformers takes)")
    parser.add_argument("--padded", action="store_true", help="rows are padded or packed, so that SDPA keeps masks")
    parser.add_argument(
        "--optimizer", default="adamw_torch", help="a name of TrainingArguments.optim (default adamw_torch)"
    )
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
            attention=args.attention,
            padded=args.padded,
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
    lines.append(f"Exact: {', '.join(plan.exact) or 'nothing'}. Estimated: {ESTIMATED}.")
    lines.append(f"Not counted: {NOT_COUNTED}.")
    return "\n".join([*lines, *(f"Not modelled: {sentence}." for sentence in plan.not_modelled)])
