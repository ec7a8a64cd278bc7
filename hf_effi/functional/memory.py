"""Memory of a training step by arithmetic: parameters, gradients, optimizer, activations, logits, KV cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from .optimizer_states import OPTIMIZERS, Parameter, optimizer_bytes

#: how a layer's activations are kept; `stream` computes each layer in chunks of the sequence
ACTIVATIONS = ("keep", "selective", "checkpoint", "offload", "stream")


@dataclass(frozen=True)
class ForwardTrace:
    """
    What one forward pass of a micro-batch makes autograd save, in bytes.

    Args:
        tokens (`int`): Tokens of the micro-batch on one rank.
        layer_inputs, layer_kept, layer_attention, layer_mlp (`tuple[int, ...]`): One number per run of a layer that
            can be checkpointed (a layer that is run twice counts twice): its input; all that it saves (input
            included); outputs of fused attention; what its MLP saves. Empty for a model without such layers.
        outside (`int`): Saved outside these layers, without logits and loss.
        logits (`int`): Saved by the LM head and the loss.
        logits_width (`int`): Vocabulary size.
        hidden_size (`int`): Width of the residual stream.
        weight_copies (`int`, *optional*, defaults to `0`): Weights that autocast has copied to the compute dtype.
        attention_width (`int`, *optional*, defaults to `0`): `(query heads + 2 KV heads) * head_dim`.
        itemsize (`int`, *optional*, defaults to `2`): Bytes of a value in the compute dtype.
        kept (`int`, *optional*): What all layers save together, tensors that several save counted once; by default the
            sum of `layer_kept`.
        passed (`int`, *optional*, defaults to `0`): Masks and the like that are passed to layers, and that recomputing
            keeps alive.
    """

    tokens: int
    layer_inputs: tuple[int, ...]
    layer_kept: tuple[int, ...]
    layer_attention: tuple[int, ...]
    layer_mlp: tuple[int, ...]
    outside: int
    logits: int
    logits_width: int
    hidden_size: int
    weight_copies: int = 0
    attention_width: int = 0
    itemsize: int = 2
    kept: int | None = None
    passed: int = 0


def extrapolated_trace(traces: Sequence[ForwardTrace], rows: Sequence[int], seq_len: int) -> ForwardTrace:
    """
    Return the trace of longer rows: every figure on the parabola through those of three lengths.

    Args:
        traces (`Sequence[ForwardTrace]`): Three, of one model and batch size.
        rows (`Sequence[int]`): Their tokens in a row.
        seq_len (`int`): Tokens of the row that is asked for.
    """
    values = {}
    for column in fields(ForwardTrace):
        found = [getattr(trace, column.name) for trace in traces]
        if column.name in ("logits_width", "hidden_size", "attention_width", "itemsize"):
            values[column.name] = found[0]
        elif isinstance(found[0], tuple):
            values[column.name] = tuple(
                through_three_points(rows, points, seq_len) for points in zip(*found, strict=True)
            )
        else:
            values[column.name] = through_three_points(rows, found, seq_len)
    return ForwardTrace(**values)


def through_three_points(places: Sequence[int], values: Sequence[int], at: int) -> int:
    """
    Return the value at another place of the parabola through three points, rounded.

    Example:
    ```python
    >>> through_three_points([1, 2, 3], [2, 5, 10], 10)
    101

    ```
    """
    a, b, c = places
    return round(
        values[0] * (at - b) * (at - c) / ((a - b) * (a - c))
        + values[1] * (at - a) * (at - c) / ((b - a) * (b - c))
        + values[2] * (at - a) * (at - b) / ((c - a) * (c - b))
    )


@dataclass(frozen=True)
class Switches:
    """
    What a run switches on to save memory.

    Args:
        activations (`str`, *optional*, defaults to `"keep"`): One of `ACTIVATIONS`.
        tiled_loss (`bool`, *optional*, defaults to `False`): The LM head and the loss over tiles of tokens.
        tiled_mlp (`bool`, *optional*, defaults to `False`): The MLP over tiles of `hidden_size` tokens.
        optimizer (`str`, *optional*, defaults to `"adamw_torch"`): One of `OPTIMIZERS`; `None`: its state is not
            counted.
        shard_stage (`int`, *optional*, defaults to `0`): What the data-parallel ranks share, as in ZeRO: 1 optimizer,
            2 and gradients, 3 and parameters (FSDP's full shard).
        shard_ranks (`int`, *optional*, defaults to `1`): Number of ranks that share.
        sequence_parallel_size (`int`, *optional*, defaults to `1`): Ranks that share each sequence. The trace must be
            of one rank's share already.
        loss_tile_tokens (`int`, *optional*, defaults to `4096`): Tokens of a tile of the loss.
        stream_chunks (`int`, *optional*, defaults to `3`): Chunks of a layer under `stream`.
    """

    activations: str = "keep"
    tiled_loss: bool = False
    tiled_mlp: bool = False
    optimizer: str | None = "adamw_torch"
    shard_stage: int = 0
    shard_ranks: int = 1
    sequence_parallel_size: int = 1
    loss_tile_tokens: int = 4096
    stream_chunks: int = 3

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations={self.activations!r} is not known. Known: {', '.join(ACTIVATIONS)}.")
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} is not known. Known: {', '.join(OPTIMIZERS)}.")
        if self.shard_stage not in (0, 1, 2, 3):
            raise ValueError(f"shard_stage={self.shard_stage!r} must be 0, 1, 2 or 3.")
        for name in ("shard_ranks", "sequence_parallel_size", "loss_tile_tokens", "stream_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1.")


@dataclass(frozen=True)
class MemoryTable:
    """
    Bytes on one device, by what they are for. `peak` is what the training step needs at its worst moment.

    Args:
        parameters, gradients, optimizer (`int`): Held through the whole step.
        weight_copies (`int`): Copies in the compute dtype (autocast), or gathered layers (shard stage 3).
        activations (`int`): What the decoder layers and the embedding keep until the backward pass.
        working (`int`): Recomputing one layer.
        logits (`int`): LM head and loss, forward and backward.
        kv_cache (`int`): Keys and values of a generation. Not there during the training step.
        host (`int`): Bytes in host memory.
        saved (`int`): What autograd saves in the forward pass, LM head and loss included: the figure to compare with
            [`~hf_effi.functional.saved_bytes.SavedBytes`]. Not a part of the peak of its own.
    """

    parameters: int
    gradients: int
    optimizer: int
    weight_copies: int
    activations: int
    working: int
    logits: int
    kv_cache: int = 0
    host: int = 0
    saved: int = 0

    @property
    def peak(self) -> int:
        """The larger one of the training step (logits and a layer's working memory take turns) and a generation."""
        step = self.gradients + self.weight_copies + self.activations + max(self.working, self.logits)
        return self.parameters + self.optimizer + max(step, self.kv_cache)

    def as_dict(self) -> dict[str, int]:
        """Return the columns and `peak` by name."""
        return {**asdict(self), "peak": self.peak}


def memory_table(
    parameters: Sequence[Parameter], trace: ForwardTrace, switches: Switches, kv_cache: int = 0
) -> MemoryTable:
    """
    Return the table for one set of switches.

    Args:
        parameters (`Sequence[Parameter]`): All parameters.
        trace (`ForwardTrace`): Of one micro-batch.
        switches (`Switches`): What is on.
        kv_cache (`int`, *optional*, defaults to `0`): From [`kv_cache_bytes`].
    """
    stays, host = _layers_stay(trace, switches.activations)
    stored = sum(parameter.stored_bytes for parameter in parameters)
    gradients = sum(parameter.size * parameter.itemsize for parameter in parameters if parameter.trainable)
    state = 0 if switches.optimizer is None else optimizer_bytes(parameters, switches.optimizer)
    copies = trace.weight_copies
    if switches.shard_stage == 3 and switches.shard_ranks > 1:
        # The layer at work and the one fetched ahead, in the compute dtype; no other copies.
        values = sum(parameter.size for parameter in parameters)
        copies = 2 * math.ceil(values / max(len(trace.layer_inputs), 1)) * trace.itemsize
    ranks = switches.shard_ranks
    return MemoryTable(
        parameters=math.ceil(stored / ranks) if switches.shard_stage >= 3 else stored,
        gradients=math.ceil(gradients / ranks) if switches.shard_stage >= 2 else gradients,
        optimizer=math.ceil(state / ranks) if switches.shard_stage >= 1 else state,
        weight_copies=copies,
        activations=stays + trace.outside,
        working=_working(trace, switches),
        logits=_logits(trace, switches),
        kv_cache=kv_cache,
        host=host,
        saved=stays + trace.outside + trace.logits,
    )


def _layers_stay(trace: ForwardTrace, activations: str) -> tuple[int, int]:
    """Return the bytes that the layers leave on the device and on the host."""
    inputs = sum(trace.layer_inputs)
    if activations == "keep":
        return sum(trace.layer_kept) if trace.kept is None else trace.kept, 0
    if activations == "selective":
        return inputs + sum(trace.layer_attention), 0
    if activations == "offload":
        # The last layer stays, and one copy is on its way.
        on_device = trace.layer_inputs[-1] + (trace.layer_inputs[0] if len(trace.layer_inputs) > 1 else 0)
        return on_device, inputs - trace.layer_inputs[-1]
    return inputs, 0


def _working(trace: ForwardTrace, switches: Switches) -> int:
    """Return what recomputing the largest layer holds, and the exchange buffers of sequence parallelism."""
    exchange = 0
    if switches.sequence_parallel_size > 1:
        exchange = 2 * trace.tokens * trace.attention_width * trace.itemsize
    if switches.activations == "keep":
        return exchange
    largest = 0
    for kept, mlp, layer_input in zip(trace.layer_kept, trace.layer_mlp, trace.layer_inputs, strict=True):
        if switches.tiled_mlp:
            tile = min(1.0, trace.hidden_size / trace.tokens)
            kept = kept - mlp + math.ceil(mlp * tile) + layer_input
        if switches.activations == "stream":
            kept = math.ceil(kept / switches.stream_chunks) + trace.tokens * trace.attention_width * trace.itemsize
        largest = max(largest, kept)
    return largest + exchange + trace.passed


def _logits(trace: ForwardTrace, switches: Switches) -> int:
    """
    Return what the LM head and the loss hold: saved logits and their gradients (fp32 for the loss, then the compute
    dtype); in tiles, two fp32 tiles, the hidden states with their gradient, and the head's gradient in fp32.
    """
    if not switches.tiled_loss:
        return trace.logits + trace.tokens * trace.logits_width * (4 + trace.itemsize)
    tile = min(trace.tokens, switches.loss_tile_tokens)
    hidden = 2 * trace.tokens * trace.hidden_size * trace.itemsize
    return 2 * tile * trace.logits_width * 4 + hidden + 4 * trace.logits_width * trace.hidden_size


def kv_cache_bytes(
    sequences: int, tokens: int, *, layers: int, kv_heads: int, head_dim: int, itemsize: int = 2
) -> int:
    """
    Return the bytes of keys and values of a generation,
    `2 * sequences * tokens * layers * kv_heads * head_dim * itemsize`.

    Args:
        sequences (`int`): Sequences generated at once on a device.
        tokens (`int`): Prompt and completion.
        layers, kv_heads, head_dim (`int`): Of the model.
        itemsize (`int`, *optional*, defaults to `2`): Bytes of a value.

    Example:
    ```python
    >>> kv_cache_bytes(8, 4096, layers=32, kv_heads=8, head_dim=128) / 2**30
    4.0

    ```
    """
    return 2 * sequences * tokens * layers * kv_heads * head_dim * itemsize


@dataclass(frozen=True)
class StepFlops:
    """
    Forward FLOPs of a micro-batch, for [`extra_time`].

    Args:
        linear (`float`): Linear layers of the decoder.
        attention (`float`): Products of queries, keys and values.
        head (`float`): LM head.
    """

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.linear + self.attention + self.head


def extra_time(switches: Switches, flops: StepFlops) -> float:
    """
    Return the estimated extra time of a step as a fraction of one without switches (three forward passes' FLOPs).

    Checkpointing repeats the forward pass of the layers, `selective` does so without attention, a tiled loss repeats
    the LM head. What moves or slices data counts 1% each: enough to be chosen last.

    Args:
        switches (`Switches`): What is on.
        flops (`StepFlops`): Of one forward pass.

    Example:
    ```python
    >>> flops = StepFlops(linear=80, attention=10, head=10)
    >>> [round(extra_time(Switches(activations=a), flops), 3) for a in ("keep", "selective", "checkpoint", "offload")]
    [0.0, 0.267, 0.3, 0.31]

    ```
    """
    repeated = {"keep": 0.0, "selective": flops.linear}.get(switches.activations, flops.linear + flops.attention)
    repeated += flops.head if switches.tiled_loss else 0.0
    moving = 0.01 * {"offload": 1, "stream": 2}.get(switches.activations, 0) + 0.01 * switches.tiled_mlp
    return repeated / (3 * flops.total) + moving


def exact_switch_sets(base: Switches) -> list[Switches]:
    """Return all sets that leave gradients as they are: every way to keep activations, tiled loss and tiled MLP."""
    return [
        replace(base, activations=activations, tiled_loss=loss, tiled_mlp=mlp)
        for activations, loss, mlp in itertools.product(ACTIVATIONS, (False, True), (False, True))
        if not (mlp and activations == "keep")  # a tiled MLP recomputes, which is what keeping avoids
    ]


def possible_switch_sets(trace: ForwardTrace, base: Switches) -> list[Switches]:
    """
    Return the sets of [`exact_switch_sets`] that a model allows: without layers to recompute, those that keep all.
    """
    return [switches for switches in exact_switch_sets(base) if trace.layer_inputs or switches.activations == "keep"]


def cheapest_fit(
    parameters: Sequence[Parameter],
    trace: ForwardTrace,
    flops: StepFlops,
    base: Switches,
    *,
    budget_bytes: int,
    kv_cache: int = 0,
) -> Switches | None:
    """
    Return the exact switch set of least [`extra_time`] whose peak is within the budget, or `None` if none is.

    Args:
        parameters, trace, flops: Of the model and its micro-batch.
        base (`Switches`): Its optimizer, sharding and parallelism are kept.
        budget_bytes (`int`): Memory of a device.
        kv_cache (`int`, *optional*, defaults to `0`): From [`kv_cache_bytes`].
    """
    fitting = [
        switches
        for switches in possible_switch_sets(trace, base)
        if memory_table(parameters, trace, switches, kv_cache).peak <= budget_bytes
    ]
    return min(fitting, key=lambda switches: extra_time(switches, flops), default=None)
