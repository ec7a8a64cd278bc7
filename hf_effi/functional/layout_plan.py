"""Which layouts a Trainer can run on a number of devices, what each needs of one device, and their order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .layout_time import Machine, StepTime, layout_time
from .memory import ForwardTrace, MemoryTable, Parameter, StepFlops, Switches, memory_table

#: engine -> what its ranks share, as ZeRO's stages; `fsdp2` shares among all, `hybrid` among some
STAGES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3, "hybrid": 3, "tp": 0}
#: ways to keep activations that are planned, from the least to the most that is computed again or moved
ACTIVATIONS = ("keep", "selective", "checkpoint", "offload")
#: step times that differ by less count as equal, and rules decide
TIE = 0.01


@dataclass(frozen=True)
class Layout:
    """
    One way to train on all devices.

    Args:
        engine (`str`): A key of `STAGES`.
        shard_ranks (`int`): Ranks that share the model's states; 1 under `ddp` and `tp`.
        sequence_parallel_size, tensor_parallel_size (`int`): Ranks that share each row, and each matrix.
        micro_batch (`int`): Rows of a forward pass, of one rank or of the ranks that share them.
        accumulation (`int`): Forward passes per update.
        activations (`str`): One of `ACTIVATIONS`.
        offload (`bool`): States of the optimizer (ZeRO-3 and FSDP2: parameters too) in host memory.
        reduce_each (`bool`): FSDP2 reduces gradients after every micro-batch (`sync_each_batch`); without, each rank
            keeps those of the whole model until the last one.

    Example:
    ```python
    >>> Layout("fsdp2", 8, 2, 1, 1, 16, "checkpoint", False, False).name
    'fsdp2 x8, sequence parallel 2, micro-batch 1 x 16, checkpoint'

    ```
    """

    engine: str
    shard_ranks: int
    sequence_parallel_size: int
    tensor_parallel_size: int
    micro_batch: int
    accumulation: int
    activations: str
    offload: bool
    reduce_each: bool

    @property
    def ranks_per_group(self) -> int:
        """Ranks that work on the same rows."""
        return self.sequence_parallel_size * self.tensor_parallel_size

    @property
    def name(self) -> str:
        """A line that tells it."""
        parts = [f"{self.engine} x{self.shard_ranks}" if self.shard_ranks > 1 else self.engine]
        if self.sequence_parallel_size > 1:
            parts.append(f"sequence parallel {self.sequence_parallel_size}")
        if self.tensor_parallel_size > 1:
            parts.append(f"tensor parallel {self.tensor_parallel_size}")
        parts.append(f"micro-batch {self.micro_batch} x {self.accumulation}")
        if self.activations != "keep":
            parts.append("activation offload" if self.activations == "offload" else self.activations)
        parts += [word for word, on in (("state offload", self.offload), ("reduce each", self.reduce_each)) if on]
        return ", ".join(parts)


@dataclass(frozen=True)
class Space:
    """
    What can be chosen.

    Args:
        devices (`int`): Ranks.
        global_batch (`int`): Rows per update.
        sequence_sizes (`tuple[int, ...]`, *optional*, defaults to `(1,)`): Sizes of sequence parallelism that the
            model and the length of a row allow.
        tensor_sizes (`tuple[int, ...]`, *optional*, defaults to `(1,)`): The same of tensor parallelism.
        engines (`tuple[str, ...]`, *optional*): By default all of `STAGES`.
        activations (`tuple[str, ...]`, *optional*): By default all of `ACTIVATIONS`.
        max_micro_batch (`int`, *optional*, defaults to 16): Largest micro-batch.
        offload (`bool`, *optional*, defaults to `True`): Whether layouts with states in host memory are among them.

    Raises:
        ValueError: a value out of range.
    """

    devices: int
    global_batch: int
    sequence_sizes: tuple[int, ...] = (1,)
    tensor_sizes: tuple[int, ...] = (1,)
    engines: tuple[str, ...] = tuple(STAGES)
    activations: tuple[str, ...] = ACTIVATIONS
    max_micro_batch: int = 16
    offload: bool = True

    def __post_init__(self) -> None:
        for name in ("devices", "global_batch", "max_micro_batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        for name, known in (("engines", tuple(STAGES)), ("activations", ACTIVATIONS)):
            if wrong := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name} has {wrong[0]!r}, which is not known. Known: {', '.join(known)}.")


def why_not(layout: Layout, space: Space) -> str | None:
    """
    Say why a layout cannot run, or return `None`.

    Args:
        layout (`Layout`): Any.
        space (`Space`): Devices and rows.

    Example:
    ```python
    >>> why_not(Layout("zero2", 4, 2, 1, 1, 8, "keep", False, False), Space(4, 16, sequence_sizes=(1, 2)))
    'sequence parallelism runs under DDP and FSDP2: DeepSpeed scales the gradients of ranks that share a sequence'

    ```
    """
    sequence, tensor, shard = layout.sequence_parallel_size, layout.tensor_parallel_size, layout.shard_ranks
    fsdp = layout.engine in ("fsdp2", "hybrid")
    if layout.engine == "tp" and (tensor == 1 or tensor != space.devices):
        return "tensor parallelism here takes all devices: beside other engines no test of this package runs it"
    if layout.engine != "tp" and tensor > 1:
        return "tensor parallelism beside other engines is run by no test of this package"
    if layout.engine == "tp" and layout.activations in ("selective", "offload"):
        return "the callbacks of selective checkpointing and offload are not shown under tensor parallelism"
    if sequence > 1 and layout.engine.startswith("zero"):
        return (
            "sequence parallelism runs under DDP and FSDP2: DeepSpeed scales the gradients of ranks that share a "
            "sequence"
        )
    if sequence > 1 and layout.engine in ("hybrid", "tp"):
        return "sequence parallelism is run by no test of this package under hybrid sharding or tensor parallelism"
    if sequence not in space.sequence_sizes or tensor not in space.tensor_sizes:
        return "the model or the length of a row does not split over so many ranks"
    if space.devices % (sequence * tensor):
        return "the ranks of a row do not divide the devices"
    if STAGES[layout.engine] == 0 and (shard != 1 or layout.offload):
        return "nothing is sharded or offloaded without ZeRO or FSDP2"
    if layout.engine == "hybrid" and not (1 < shard < space.devices and space.devices % shard == 0):
        return "hybrid sharding needs more than one shard and more than one replica"
    if STAGES[layout.engine] and layout.engine != "hybrid" and shard != space.devices:
        return "ZeRO and FSDP2 share among all devices"
    if STAGES[layout.engine] and space.devices == 1 and not layout.offload:
        return "one device has nobody to share with"
    if layout.reduce_each and not (fsdp and layout.accumulation > 1):
        return "reducing after every micro-batch is a choice of FSDP2 with accumulation"
    groups = space.devices // (sequence * tensor)
    if groups * layout.micro_batch * layout.accumulation != space.global_batch:
        return "groups x micro-batch x accumulation is not the global batch"
    return None


def enumerate_layouts(space: Space) -> list[Layout]:
    """
    Return all layouts that can run, each once.

    For each of them `devices / (sequence x tensor) x micro_batch x accumulation` is the global batch.

    Args:
        space (`Space`): What can be chosen.

    Example:
    ```python
    >>> found = enumerate_layouts(Space(2, 2, engines=("ddp", "fsdp2"), activations=("keep",), offload=False))
    >>> [layout.name for layout in found]
    ['ddp, micro-batch 1 x 1', 'fsdp2 x2, micro-batch 1 x 1']

    ```
    """
    return [layout for layout in _every_layout(space) if why_not(layout, space) is None]


def _every_layout(space: Space) -> Iterator[Layout]:
    """Yield those whose numbers can fit at all, so that nothing is asked in vain a million times."""
    divisors = [size for size in range(1, space.devices + 1) if space.devices % size == 0]
    for engine, sequence, tensor in itertools.product(space.engines, space.sequence_sizes, space.tensor_sizes):
        groups, rest = divmod(space.devices, sequence * tensor)
        if rest or space.global_batch % groups:
            continue
        rows = space.global_batch // groups
        micros = [size for size in range(1, min(rows, space.max_micro_batch) + 1) if rows % size == 0]
        shards = [1] if not STAGES[engine] else divisors if engine == "hybrid" else [space.devices]
        offloads = (False, True) if space.offload and STAGES[engine] else (False,)
        for shard, micro, kept, offload, each in itertools.product(
            shards, micros, space.activations, offloads, (False, True)
        ):
            yield Layout(engine, shard, sequence, tensor, micro, rows // micro, kept, offload, each)


def layout_switches(layout: Layout, optimizer: str | None, tiled_loss: bool = False) -> Switches:
    """Return the switches of the memory planner for a layout."""
    return Switches(
        activations=layout.activations,
        tiled_loss=tiled_loss,
        optimizer=optimizer,
        shard_stage=STAGES[layout.engine],
        shard_ranks=layout.shard_ranks,
        sequence_parallel_size=layout.sequence_parallel_size,
    )


def layout_memory(
    parameters: Sequence[Parameter],
    trace: ForwardTrace,
    layout: Layout,
    *,
    devices: int,
    optimizer: str | None,
    tiled_loss: bool = False,
) -> MemoryTable:
    """
    Return the memory of one device: [`memory_table`], and what engines keep beside it.

    DDP keeps a second copy of all gradients in its buckets; FSDP2 keeps whole gradients while it waits for the last
    micro-batch; offload moves optimizer (ZeRO-1), gradients (ZeRO-2) and parameters (ZeRO-3, FSDP2) to the host.

    Args:
        parameters (`Sequence[Parameter]`): All parameters of one rank; under tensor parallelism from
            [`split_parameters`].
        trace (`ForwardTrace`): Of one micro-batch of one rank.
        layout (`Layout`): What is planned.
        devices (`int`): Ranks.
        optimizer (`str`, *optional*): As in [`Switches`].
        tiled_loss (`bool`, *optional*, defaults to `False`): As in [`Switches`].
    """
    table = memory_table(parameters, trace, layout_switches(layout, optimizer, tiled_loss))
    trained = [parameter for parameter in parameters if parameter.trainable]
    if layout.engine == "ddp" and devices > 1:
        buckets = sum(parameter.size * parameter.itemsize for parameter in trained)
        table = replace(table, gradients=table.gradients + buckets)
    if layout.engine in ("fsdp2", "hybrid") and layout.accumulation > 1 and not layout.reduce_each:
        whole = sum(parameter.size for parameter in trained) * trace.itemsize
        table = replace(table, gradients=table.gradients + whole)
    if not layout.offload:
        return table
    stage = STAGES[layout.engine]
    if stage == 3 and layout.shard_ranks == 1:  # one device gathers what it works on all the same
        values = sum(parameter.size for parameter in parameters)
        gathered = 2 * math.ceil(values / max(len(trace.layer_inputs), 1)) * trace.itemsize
        table = replace(table, weight_copies=gathered)
    shard = math.ceil(sum(parameter.size * parameter.itemsize for parameter in trained) / layout.shard_ranks)
    gradients = shard if stage >= 2 else 0
    moved = table.optimizer + gradients + (table.parameters if stage == 3 else 0)
    return replace(
        table,
        parameters=0 if stage == 3 else table.parameters,
        gradients=table.gradients - gradients,
        optimizer=0,
        host=table.host + moved,
    )


def split_parameters(parameters: Sequence[Parameter], split: Sequence[bool], size: int) -> list[Parameter]:
    """
    Return what one of `size` ranks of tensor parallelism has: matrices that are split have `1 / size` of their rows.

    Args:
        parameters (`Sequence[Parameter]`): All of the model.
        split (`Sequence[bool]`): Which of them are split.
        size (`int`): Ranks.

    Example:
    ```python
    >>> weights = [Parameter((8, 6), 2, True), Parameter((8,), 2, True)]
    >>> [one.shape for one in split_parameters(weights, [True, False], 4)]
    [(2, 6), (8,)]

    ```
    """
    return [
        replace(parameter, shape=(math.ceil(parameter.shape[0] / size), *parameter.shape[1:])) if parted else parameter
        for parameter, parted in zip(parameters, split, strict=True)
    ]


def split_trace(trace: ForwardTrace, size: int) -> ForwardTrace:
    """
    Return an estimate of what one of `size` ranks of tensor parallelism saves: MLP and attention outputs are split,
    the residual stream, norms and the LM head are whole on every rank.
    """
    if size == 1:
        return trace
    cut = tuple(
        round((mlp + attention) * (1 - 1 / size))
        for mlp, attention in zip(trace.layer_mlp, trace.layer_attention, strict=True)
    )
    kept = tuple(whole - less for whole, less in zip(trace.layer_kept, cut, strict=True))
    return replace(
        trace,
        layer_kept=kept,
        layer_attention=tuple(math.ceil(value / size) for value in trace.layer_attention),
        layer_mlp=tuple(math.ceil(value / size) for value in trace.layer_mlp),
        kept=None if trace.kept is None else max(trace.kept - sum(cut), 0),
    )


@dataclass(frozen=True)
class PlannedLayout:
    """
    A layout with its figures.

    Args:
        layout (`Layout`): Which.
        table (`MemoryTable`): Of one device.
        time (`StepTime`): Of one update.
    """

    layout: Layout
    table: MemoryTable
    time: StepTime


def plan_one(
    layout: Layout,
    parameters: Sequence[Parameter],
    trace: ForwardTrace,
    row_flops: StepFlops,
    machine: Machine,
    *,
    devices: int,
    exchange_width: int = 0,
    optimizer: str | None = "adamw_torch",
    tiled_loss: bool = False,
) -> PlannedLayout:
    """
    Return the figures of one layout.

    Args:
        layout, parameters, trace, devices, optimizer, tiled_loss: As in [`layout_memory`].
        row_flops (`StepFlops`): Forward FLOPs of one whole row.
        machine (`Machine`): Devices and links.
        exchange_width (`int`, *optional*, defaults to 0): Values that a layer's forward exchanges for each token under
            sequence parallelism.
    """
    table = layout_memory(parameters, trace, layout, devices=devices, optimizer=optimizer, tiled_loss=tiled_loss)
    time = layout_time(
        layout,
        layout_switches(layout, optimizer, tiled_loss),
        parameters,
        trace,
        table,
        row_flops,
        machine,
        devices=devices,
        stage=STAGES[layout.engine],
        exchange_width=exchange_width,
    )
    return PlannedLayout(layout, table, time)


def rank_key(planned: PlannedLayout) -> tuple:
    """
    Return what layouts are sorted by: the time of a step in classes of 1 %, then rules, then the time itself.

    The rules, first to last: states on the device before offload; the way to keep activations that recomputes least
    (no checkpointing before a larger micro-batch); the smaller micro-batch; sequence parallelism before tensor
    parallelism; fewer ranks per row; the engine that shares least.

    Raises:
        ValueError: a time that is not a positive number.
    """
    seconds, layout = planned.time.total, planned.layout
    if not 0 < seconds < math.inf:
        raise ValueError(f"a step of {seconds!r} s cannot be ranked: it must be a positive number.")
    return (
        math.floor(math.log(seconds) / math.log1p(TIE)),
        layout.offload,
        ACTIVATIONS.index(layout.activations),
        layout.micro_batch,
        layout.tensor_parallel_size,
        layout.sequence_parallel_size,
        list(STAGES).index(layout.engine),
        layout.shard_ranks,
        layout.reduce_each,
        seconds,
    )


def rank_layouts(planned: Sequence[PlannedLayout], budget_bytes: int | None = None) -> list[PlannedLayout]:
    """
    Return the layouts that fit, the best first.

    A larger budget never gives a worse first one: its candidates are a superset, in the same order.

    Args:
        planned (`Sequence[PlannedLayout]`): From [`plan_one`].
        budget_bytes (`int`, *optional*): Memory of a device; all fit by default.
    """
    fitting = [one for one in planned if budget_bytes is None or one.table.peak <= budget_bytes]
    return sorted(fitting, key=rank_key)


def cheapest_change(needs: Mapping[str, int], budget_bytes: int) -> str | None:
    """
    Return the first change of those given after which something fits, or `None`.

    Args:
        needs (`Mapping[str, int]`): Change -> least peak of a device after it, the cheapest change first.
        budget_bytes (`int`): Memory of a device.

    Example:
    ```python
    >>> cheapest_change({"an 8-bit optimizer": 90, "LoRA": 40, "twice the devices": 30}, 50)
    'LoRA'

    ```
    """
    return next((change for change, need in needs.items() if need <= budget_bytes), None)
