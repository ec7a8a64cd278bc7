"""How long a resumed Trainer needs to find its place in a dataset of a million rows, in the middle of epoch 2.

`python -m bench.curricula` writes `bench/results/curricula.json`. The figure is the time that data costs at a resume:
loading the sampler's state, computing the order of the epoch, discarding the finished batches, fetching the next one.
The same interval of a stock Trainer with its random sampler stands beside it; runs alternate.

`--part study` asks whether ascending quality gains more where the learning rate does not decay to zero, on the sources
of the standard library (`bench/_curriculum_study.py`). `--part length` compares GrowLength with a fixed length at
equal tokens and at equal CPU time (`bench/_growlength_study.py`). Finished arms are kept: a study that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench import _curriculum_study, _growlength_study
from bench._progress import with_line
from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi.samplers import ShuffledSampler
from hf_effi.trainers.mixins.sampler import SAMPLER_FILE, SamplerMixin

BATCH = 8


class Rows(Dataset):
    """So many rows that cost nothing to read, so that only the sampler is timed."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([float(index % 7)]), "labels": torch.tensor([0.0])}


class Line(torch.nn.Module):
    """The smallest model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.layer(x) - labels) ** 2).mean()}


class Stopwatch(TrainerCallback):
    """Times from the start of training to the first step, which is what skipping costs; stops after that step."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self.seconds or time.perf_counter() - self.began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


class Timed(SamplerMixin, Trainer):
    """Adds the time of loading the sampler's state."""

    load_seconds = 0.0

    def _load_sampler(self, checkpoint: str) -> None:
        began = time.perf_counter()
        super()._load_sampler(checkpoint)
        self.load_seconds = time.perf_counter() - began


def trainer_for(arm: str, rows: int, seed: int, folder: Path) -> tuple[Any, Stopwatch]:
    """Return an untrained trainer of this arm, `"ours"` or `"stock"`, and its stopwatch."""
    torch.manual_seed(seed)
    watch = Stopwatch()
    args = TrainingArguments(
        str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    extra = {"train_sampler": ShuffledSampler(rows, seed)} if arm == "ours" else {}
    cls = Timed if arm == "ours" else Trainer
    trainer = cls(model=Line(), args=args, train_dataset=Rows(rows), callbacks=[watch], **extra)
    return with_line(trainer, f"{arm}, {rows:,} rows, seed {seed}", live=False), watch


def make_checkpoint(arm: str, rows: int, seed: int, folder: Path) -> Path:
    """Return a checkpoint whose counters say that epoch 2 is half done. Only its counters matter for the time."""
    trainer, _ = trainer_for(arm, rows, seed, folder)
    trainer.args.save_strategy = "steps"
    trainer.args.max_steps = 1
    trainer.args.save_steps = 1
    trainer.train()
    checkpoint = folder / "checkpoint-1"
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["global_step"] = rows // BATCH + rows // BATCH // 2
    path.write_text(json.dumps(state))
    if arm == "ours":
        stored = torch.load(checkpoint / SAMPLER_FILE, weights_only=True)
        stored["epoch"] = 1
        torch.save(stored, checkpoint / SAMPLER_FILE)
    return checkpoint


def resume_seconds(arm: str, rows: int, seed: int) -> float:
    """Return the seconds that data costs at one resume."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(arm, rows, seed, Path(folder))
        trainer, watch = trainer_for(arm, rows, seed, Path(folder))
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return watch.seconds + getattr(trainer, "load_seconds", 0.0)


def finished(part: str) -> list[dict[str, Any]]:
    """Return the rows of a part that an earlier call has written."""
    path = RESULTS / "curricula.json"
    return [row for row in json.loads(path.read_text())["rows"] if row["part"] == part] if path.exists() else []


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headlines that these rows allow."""
    resumes = [row for row in rows if row["part"] == "resume"]
    found = []
    if resumes:
        ours, stock = (
            statistics.median(row["seconds"] for row in resumes if row["arm"] == arm) for arm in ("ours", "stock")
        )
        found += [headline("resume_seconds_1m_rows", ours, "< 1"), headline("resume_seconds_1m_rows_stock", stock)]
    losses = {(r["schedule"], r["order"], r["seed"]): r["heldout_target_loss"] for r in rows if r["part"] == "study"}
    for schedule in sorted({key[0] for key in losses}):
        gains = [
            losses[schedule, "shuffled", seed] - loss
            for (name, order, seed), loss in losses.items()
            if name == schedule and order == "ascending" and (schedule, "shuffled", seed) in losses
        ]
        if gains:
            found.append(headline(f"ascending_gain_nats_{schedule}", round(statistics.fmean(gains), 5)))
    return found + length_figures([row for row in rows if row["part"] == "length"])


def length_figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what GrowLength saves in CPU time at equal tokens, and what it gains in loss at equal tokens and time."""
    arms = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    if not seeds:
        return []

    def mean(value: Callable[[dict[str, Any], dict[str, Any]], float], arm: str) -> float:
        return round(statistics.fmean(value(arms["fixed", seed], arms[arm, seed]) for seed in seeds), 4)

    def gain(fixed: dict[str, Any], grown: dict[str, Any]) -> float:
        return fixed["heldout_loss"] - grown["heldout_loss"]

    saving = mean(lambda fixed, grown: grown["cpu_seconds"] / fixed["cpu_seconds"], "growing_equal_tokens")
    return [
        headline("growlength_cpu_time_ratio_equal_tokens", saving),
        headline("growlength_gain_nats_equal_tokens", mean(gain, "growing_equal_tokens")),
        headline("growlength_gain_nats_equal_time", mean(gain, "growing_equal_time")),
    ]


def write(rows: list[dict[str, Any]], seeds: list[int]) -> None:
    """Write what is there so far."""
    rows = sorted(rows, key=lambda row: row["part"])
    command = command_line("bench.curricula")
    write_result("curricula", command=command, seeds=seeds, headline=figures(rows), rows=rows)


def measure_resume(seeds: list[int], size: int) -> list[dict[str, Any]]:
    """Return the rows of the resume part; arms alternate."""
    rows = []
    for seed in seeds:
        for arm in ("ours", "stock"):
            seconds = resume_seconds(arm, size, seed)
            rows.append({"part": "resume", "arm": arm, "seed": seed, "rows": size, "seconds": round(seconds, 4)})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("resume", "study", "length", "all"), default="all")
    parser.add_argument("--rows", type=int, default=1_000_000, help="resume: rows; the headline needs the default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fresh", action="store_true", help="study, length: forget the finished arms")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = {part: finished(part) for part in ("resume", "study", "length")}
    if args.fresh:
        parts["study"], parts["length"] = [], []

    def record(part: str, rows: list[dict[str, Any]]) -> None:
        parts[part] += rows
        print(*rows, sep="\n", flush=True)
        write([row for rows in parts.values() for row in rows], args.seeds)

    if args.part in ("resume", "all"):
        measured = measure_resume(args.seeds, args.rows)
        if args.rows != 1_000_000:
            print("not written: the headline is for 1 000 000 rows")
            return 0
        parts["resume"] = []
        record("resume", measured)
    if args.part in ("study", "all"):
        done = {(row["seed"], row["order"], row["schedule"]) for row in parts["study"]}
        for seed, schedule, order in itertools.product(
            args.seeds, _curriculum_study.SCHEDULES, _curriculum_study.ORDERS
        ):
            if (seed, order, schedule) not in done:
                record("study", [_curriculum_study.run_arm(seed, order, schedule)])
    if args.part in ("length", "all"):
        for seed in sorted(set(args.seeds) - {row["seed"] for row in parts["length"]}):
            record("length", _growlength_study.run_seed(seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
