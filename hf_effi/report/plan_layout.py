"""`hf-effi plan layout`: how to spread a training over devices, ranked, before one of them is rented."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..functional.layout_plan import (
    STAGES,
    Layout,
    PlannedLayout,
    Space,
    cheapest_change,
    enumerate_layouts,
    plan_one,
    rank_layouts,
    why_not,
)
from ..functional.layout_time import Machine
from ..functional.options import refuse_idle
from .plan_memory import ESTIMATED, NOT_COUNTED, _counted_optimizer

#: name on the command line -> dtype of the weights, whether autocast is on
PRECISIONS = {"bf16-mixed": ("float32", True), "bf16": ("bfloat16", False), "fp32": ("float32", False)}
#: how far off a time of this model may be
UNCERTAINTY = 0.2
#: option -> field of `Machine`, factor from the option's unit, what it is
CONSTANTS: dict[str, tuple[str, float, str]] = {
    "peak_tflops": ("peak_flops", 1e12, "TFLOP/s of a device in the run's precision"),
    "efficiency": ("efficiency", 1.0, "share of the peak that matrix products reach"),
    "link_gbs": ("link_bytes", 1e9, "GB/s of a device inside a node, one way"),
    "node_link_gbs": ("node_link_bytes", 1e9, "GB/s of a device between nodes"),
    "latency_us": ("latency_seconds", 1e-6, "microseconds of a collective"),
    "overlap": ("overlap", 1.0, "share of the computing beside which communication hides"),
    "memory_gbs": ("memory_bytes", 1e9, "GB/s of a device's memory"),
    "host_link_gbs": ("host_link_bytes", 1e9, "GB/s between a device and its host"),
    "host_memory_gbs": ("host_memory_bytes", 1e9, "GB/s of host memory for one rank"),
    "layer_us": ("layer_seconds", 1e-6, "fixed microseconds of one pass of a layer"),
    "unit_us": ("unit_seconds", 1e-6, "fixed microseconds of sharding one layer in a micro-batch"),
}


@dataclass(frozen=True)
class LayoutPlan:
    """
    What [`plan_layout`] returns.

    Args:
        ranked (`tuple[PlannedLayout, ...]`): What fits, the best first.
        considered (`int`): Layouts that can run at all.
        out (`tuple[str, ...]`): Why others are out, one sentence each.
        change (`str` or `None`): Where nothing fits, the cheapest change that helps.
        warnings (`tuple[str, ...]`): Sizes to mend.
        devices, seq_len, global_batch (`int`): What was planned for.
        budget_bytes (`int` or `None`): Memory of a device, headroom taken off.
        machine (`Machine`): The constants.
        files (`dict` or `None`): Of the best layout: `accelerate`, `training_arguments`, `beside`.
        not_modelled (`tuple[str, ...]`): What the figures leave out.
    """

    ranked: tuple[PlannedLayout, ...]
    considered: int
    out: tuple[str, ...]
    change: str | None
    warnings: tuple[str, ...]
    devices: int
    seq_len: int
    global_batch: int
    budget_bytes: int | None
    machine: Machine
    files: dict[str, Any] | None
    not_modelled: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "devices": self.devices,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "budget_bytes": self.budget_bytes,
            "considered": self.considered,
            "uncertainty": UNCERTAINTY,
            "constants": dataclasses.asdict(self.machine),
            "out": list(self.out),
            "change": self.change,
            "warnings": list(self.warnings),
            "not_modelled": list(self.not_modelled),
            "best": self.files,
            "ranked": [self._row(one) for one in self.ranked],
        }

    def _row(self, one: PlannedLayout) -> dict[str, Any]:
        return {
            "name": one.layout.name,
            **dataclasses.asdict(one.layout),
            "seconds": one.time.total,
            "times": dataclasses.asdict(one.time),
            "tokens_per_second": self.tokens_per_second(one),
            "model_flops_utilization": self.utilization(one),
            "memory": one.table.as_dict(),
        }

    def tokens_per_second(self, one: PlannedLayout) -> float:
        """Return the tokens per second of all devices."""
        return self.global_batch * self.seq_len / one.time.total

    def utilization(self, one: PlannedLayout) -> float:
        """Return the model FLOPs utilization."""
        return one.time.model_flops / one.time.total / self.machine.peak_flops


@dataclass(frozen=True)
class _Request:
    """What is planned; a change of it is another request."""

    config: Any
    devices: int
    seq_len: int
    global_batch: int
    precision: str
    attention: str | None
    padded: bool
    optimizer: str
    tiled_loss: bool
    lora_rank: int | None
    engines: tuple[str, ...]
    max_micro_batch: int
    offload: bool

    def model(self) -> Any:
        """Trace the model."""
        from .layout_model import LayoutModel
        from .trace_memory import TracedModel

        dtype, autocast = PRECISIONS[self.precision]
        options = {"autocast": autocast, "attention": self.attention, "lora_rank": self.lora_rank}
        return LayoutModel(TracedModel(self.config, dtype=dtype, **options), self.seq_len, self.padded)


def plan_layout(
    config: Any,
    *,
    devices: int,
    seq_len: int,
    global_batch: int,
    gpu_gib: float | None = None,
    headroom: float = 0.1,
    precision: str = "bf16-mixed",
    attention: str | None = None,
    padded: bool = False,
    optimizer: str = "adamw_torch",
    tiled_loss: bool = False,
    lora_rank: int | None = None,
    engines: Sequence[str] = tuple(STAGES),
    max_micro_batch: int = 16,
    offload: bool = True,
    machine: Machine | None = None,
) -> LayoutPlan:
    """
    Rank the layouts that a Trainer can run, from a model's config. Nothing runs on a device.

    Args:
        config (`PreTrainedConfig` or `str`): The model: a config, a folder, a `config.json`, a name on the Hub.
        devices (`int`): Devices in all.
        seq_len (`int`): Tokens of a row.
        global_batch (`int`): Rows per update.
        gpu_gib (`float`, *optional*): Memory of a device in GiB; without it everything fits.
        headroom (`float`, *optional*, defaults to `0.1`): Fraction of it left for what is not counted.
        precision (`str`, *optional*, defaults to `"bf16-mixed"`): A key of `PRECISIONS`.
        attention (`str`, *optional*), padded (`bool`, *optional*, defaults to `False`): As in [`plan_memory`].
        optimizer (`str`, *optional*, defaults to `"adamw_torch"`): A name of `optim=`, also of this package.
        tiled_loss (`bool`, *optional*, defaults to `False`): Count on the tiled loss, which TRL's trainers have.
        lora_rank (`int`, *optional*): Train LoRA matrices of this rank only.
        engines (`Sequence[str]`, *optional*): Which of `STAGES` to look at; all by default.
        max_micro_batch (`int`, *optional*, defaults to 16): Largest micro-batch.
        offload (`bool`, *optional*, defaults to `True`): Whether states may go to the host.
        machine (`Machine`, *optional*): Devices and links.

    Raises:
        ValueError: a value out of range, or a model that cannot be traced.

    Example:
    ```python
    plan = plan_layout("path/to/model", devices=8, gpu_gib=80, seq_len=8192, global_batch=64)
    print(plan.ranked[0].layout.name, plan.ranked[0].time.total)
    ```
    """
    from .model_shapes import load_config

    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known. Known: {', '.join(PRECISIONS)}.")
    if gpu_gib is not None and not 0 < gpu_gib < math.inf:
        raise ValueError(f"gpu_gib={gpu_gib!r} must be a number above 0.")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom!r} must lie in [0, 1).")
    refuse_idle("headroom", headroom, 0.1, gpu_gib is not None, "with gpu_gib=, the memory that it is a part of")
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
        raise ValueError(f"seq_len={seq_len!r} must be an integer of at least 1.")
    Space(devices, global_batch, engines=tuple(engines), max_micro_batch=max_micro_batch)
    machine = machine or Machine()
    if devices > machine.devices_per_node and devices % machine.devices_per_node:
        raise ValueError(
            f"devices={devices} are no whole nodes of devices_per_node={machine.devices_per_node}. Give a multiple."
        )
    _counted_optimizer_or_raise(optimizer)
    request = _Request(
        config=load_config(config) if isinstance(config, str) else config,
        devices=devices,
        seq_len=seq_len,
        global_batch=global_batch,
        precision=precision,
        attention=attention,
        padded=padded,
        optimizer=optimizer,
        tiled_loss=tiled_loss,
        lora_rank=lora_rank,
        engines=tuple(engines),
        max_micro_batch=max_micro_batch,
        offload=offload,
    )
    return _plan(request, machine, None if gpu_gib is None else int(gpu_gib * (1 - headroom) * 2**30))


def _counted_optimizer_or_raise(optimizer: str) -> None:
    from ..functional.memory import OPTIMIZERS

    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not counted. Counted: {', '.join(OPTIMIZERS)}.")


def _space(request: _Request, model: Any) -> tuple[Space, list[str]]:
    """Return what can be chosen, and why not more."""
    from .layout_model import engines_of

    sequence, no_sequence = model.sequence_sizes(request.devices)
    tensor, no_tensor = model.tensor_sizes(request.devices)
    allowed, no_engine = engines_of(request.optimizer)
    space = Space(
        request.devices,
        request.global_batch,
        sequence_sizes=sequence,
        tensor_sizes=tensor,
        engines=tuple(name for name in request.engines if name in allowed),
        activations=model.activations(),
        max_micro_batch=request.max_micro_batch,
        offload=request.offload,
    )
    told = [
        f"sequence parallelism: {no_sequence}" if no_sequence else None,
        f"tensor parallelism: {no_tensor}" if no_tensor and "tp" in request.engines else None,
        f"other engines: {no_engine}" if no_engine and len(space.engines) < len(request.engines) else None,
    ]
    return space, [sentence for sentence in told if sentence]


def _figures(request: _Request, model: Any, machine: Machine) -> tuple[list[PlannedLayout], list[str]]:
    space, told = _space(request, model)
    if not space.engines:
        raise ValueError(f"no engine is left of {', '.join(request.engines)}: {'; '.join(told)}.")
    row = model.traced.flops(1, request.seq_len)
    found = [
        plan_one(
            layout,
            model.parameters(layout),  # `_space` has traced one row, so that it is known what is trained
            model.trace(layout),
            row,
            machine,
            devices=request.devices,
            exchange_width=model.exchange_width(layout),
            optimizer=_counted_optimizer(request.optimizer),
            tiled_loss=request.tiled_loss,
        )
        for layout in enumerate_layouts(space)
    ]
    return found, [*told, *_structural(space)]


def _structural(space: Space) -> list[str]:
    """Return why some engines do not go with some ways to split rows and matrices."""
    found: dict[str, list[str]] = {}
    for engine in space.engines:
        for sequence, tensor in [(size, 1) for size in space.sequence_sizes] + [(1, s) for s in space.tensor_sizes]:
            if (engine == "tp") != (tensor > 1):
                continue
            shard = space.devices if STAGES[engine] else 1
            if engine == "hybrid":
                shard = next((n for n in range(2, space.devices) if space.devices % n == 0), 1)
            probe = Layout(engine, shard, sequence, tensor, 1, 0, "keep", False, False)
            reason = why_not(probe, space)
            if reason and not reason.startswith("groups x"):
                found.setdefault(reason, []).append(engine)
    return [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in found.items()]


def _plan(request: _Request, machine: Machine, budget: int | None) -> LayoutPlan:
    from .layout_files import launch_file, lines_beside, training_arguments
    from .plan_memory import _left_out

    model = request.model()
    figures, out = _figures(request, model, machine)
    if not figures:
        raise ValueError(
            f"global_batch={request.global_batch} cannot be dealt to {request.devices} devices: no engine has a "
            f"number of groups that divides it. Give a multiple of {request.devices}."
        )
    ranked = rank_layouts(figures, budget)
    out += _too_large(figures, budget)
    autocast = PRECISIONS[request.precision][1]
    files = None
    if ranked:
        best = ranked[0].layout
        files = {
            "accelerate": launch_file(
                best, devices=request.devices, devices_per_node=machine.devices_per_node, autocast=autocast
            ),
            "training_arguments": training_arguments(best, autocast=autocast, optimizer=request.optimizer),
            "beside": lines_beside(best, request.tiled_loss),
        }
    return LayoutPlan(
        tuple(ranked),
        len(figures),
        tuple(out),
        None if ranked or budget is None else _change(request, model, machine, budget),
        tuple(model.warnings()),
        request.devices,
        request.seq_len,
        request.global_batch,
        budget,
        machine,
        files,
        tuple(_left_out(model.traced, model._traced(1, request.seq_len))),
    )


def _too_large(figures: Sequence[PlannedLayout], budget: int | None) -> list[str]:
    """Say for each engine what the layouts that do not fit need at least."""
    found = []
    for engine in STAGES:
        peaks = [one.table.peak for one in figures if one.layout.engine == engine]
        large = [peak for peak in peaks if budget is not None and peak > budget]
        if large:
            found.append(
                f"{engine}: {len(large)} of {len(peaks)} layouts do not fit; they need {min(large) / 2**30:.1f} to "
                f"{max(large) / 2**30:.1f} GiB"
            )
    return found


def _change(request: _Request, model: Any, machine: Machine, budget: int) -> str:
    """Return one sentence: the cheapest change after which a layout fits. The smallest micro-batch needs least."""
    request = dataclasses.replace(request, max_micro_batch=1)
    least = {"": min(one.table.peak for one in _figures(request, model, machine)[0])}
    for words, other, same in _changes(request):
        if words not in least:
            figures = _figures(other, model if same else other.model(), machine)[0]
            least[words] = min((one.table.peak for one in figures), default=sys.maxsize)
            if least[words] <= budget:
                break
    found = cheapest_change(least, budget)
    if found:
        return f"Nothing fits; the cheapest change that helps is {found}."
    return (
        f"Nothing fits, and no single change of loss, optimizer, precision, adapters or devices helps: a device needs "
        f"{least[''] / 2**30:.1f} GiB at least, of which {budget / 2**30:.1f} GiB are there."
    )


def _changes(request: _Request) -> list[tuple[str, _Request, bool]]:
    """Return the changes, the cheapest first, and whether the traced model stays: no cost, numerics, what trains."""
    change = dataclasses.replace
    found: list[tuple[str, _Request, bool]] = []
    if not request.tiled_loss:
        found.append(("the tiled loss (--tiled-loss)", change(request, tiled_loss=True), True))
    if not request.offload:
        found.append(("states in host memory (without --no-offload)", change(request, offload=True), True))
    if set(request.engines) != set(STAGES):
        found.append(("all engines (without --engines)", change(request, engines=tuple(STAGES)), True))
    if request.optimizer not in ("adamw_8bit", "apollo_mini"):
        found.append(("an 8-bit optimizer (--optimizer adamw_8bit)", change(request, optimizer="adamw_8bit"), True))
    if request.precision != "bf16":
        found.append(("bf16 weights (--precision bf16)", change(request, precision="bf16"), False))
    if request.lora_rank is None:
        found.append(("LoRA (--lora-rank 16)", change(request, lora_rank=16), False))
    for times in (2, 4, 8):
        devices = request.devices * times
        rows = math.lcm(request.global_batch, devices)
        more = change(request, devices=devices, global_batch=rows)
        found.append((f"{devices} devices (--gpus {devices})", more, True))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi plan layout` to `parser`."""
    parser.add_argument("config", metavar="CONFIG", help="config.json, a folder with one, or a model on the Hub")
    parser.add_argument("--gpus", type=int, required=True, help="devices in all")
    parser.add_argument("--gpu-gib", type=float, help="memory of a device; exit code 1 where nothing fits")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens of a row")
    parser.add_argument("--global-batch", type=int, required=True, help="rows per update")
    parser.add_argument("--headroom", type=float, default=0.1, help="fraction for what is not counted (default 0.1)")
    parser.add_argument(
        "--precision", default="bf16-mixed", help=f"{', '.join(PRECISIONS)} (default bf16-mixed: fp32 weights)"
    )
    parser.add_argument("--attention", help="sdpa, eager, flash_attention_2 ... (default: what transformers takes)")
    parser.add_argument("--padded", action="store_true", help="rows are padded or packed, so that SDPA keeps masks")
    parser.add_argument("--optimizer", default="adamw_torch", help="a name of optim= (default adamw_torch)")
    parser.add_argument("--tiled-loss", action="store_true", help="count on the tiled loss, as in TRL's trainers")
    parser.add_argument("--lora-rank", type=int, help="train LoRA matrices of this rank only")
    parser.add_argument("--engines", help=f"comma-separated, of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--max-micro-batch", type=int, default=16, help="largest micro-batch (default 16)")
    parser.add_argument("--no-offload", action="store_true", help="leave out states in host memory")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="devices with the fast link (default 8)")
    parser.add_argument("--top", type=int, default=5, help="layouts to print (default 5)")
    for option, (field, unit, words) in CONSTANTS.items():
        default = getattr(Machine(), field) / unit
        parser.add_argument(
            f"--{option.replace('_', '-')}", type=float, default=default, help=f"{words} (default {default:g})"
        )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    """Print the ranking; return the exit status: 1 where nothing fits, 2 for a bad value."""
    try:
        if args.top < 1:
            raise ValueError(f"--top {args.top} must be at least 1.")
        constants = {field: getattr(args, option) * unit for option, (field, unit, _) in CONSTANTS.items()}
        plan = plan_layout(
            args.config,
            devices=args.gpus,
            seq_len=args.seq_len,
            global_batch=args.global_batch,
            gpu_gib=args.gpu_gib,
            headroom=args.headroom,
            precision=args.precision,
            attention=args.attention,
            padded=args.padded,
            optimizer=args.optimizer,
            tiled_loss=args.tiled_loss,
            lora_rank=args.lora_rank,
            engines=tuple(args.engines.split(",")) if args.engines else tuple(STAGES),
            max_micro_batch=args.max_micro_batch,
            offload=not args.no_offload,
            machine=Machine(devices_per_node=args.gpus_per_node, **constants),
        )
    except ValueError as error:
        print(f"hf-effi plan layout: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan.as_dict(), indent=2) if args.json else format_layouts(plan, args.top))
    return 0 if plan.ranked else 1


def format_layouts(plan: LayoutPlan, top: int = 5) -> str:
    """Return the ranking as text: the best, the constants, why others are out, and what to write for the first."""
    lines = [f"{'':<62}{'GiB':>7}{'s/update':>10}{'+-20 %':>16}{'tokens/s':>11}{'MFU':>6}{'waits':>7}"]
    for number, one in enumerate(plan.ranked[:top], 1):
        seconds = one.time.total
        span = f"{seconds * (1 - UNCERTAINTY):.4g}-{seconds * (1 + UNCERTAINTY):.4g}"
        waits = (one.time.exposed + one.time.transfer) / seconds
        lines.append(
            f"{number:>2}. {one.layout.name:<58}{one.table.peak / 2**30:>7.1f}{seconds:>10.4g}{span:>16}"
            f"{plan.tokens_per_second(one):>11,.0f}{plan.utilization(one):>6.0%}{waits:>7.0%}"
        )
    if plan.ranked:
        limit = plan.ranked[0].time.total * (1 + UNCERTAINTY)
        near = sum(one.time.total <= limit for one in plan.ranked)
        lines.append(
            f"{len(plan.ranked)} of {plan.considered} layouts fit; {near} lie within 20 % of the first, which this "
            "model cannot tell apart: measure those."
        )
    if plan.change:
        lines.append(plan.change)
    lines += [f"Warning: {sentence}." for sentence in plan.warnings]
    constants = ", ".join(
        f"{option.replace('_', '-')} {getattr(plan.machine, field) / unit:g}"
        for option, (field, unit, _) in CONSTANTS.items()
    )
    lines.append(f"Constants (options; the defaults are not measured here): {constants}.")
    lines += [f"Out: {sentence}." for sentence in plan.out]
    if plan.files:
        lines += _written(plan.files)
    lines.append(f"Estimated: {ESTIMATED}. Not counted: {NOT_COUNTED}.")
    return "\n".join([*lines, *(f"Not modelled: {sentence}." for sentence in plan.not_modelled)])


def _written(files: dict[str, Any]) -> list[str]:
    import yaml

    arguments = ", ".join(f"{name}={value!r}" for name, value in files["training_arguments"].items())
    beside = [f"Beside it: {line}." for line in files["beside"]]
    text = yaml.safe_dump(files["accelerate"], sort_keys=True).rstrip()
    return [f"Training arguments of the first: {arguments}.", *beside, "Launch file of the first:", text]
