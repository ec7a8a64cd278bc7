"""Is the order in which `hf-effi plan layout` puts layouts the order that is measured?

    python -m bench.plan_layout           # about 6 minutes on two cores
    python -m bench.plan_layout --quick   # seconds: does every part run; nothing is written

Two gloo processes on CPUs train one decoder through the Trainer under six layouts: DDP with one and with four
micro-batches, DDP with checkpointing, FSDP2 with one and with four micro-batches, and sequence parallelism over both
processes. The constants of the time model are measured on the same two processes at once, and on none of the six:
FLOP/s and the fixed time of a layer from single-process steps of two other decoders, the link from collectives of two
sizes, memory from updates of AdamW on a vector, the fixed time of a sharded layer from one of the two other decoders
with and without FSDP2. Nothing overlaps on two busy cores: `overlap` is 0. The figure is Kendall's tau between
predicted and measured seconds of an update, the median over seeds of each seed's shortest update. Seconds are the CPU
seconds of the slower process, which other jobs of the machine do not stretch; beside it stands tau of wall-clock
seconds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from bench._schema import command_line, headline, write_result
from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.functional.layout_plan import Layout, plan_one
from hf_effi.functional.layout_time import Machine
from hf_effi.report.layout_files import training_arguments
from hf_effi.report.layout_model import LayoutModel
from hf_effi.report.trace_memory import TracedModel
from tests.helpers.cpu_engines import engine_arguments, run_on_cpu

RANKS, GOAL = 2, ">= 0.6"


@dataclass(frozen=True)
class Study:
    """
    How much is run.

    Args:
        width, layers, length, rows (`int`): Of the decoder and of an update.
        others (`tuple[tuple[int, int], ...]`): Width and layers of the decoders by which FLOP/s are measured.
        updates (`int`): Of each run; the first is not counted.
        seeds (`tuple[int, ...]`): Runs of each layout.
        large (`int`): Values of the larger collective.
    """

    width: int = 256
    layers: int = 4
    length: int = 64
    rows: int = 8
    others: tuple[tuple[int, int], ...] = ((64, 6), (320, 2))
    updates: int = 7
    seeds: tuple[int, ...] = (0, 1, 2)
    large: int = 4_000_000


WHOLE = Study()
QUICK = Study(width=32, layers=1, length=16, others=((32, 2), (48, 1)), updates=3, seeds=(0,), large=10_000)


def six_layouts(rows: int) -> list[Layout]:
    """Return the layouts that are compared, for `rows` rows per update on two ranks."""
    each = rows // RANKS
    return [
        Layout("ddp", 1, 1, 1, each, 1, "keep", False, False),
        Layout("ddp", 1, 1, 1, 1, each, "keep", False, False),
        Layout("ddp", 1, 1, 1, each, 1, "checkpoint", False, False),
        Layout("fsdp2", RANKS, 1, 1, each, 1, "keep", False, False),
        Layout("fsdp2", RANKS, 1, 1, 1, each, "keep", False, False),
        Layout("ddp", 1, RANKS, 1, rows, 1, "keep", False, False),
    ]


def decoder(width: int, layers: int, length: int, seed: int = 0) -> LlamaForCausalLM:
    """Make a decoder with heads of 32 values and a vocabulary of 512."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 32, 1) * 2,
        num_key_value_heads=max(width // 32, 1) * 2,
        head_dim=16,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


# --- what is measured on the machine ---------------------------------------------------------------------------------


def fastest(call: Callable[[], Any], times: int) -> float:
    """Return the least CPU seconds of a call; all ranks begin together."""
    found = []
    for _ in range(times):
        dist.barrier()
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def step_seconds(model: Any, study: Study) -> float:
    """Return the seconds of a forward and a backward pass of two rows."""
    ids = torch.randint(512, (2, study.length))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    return fastest(step, 2 + study.updates)


def measured_unit(study: Study) -> float:
    """Measure the fixed time of a sharded layer on the smallest of the other decoders. Collective, under FSDP2."""
    width, layers = study.others[0]
    plain = step_seconds(decoder(width, layers, study.length), study)
    model = decoder(width, layers, study.length)
    for layer in model.model.layers:
        fully_shard(layer)
    return max(0.0, step_seconds(fully_shard(model), study) - plain) / (layers + 1)


def measured_machine(study: Study) -> Machine:
    """Measure the other constants on both processes at once. Collective."""
    efforts = []
    for width, layers in study.others:
        model = decoder(width, layers, study.length)
        seconds = step_seconds(model, study)
        flops = 3 * 2 * TracedModel(model.config).flops(1, study.length).total
        efforts.append((flops, 3 * layers, seconds))
    per_flop, per_layer = _two_unknowns(efforts[0], efforts[1])
    small, large = torch.zeros(1), torch.zeros(study.large)
    latency = fastest(lambda: dist.all_reduce(small), 20)
    bulk = fastest(lambda: dist.all_reduce(large), 2 + study.updates)
    # An all-reduce counts as two passes of half of the bytes each.
    link = 4 * study.large / max(bulk - latency, 1e-9)
    weights = torch.nn.Parameter(torch.zeros(study.large))
    weights.grad = torch.ones(study.large)
    optimizer = torch.optim.AdamW([weights], foreach=False)
    update = fastest(optimizer.step, 2 + study.updates)
    found = torch.tensor([per_flop, per_layer, latency / 2, 1 / link, update], dtype=torch.float64)
    dist.all_reduce(found)
    per_flop, per_layer, latency, per_byte, update = (found / RANKS).tolist()
    return Machine(
        peak_flops=1 / per_flop,
        efficiency=1.0,
        devices_per_node=RANKS,
        link_bytes=1 / per_byte,
        latency_seconds=latency,
        overlap=0.0,
        memory_bytes=(2 * 8 + 3 * 4) * study.large / update,
        layer_seconds=per_layer,
    )


def _two_unknowns(first: tuple[float, int, float], second: tuple[float, int, float]) -> tuple[float, float]:
    """
    Return seconds per FLOP and per pass of a layer from two rows `(FLOPs, passes, seconds)`.

    Raises:
        ValueError: no positive seconds per FLOP come out: the sizes are too alike, or the machine too busy.
    """
    determinant = first[0] * second[1] - second[0] * first[1]
    per_flop = (first[2] * second[1] - second[2] * first[1]) / determinant if determinant else 0.0
    per_layer = (first[0] * second[2] - second[0] * first[2]) / determinant if determinant else 0.0
    if per_flop <= 0:
        raise ValueError(f"no speed follows from {first} and {second}: take sizes that differ more.")
    return per_flop, max(per_layer, 0.0)


# --- a run -----------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Notes CPU and wall-clock seconds of every update."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time(), time.perf_counter()
        self.seconds.append((now[0] - self.start[0], now[1] - self.start[1]))


def train(layout: Layout, study: Study, seed: int, folder: str) -> list[tuple[float, float]]:
    """Train under a layout, with the arguments that the planner writes for it."""
    fields = {**training_arguments(layout, autocast=False, optimizer="adamw_torch"), **engine_arguments(layout.engine)}
    args = EffiTrainingArguments(
        folder,
        max_steps=study.updates,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **fields,
    )
    rows = torch.randint(
        512, (study.rows * study.updates, study.length), generator=torch.Generator().manual_seed(seed)
    )
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    clock = Clock()
    model = decoder(study.width, study.layers, study.length, seed)
    trainer = EffiTrainer(model, args, train_dataset=data, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def _process(rank: int, engine: str, study: Study, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    run_on_cpu(engine)
    found: list[Any] = []
    layouts = [layout for layout in six_layouts(study.rows) if layout.engine == engine]
    for seed in study.seeds:
        found += [(layout.name, train(layout, study, seed, folder)) for layout in layouts]
    constants = measured_machine(study) if engine == "ddp" else measured_unit(study)
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, found)
    if rank == 0:
        Path(folder, "found.pickle").write_bytes(pickle.dumps((gathered, constants)))
    dist.barrier()
    dist.destroy_process_group()


def launch(engine: str, study: Study) -> tuple[list[list[Any]], Any]:
    """Run the layouts of one engine on two processes; return the seconds of each rank, and measured constants."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (engine, study, folder), nprocs=RANKS)
        return pickle.loads(Path(folder, "found.pickle").read_bytes())


def slower_rank(ranks: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Return the shortest update of the slower rank, in CPU and in wall-clock seconds, without the first update."""
    updates = list(zip(*(rank[1:] for rank in ranks), strict=True))
    cpu, wall = (min(max(one[clock] for one in update) for update in updates) for clock in (0, 1))
    return cpu, wall


# --- figures ---------------------------------------------------------------------------------------------------------


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """
    Return Kendall's tau-a of two orders: pairs in the same order less those in the other, over all pairs.

    Raises:
        ValueError: fewer than two values, or unequal lengths.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"tau needs two lists of one length from 2 on, got {len(first)} and {len(second)}.")
    pairs = list(itertools.combinations(range(len(first)), 2))

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    return sum(sign(first[i] - first[j]) * sign(second[i] - second[j]) for i, j in pairs) / len(pairs)


def predicted(study: Study, machine: Machine) -> dict[str, float]:
    """Return the seconds of an update that the planner says, by layout."""
    model = LayoutModel(TracedModel(decoder(study.width, study.layers, study.length).config), study.length, False)
    row = model.traced.flops(1, study.length)
    return {
        layout.name: plan_one(
            layout,
            model.parameters(layout),
            model.trace(layout),
            row,
            machine,
            devices=RANKS,
            exchange_width=model.exchange_width(layout),
        ).time.total
        for layout in six_layouts(study.rows)
    }


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline."""
    layouts = [row for row in rows if row["part"] == "layout"]

    def tau(column: str) -> float:
        return round(kendall_tau([row["predicted"] for row in layouts], [row[column] for row in layouts]), 4)

    errors = [abs(row["predicted"] - row["cpu_seconds"]) / row["cpu_seconds"] for row in layouts]
    return [
        headline("layout_kendall_tau", tau("cpu_seconds"), GOAL),
        headline("layout_kendall_tau_wall_clock", tau("wall_seconds")),
        headline("layout_median_relative_error", round(statistics.median(errors), 4)),
        headline("layout_max_relative_error", round(max(errors), 4)),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every part in seconds; nothing is written")
    quick = parser.parse_args(arguments).quick
    study = QUICK if quick else WHOLE
    (plain, machine), (sharded, unit) = launch("ddp", study), launch("fsdp2", study)
    machine = replace(machine, unit_seconds=unit)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for ranks in (plain, sharded):
        for (name, first), (_, second) in zip(*ranks, strict=True):
            seconds.setdefault(name, []).append(slower_rank([first, second]))
    said = predicted(study, machine)
    rows: list[dict[str, Any]] = [{"part": "machine", **asdict(machine)}]
    rows += [
        {
            "part": "layout",
            "layout": name,
            "predicted": round(value, 5),
            "cpu_seconds": round(statistics.median(one[0] for one in seconds[name]), 5),
            "wall_seconds": round(statistics.median(one[1] for one in seconds[name]), 5),
            "by_seed": [[round(one, 5) for one in pair] for pair in seconds[name]],
        }
        for name, value in said.items()
    ]
    found = figures(rows)
    for row in rows:
        print(row)
    for figure in found:
        print(figure)
    if not quick:
        command = command_line("bench.plan_layout")
        write_result("plan_layout", command=command, seeds=study.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
