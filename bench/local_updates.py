"""
What less traffic between two processes costs in loss, and saves in seconds: local updates, compressed gradients.

    python -m bench.local_updates           # about 10 minutes on two cores
    python -m bench.local_updates --quick   # seconds: a few updates, one seed; writes nothing into results

Two gloo processes train a decoder of two layers from scratch on the source text of Python's standard library, through
the Trainer. Each collective that carries gradients or weights sleeps first, as over a link of 20 ms and 100 Mbit/s;
what it is given is counted. Nothing overlaps. Seconds are the CPU seconds of the process and those that it slept,
without evaluations: other jobs of the machine do not count. The learning rate of DDP and of each number of local
updates is tuned over the same values on a seed of its own; compressed gradients take DDP's.

QSDP and L-GreCo are prototypes (`bench/prototypes/traffic.py`). The criterion, set before the first run: either is
kept if, on the mean over seeds, it needs at most 0.9 of the seconds of torch's best hook to the end of its updates,
with a held-out loss of at most 0.01 over DDP's; L-GreCo also has to send at most 0.9 of the bytes of even bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from bench._schema import RESULTS, command_line, headline, write_result
from bench._traffic_hooks import EvenBits, Exact, Hook, LevelledBits, QuantisedWeights
from bench.schedules import LENGTH, Data, build
from hf_effi.functional.local_updates import LocalUpdates
from hf_effi.functional.referee import time_to_target
from hf_effi.recipes import register_gradient_compression
from hf_effi.trainers.mixins import LocalUpdatesMixin

SEEDS, TUNING_SEED, RATES = (0, 1, 2), 100, (2e-3, 4e-3)
DDP, FP16, LOW_RANK = "ddp", "fp16", "powersgd"
TORCH = (FP16, LOW_RANK)


@dataclasses.dataclass(frozen=True)
class Study:
    """What a run of the bench does; the defaults are the full one."""

    updates: int = 300
    rows: int = 8
    locals_: tuple[int, ...] = (10, 50)
    eval_steps: int = 50
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = RATES
    latency: float = 0.02
    bytes_per_second: float = 100e6 / 8
    start_steps: int = 20

    @property
    def arms(self) -> tuple[str, ...]:
        return (DDP, *(f"local {every}" for every in self.locals_), *TORCH, *HOOKS)


#: arm -> the prototype that it sends gradients by
HOOKS: dict[str, Any] = {
    "qsdp w8g8": lambda: EvenBits(8),
    "qsdp g4": lambda: EvenBits(4),
    "l-greco": lambda: LevelledBits(like=4, every=50),
}


class Link:
    """A link between the processes: it sleeps, and counts, before each collective that carries training."""

    def __init__(self, latency: float, bytes_per_second: float) -> None:
        self.latency, self.bytes_per_second = latency, bytes_per_second
        self.calls, self.nbytes, self.slept = 0, 0, 0.0

    def carry(self, tensor: torch.Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        pause = self.latency + nbytes / self.bytes_per_second if self.latency else 0.0
        self.calls, self.nbytes, self.slept = self.calls + 1, self.nbytes + nbytes, self.slept + pause
        time.sleep(pause)


class Measured(Trainer):
    """Counts its seconds without evaluations, and takes the held-out loss by one forward."""

    data: Data
    link: Link
    curve: list[tuple[int, float, float]]
    seconds: float
    mark: float
    weights: QuantisedWeights | None = None

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.weights is None:
            return super().training_step(model, *args, **kwargs)
        self.link.carry(self.weights.quantise(model))
        loss = super().training_step(model, *args, **kwargs)
        self.weights.restore(model)
        return loss

    def start(self) -> None:
        self.curve, self.seconds, self.mark = [], 0.0, time.process_time()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.seconds += time.process_time() - self.mark
        self.model.eval()
        loss = self.data.loss(self.model)
        self.model.train()
        self.curve.append((self.state.global_step, self.seconds + self.link.slept, loss))
        self.mark = time.process_time()
        return {"eval_loss": loss}


class Local(LocalUpdatesMixin, Measured):
    """The same with local updates."""


def rows_of(data: Data, seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    crops = data._crops(data.train, count, torch.Generator().manual_seed(seed * 1_000_003))
    return [{"input_ids": row, "labels": row} for row in crops]


def run(study: Study, data: Data, arm: str, rate: float, seed: int, folder: str, link: Link) -> dict[str, Any]:
    """Train one arm on this process."""
    every = int(arm.split()[1]) if arm.startswith("local") else 0
    args = TrainingArguments(
        folder, max_steps=study.updates, per_device_train_batch_size=study.rows, learning_rate=rate, seed=seed,
        lr_scheduler_type="cosine", warmup_steps=study.updates // 20, weight_decay=0.1, adam_beta2=0.95,
        train_sampling_strategy="sequential", average_tokens_across_devices=False, ddp_find_unused_parameters=False,
        eval_strategy="steps", eval_steps=study.eval_steps, save_strategy="no", logging_strategy="no",
        report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    rows = rows_of(data, seed, 2 * study.rows * study.updates)
    local = LocalUpdates(every) if every else None
    model = build(seed)
    trainer = Local(model, args, train_dataset=rows, eval_dataset=rows[:1], local_updates=local)
    trainer.remove_callback(PrinterCallback)
    trainer.data, trainer.link = data, link
    if arm in TORCH:
        options = {"rank": 4, "start_steps": study.start_steps} if arm == LOW_RANK else {}
        register_gradient_compression(trainer, arm, **options)  # type: ignore[arg-type]
    elif not every:
        hook: Hook = HOOKS[arm]() if arm in HOOKS else Exact()
        hook.carry = link.carry
        trainer.add_callback(hook.registered_on(trainer))
        trainer.weights = QuantisedWeights(8, 1024, seed) if arm == "qsdp w8g8" else None
    trainer.start()
    trainer.train()
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "arm": arm, "seed": seed, "learning_rate": rate, "updates": study.updates, "parameters": parameters,
        "bytes": link.nbytes, "collectives": link.calls, "seconds": trainer.curve[-1][1],
        "held_out_loss": trainer.curve[-1][2], "tokens": 2 * study.rows * study.updates * LENGTH,
        "curve": [[step, round(seconds, 3), round(loss, 5)] for step, seconds, loss in trainer.curve],
    }  # fmt: skip


def measure(study: Study, folder: str) -> list[dict[str, Any]]:
    """Run every arm on this process of the two, and return its rows."""
    torch.set_num_threads(1)
    data, original = Data(), dist.all_reduce
    link = Link(0.0, 1.0)

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        link.carry(tensor)
        return original(tensor, *args, **kwargs)

    def one(arm: str, rate: float, seed: int, latency: float) -> dict[str, Any]:
        link.__init__(latency, study.bytes_per_second)  # type: ignore[misc]
        row = run(study, data, arm, rate, seed, folder, link)
        if os.environ.get("RANK") == "0":
            print({key: value for key, value in row.items() if key != "curve"}, flush=True)
        return row

    dist.all_reduce = all_reduce
    try:
        tuned: dict[str, float] = {}
        for arm in (DDP, *(f"local {every}" for every in study.locals_)):
            trials = {rate: one(arm, rate, TUNING_SEED, 0.0)["held_out_loss"] for rate in study.rates}
            tuned[arm] = min(trials, key=lambda rate: trials[rate])
        return [
            one(arm, tuned.get(arm, tuned[DDP]), seed, study.latency) for seed in study.seeds for arm in study.arms
        ]
    finally:
        dist.all_reduce = original


def seconds_to(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Return the seconds at the first evaluation that is at or below a loss."""
    return time_to_target([(seconds, found) for _, seconds, found in curve], loss, "lower")


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: means over seeds of ratios and differences to DDP of the same seed."""
    by = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    mean: dict[str, dict[str, float]] = {}
    for arm in arms:
        pairs = [(by[arm, seed], by[DDP, seed]) for seed in seeds]
        mean[arm] = {
            name: statistics.mean(found)
            for name, found in {
                "bytes": [own["bytes"] / ddp["bytes"] for own, ddp in pairs],
                "seconds": [own["seconds"] / ddp["seconds"] for own, ddp in pairs],
                "gap": [own["held_out_loss"] - ddp["held_out_loss"] for own, ddp in pairs],
                "relative": [own["held_out_loss"] / ddp["held_out_loss"] - 1 for own, ddp in pairs],
            }.items()
        }
    found = []
    for arm in arms[1:]:
        key, every = arm.replace(" ", "_").replace("-", ""), arm.startswith("local")
        goal = f"<= {1.01 / int(arm.split()[1]):.4g}" if every else None
        found.append(headline(f"{key}_bytes_over_ddp", round(mean[arm]["bytes"], 5), goal))
        found.append(headline(f"{key}_relative_loss_gap", round(mean[arm]["relative"], 5), "<= 0.02"))
        found.append(headline(f"{key}_seconds_over_ddp", round(mean[arm]["seconds"], 4), "<= 1" if every else None))
    for every in [arm for arm in arms if arm.startswith("local")]:
        key = every.replace(" ", "_")
        reached = []
        for seed in seeds:
            ddp = by[DDP, seed]
            own = seconds_to(by[every, seed]["curve"], 1.02 * ddp["held_out_loss"])
            base = seconds_to(ddp["curve"], 1.02 * ddp["held_out_loss"])
            reached.append(None if own is None or base is None else own / base)
        whole = [ratio for ratio in reached if ratio is not None]
        ratio = round(statistics.mean(whole), 4) if len(whole) == len(seeds) else None
        found.append(headline(f"{key}_seconds_ratio_to_ddp_loss_plus_2_percent", ratio, "<= 1"))
    best = min(mean[arm]["seconds"] for arm in TORCH)
    for arm in HOOKS:
        key = arm.replace(" ", "_").replace("-", "")
        found.append(headline(f"{key}_loss_minus_ddp", round(mean[arm]["gap"], 5), "<= 0.01"))
        found.append(headline(f"{key}_seconds_over_best_torch_hook", round(mean[arm]["seconds"] / best, 4), "<= 0.9"))
    even = mean["l-greco"]["bytes"] / mean["qsdp g4"]["bytes"]
    found.append(headline("lgreco_bytes_over_even_bits", round(even, 4), "<= 0.9"))
    ddp_losses = [by[DDP, seed]["held_out_loss"] for seed in seeds]
    found.append(headline("ddp_seed_sd", round(statistics.stdev(ddp_losses), 5) if len(seeds) > 1 else None))
    return found


def _process(rank: int, port: int, study: Study, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    rows = measure(study, f"{folder}/run")
    if rank == 0:
        Path(folder, "rows.pickle").write_bytes(pickle.dumps(rows))


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few updates, one seed; writes nothing into results")
    args = parser.parse_args(arguments)
    study = QUICK if args.quick else Study()
    with socket.socket() as probe, tempfile.TemporaryDirectory() as scratch:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(_process, (port, study, scratch), nprocs=2)
        rows = pickle.loads(Path(scratch, "rows.pickle").read_bytes())
    if args.quick and folder == RESULTS:
        folder = Path(tempfile.mkdtemp(prefix="hf_effi_local_quick_"))
    command = command_line("bench.local_updates")
    path = write_result(
        "local_updates", command=command, seeds=study.seeds, headline=figures(rows), rows=rows, folder=folder
    )
    print(path)
    return path


#: of the test of this bench
QUICK = Study(updates=6, rows=2, locals_=(2, 3), eval_steps=6, seeds=(0,), rates=(1e-3,), latency=1e-3, start_steps=2)


if __name__ == "__main__":
    main()
