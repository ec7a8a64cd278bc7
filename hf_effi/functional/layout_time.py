"""How long an update takes under a layout: FLOPs, what is computed again, and communication that nothing hides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from .memory import ForwardTrace, MemoryTable, Parameter, StepFlops, Switches, extra_time

if TYPE_CHECKING:
    from .layout_plan import Layout

#: bytes of a bucket of DDP
_BUCKET = 25 * 2**20
_FROM_ZERO = ("latency_seconds", "layer_seconds", "unit_seconds", "overlap")


@dataclass(frozen=True)
class Machine:
    """
    Devices and links. The defaults are a data sheet's for eight H100 in a node, with efficiencies that are usual
    there; none was measured for this package. Set your own.

    Args:
        peak_flops (`float`, *optional*, defaults to 989e12): Of one device per second, in the precision of the run.
        efficiency (`float`, *optional*, defaults to 0.5): Share of it that matrix products reach, in (0, 1].
        devices_per_node (`int`, *optional*, defaults to 8): Devices with the fast link.
        link_bytes (`float`, *optional*, defaults to 300e9): Bytes per second of one device inside a node, one way.
        node_link_bytes (`float`, *optional*, defaults to 40e9): The same between nodes.
        latency_seconds (`float`, *optional*, defaults to 20e-6): Of one collective.
        overlap (`float`, *optional*, defaults to 0.7): Share of the computing beside which communication can hide, in
            [0, 1].
        memory_bytes (`float`, *optional*, defaults to 2.5e12): Bytes per second of a device's memory.
        host_link_bytes (`float`, *optional*, defaults to 40e9): Bytes per second between a device and its host.
        host_memory_bytes (`float`, *optional*, defaults to 20e9): Bytes per second of host memory, for one rank.
        layer_seconds (`float`, *optional*, defaults to 0.0): Fixed time of one pass of a layer, beside its FLOPs.
        unit_seconds (`float`, *optional*, defaults to 0.0): Fixed time of gathering and reducing one sharded layer in
            a forward and a backward pass, beside its bytes. GPUs hide it behind kernels, CPUs do not.

    Raises:
        ValueError: a value out of range.

    Example:
    ```python
    >>> Machine(devices_per_node=8).link(8) / Machine(devices_per_node=4).link(8)
    7.5

    ```
    """

    peak_flops: float = 989e12
    efficiency: float = 0.5
    devices_per_node: int = 8
    link_bytes: float = 300e9
    node_link_bytes: float = 40e9
    latency_seconds: float = 20e-6
    overlap: float = 0.7
    memory_bytes: float = 2.5e12
    host_link_bytes: float = 40e9
    host_memory_bytes: float = 20e9
    layer_seconds: float = 0.0
    unit_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency={self.efficiency!r} must lie in (0, 1].")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap={self.overlap!r} must lie in [0, 1].")
        for column in fields(self):
            value, least = getattr(self, column.name), column.name in _FROM_ZERO
            if not (value >= 0 if least else value > 0) or value == math.inf:
                raise ValueError(f"{column.name}={value!r} must be a number {'of at least' if least else 'above'} 0.")

    def link(self, span: int) -> float:
        """Return the bytes per second among ranks of which the first and the last are `span` apart."""
        return self.link_bytes if span <= self.devices_per_node else self.node_link_bytes

    def gather(self, whole: float, ranks: int, span: int | None = None, calls: int = 1) -> float:
        """Return the seconds of an all-gather to, or a reduce-scatter of, `whole` bytes: a ring."""
        if ranks == 1:
            return 0.0
        return whole * (ranks - 1) / ranks / self.link(span or ranks) + calls * self.latency_seconds

    def reduce(self, whole: float, ranks: int, span: int | None = None, calls: int = 1) -> float:
        """Return the seconds of an all-reduce of `whole` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather(whole, ranks, span, calls)


@dataclass(frozen=True)
class StepTime:
    """
    Seconds of one update on each device.

    Args:
        compute (`float`): Forward and backward passes.
        recompute (`float`): What is computed again for activations.
        communication (`float`): All of it, also what is hidden.
        exposed (`float`): The part of it that nothing hides.
        transfer (`float`): To and from the host, that nothing hides.
        update (`float`): The optimizer's step.
        model_flops (`float`): Forward and backward FLOPs of one device, without what is computed again.
    """

    compute: float
    recompute: float
    communication: float
    exposed: float
    transfer: float
    update: float
    model_flops: float

    @property
    def total(self) -> float:
        """Seconds of an update."""
        return self.compute + self.recompute + self.exposed + self.transfer + self.update


def layout_time(
    layout: Layout,
    switches: Switches,
    parameters: Sequence[Parameter],
    trace: ForwardTrace,
    table: MemoryTable,
    row_flops: StepFlops,
    machine: Machine,
    *,
    devices: int,
    stage: int,
    exchange_width: int = 0,
) -> StepTime:
    """
    Return the time of an update.

    `accumulation * (3 F (1 + extra) / (peak * efficiency) + exposed) + exposed per update + optimizer`, with `F` the
    forward FLOPs of a micro-batch on one rank, `extra` what [`~hf_effi.functional.memory.extra_time`] says, and
    exposed what communication takes beyond `overlap` times the computing that runs beside it.

    Args:
        layout (`Layout`): What is planned.
        switches (`Switches`): Its switches.
        parameters (`Sequence[Parameter]`): Of one rank.
        trace (`ForwardTrace`): Of one micro-batch of one rank.
        table (`MemoryTable`): Of one device.
        row_flops (`StepFlops`): Forward FLOPs of one whole row.
        machine (`Machine`): Devices and links.
        devices (`int`): Ranks.
        stage (`int`): What ranks share, as ZeRO's stages.
        exchange_width (`int`, *optional*, defaults to 0): Values that a layer's forward exchanges for each token.
    """
    layers, repeats = len(trace.layer_inputs), int(layout.activations != "keep")
    forward = row_flops.total * layout.micro_batch / layout.ranks_per_group
    seconds = 3 * forward / (machine.peak_flops * machine.efficiency)
    compute = seconds + 3 * layers * machine.layer_seconds
    recompute = seconds * extra_time(switches, row_flops) + repeats * layers * machine.layer_seconds
    along = _along(layout, trace, machine, layers, repeats, exchange_width)
    along += (layers + 1) * machine.unit_seconds if stage == 3 else 0.0
    gathers, reductions, last = _states(layout, parameters, trace, machine, devices, stage, layers)
    beside, backward = machine.overlap * (compute + recompute), machine.overlap * (compute * 2 / 3 + recompute)
    each = layout.accumulation if _reduces_each(layout, stage) else 1
    waits = layout.accumulation * max(0.0, gathers - beside)
    # What gathers do not use of the computing is left for reductions.
    free = max(0.0, backward - gathers)
    waits += each * max(0.0, reductions - free)
    steps = layout.accumulation
    return StepTime(
        compute=steps * compute,
        recompute=steps * recompute,
        communication=steps * (along + gathers) + each * reductions + last,
        exposed=steps * along + waits + last,
        transfer=_transfer(layout, parameters, trace, machine, stage, compute + recompute),
        update=_update(layout, parameters, table, trace, machine, stage),
        model_flops=3 * forward * steps,
    )


def _reduces_each(layout: Layout, stage: int) -> bool:
    """DeepSpeed reduces after every backward from stage 2 on; DDP, ZeRO-1 and FSDP2 wait for the last one."""
    return layout.reduce_each or layout.engine in ("zero2", "zero3")


def _along(
    layout: Layout, trace: ForwardTrace, machine: Machine, layers: int, repeats: int, exchange_width: int
) -> float:
    """Return the seconds per micro-batch of what attention and MLP wait for: nothing runs beside it."""
    found = 0.0
    if (ranks := layout.sequence_parallel_size) > 1:
        passes = layers * (2 + repeats)
        found += machine.gather(trace.tokens * exchange_width * trace.itemsize * passes, ranks, calls=2 * passes)
    if (ranks := layout.tensor_parallel_size) > 1:
        calls = layers * (4 + 2 * repeats)
        found += machine.reduce(trace.tokens * trace.hidden_size * trace.itemsize * calls, ranks, calls=calls)
    return found


def _states(
    layout: Layout,
    parameters: Sequence[Parameter],
    trace: ForwardTrace,
    machine: Machine,
    devices: int,
    stage: int,
    layers: int,
) -> tuple[float, float, float]:
    """Return the seconds of gathering weights per micro-batch, of one reduction, and of what ends an update."""
    trained = [parameter for parameter in parameters if parameter.trainable]
    own = float(sum(parameter.size * parameter.itemsize for parameter in trained))
    sent = float(sum(parameter.size for parameter in trained) * trace.itemsize)
    whole = float(sum(parameter.size for parameter in parameters) * trace.itemsize)
    ranks, calls = layout.shard_ranks, layers + 1
    if layout.engine == "tp":
        return 0.0, 0.0, 0.0
    if stage == 0:
        return 0.0, machine.reduce(own, devices, calls=math.ceil(own / _BUCKET)), 0.0
    if stage < 3:
        buckets = math.ceil(sent / _BUCKET)
        return 0.0, machine.gather(sent, ranks, calls=buckets), machine.gather(sent, ranks, calls=buckets)
    reduction = machine.gather(sent, ranks, calls=calls)
    if layout.engine == "hybrid":
        reduction += machine.reduce(sent / ranks, devices // ranks, devices, calls)
    return 2 * machine.gather(whole, ranks, calls=calls), reduction, 0.0


def _update(
    layout: Layout,
    parameters: Sequence[Parameter],
    table: MemoryTable,
    trace: ForwardTrace,
    machine: Machine,
    stage: int,
) -> float:
    """Return the seconds of the optimizer: states and trained weights are read and written, gradients read."""
    if layout.offload:
        kept = sum(trace.layer_inputs[:-1]) if layout.activations == "offload" else 0
        return 2 * (table.host - kept) / machine.host_memory_bytes
    trained = sum(one.size * one.itemsize for one in parameters if one.trainable)
    share = layout.shard_ranks if stage else 1
    return (2 * table.optimizer + 3 * trained / share) / machine.memory_bytes


def _transfer(
    layout: Layout,
    parameters: Sequence[Parameter],
    trace: ForwardTrace,
    machine: Machine,
    stage: int,
    computing: float,
) -> float:
    """Return the seconds that wait for the link to the host."""
    found = 0.0
    if layout.activations == "offload":
        moved = 2 * sum(trace.layer_inputs[:-1]) / machine.host_link_bytes
        found += layout.accumulation * max(0.0, moved - machine.overlap * computing)
    if layout.offload:
        # Gradients down and weights up once; under stage 3 the shard of the weights for every gather.
        times = 2 * layout.accumulation + 1 if stage == 3 else 2
        shard = sum(one.size * one.itemsize for one in parameters if one.trainable) / layout.shard_ranks
        found += times * shard / machine.host_link_bytes
    return found
