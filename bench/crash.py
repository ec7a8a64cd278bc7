"""
Runs that are killed by SIGKILL and started again: stock checkpoints beside crash-safe ones.

    python -m bench.crash

SFT and GRPO, on one process and on two, save after every update and are killed at random moments and inside each phase
of a save; then they are started again as a script would: stock by `resume_from_checkpoint=True` where there is any
checkpoint, ours by `"auto"`. A resume *fails* where it raises, *restarts* where it goes on from a torn checkpoint
without a word, and *differs* where the weights at the end are not those of a run that nobody
killed, to the bit.

Then what a save costs: seconds that it holds up the training, for a state of 650 MB, with stock, and with each mode,
the copy at once and lazily; alternated. A lazy copy holds up the update after the save, if anything
(`step_after_a_save`). And what 100 saves leave behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from bench._crash_runs import PHASES, SEED, UPDATES, Job, run, trainer_of
from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi.checkpoint import SafeCheckpointer, list_checkpoints
from hf_effi.checkpoint.structure import first_broken

KILLS = 16  # at random moments, for each kind of training, number of processes and arm
MODES = ("sync", "thread", "process")
LAZY = ("lazy thread", "lazy process")
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state", "trainer_state.json")
STALL_EVERY, STALL_SAVES, STALL_ROUNDS = 20, 3, 2


# --- killed and started again ----------------------------------------------------------------------------------------


def trial(job: Job, world: int, expected: str, kill_after: float | None) -> dict[str, Any]:
    """Kill one run and start it again."""
    killed = run(job, world, kill_after)
    folder = Path(job.folder)
    newest = get_last_checkpoint(job.folder) if folder.is_dir() else None
    torn = newest is not None and first_broken(Path(newest)) is not None
    again = run(job._replace(end="", resume=True), world)
    failed = any(again.codes)
    from_it = newest is not None and again.begun_from == int(Path(newest).name.removeprefix("checkpoint-"))
    restarted = not failed and torn and from_it
    left = [path.name for path in folder.iterdir() if path.name.startswith(".hf_effi")] if folder.is_dir() else []
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "finished_before": killed.digest is not None and not job.end,
        "torn": torn,
        "failed": failed,
        "restarted": restarted,
        "differs": not failed and again.digest != expected,
        "left": bool(left),
        "error": _last_error(again.log) if failed else "",
        "from": again.begun_from,
    }


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "Error" in line]
    return lines[-1][:200] if lines else log[-200:]


def cells() -> Iterator[tuple[str, int]]:
    for kind in ("SFT", "GRPO"):
        for world in (1, 2):
            yield kind, world


def crash_rows(kills: int, base: Path) -> list[dict[str, Any]]:
    """Return one row for each kind, number of processes, arm and way to end."""
    rows = []
    draw = random.Random(SEED)
    for kind, world in cells():
        for arm in ("stock", "ours"):
            modes = ("stock",) if arm == "stock" else MODES
            whole = run(Job(kind, modes[0], str(base / "whole")), world)
            if any(whole.codes) or whole.digest is None:
                raise RuntimeError(f"{kind} on {world} processes did not train:\n{whole.log[-3000:]}")
            shutil.rmtree(base / "whole")
            seconds = whole.seconds
            moments = [seconds * draw.random() for _ in range(kills)]
            trials = {"random moment": [
                trial(Job(kind, modes[i % len(modes)], str(base / "run")), world, whole.digest, moment)
                for i, moment in enumerate(moments)
            ]}  # fmt: skip
            ends = FILES if arm == "stock" else (*FILES, *PHASES)
            trials["inside of each phase of a save"] = [
                trial(Job(kind, modes[0], str(base / "run"), end), world, whole.digest, None) for end in ends
            ]
            clean = clean_resume_differs(Job(kind, modes[0], str(base / "run")), world, whole.digest)
            for way, found in trials.items():
                row = {"part": "kills", "training": kind, "processes": world, "arm": arm, "killed at": way,
                       "kills": len(found), "uninterrupted_seconds": round(seconds, 2),
                       "a_clean_stop_differs": clean}  # fmt: skip
                row |= {key: sum(map(bool, (one[key] for one in found))) for key in (
                    "finished_before", "torn", "failed", "restarted", "differs", "left")}  # fmt: skip
                row["errors"] = sorted({one["error"] for one in found if one["error"]})[:3]
                rows.append(row)
                print(row, flush=True)
    return rows


def clean_resume_differs(job: Job, world: int, expected: str) -> bool:
    """Return whether a run that was ended between two saves, with whole checkpoints, ends in other weights."""
    run(job, world)
    for step in (UPDATES, UPDATES - 1):
        folder = Path(job.folder) / f"checkpoint-{step}"
        if step == UPDATES:
            shutil.rmtree(folder)
    again = run(job._replace(resume=True), world)
    shutil.rmtree(job.folder)
    return again.digest != expected


# --- what a save costs -----------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """Seconds of each update, without what comes after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def large_trainer(folder: Path, every: int, saves: int) -> Trainer:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    args = TrainingArguments(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=every * saves + 1,
        save_steps=every if saves else 10**6, save_strategy="steps", save_total_limit=1, logging_strategy="no",
        per_device_train_batch_size=1, seed=SEED,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(64) + i, "labels": torch.arange(64) + i} for i in range(256)]
    return Trainer(LlamaForCausalLM(config), args, train_dataset=rows)


def stall(arm: str, base: Path) -> dict[str, float]:
    """Return the seconds that a save held up the training, those of an update, and those of the whole run."""
    folder = base / "stall"
    made = large_trainer(folder, STALL_EVERY, STALL_SAVES)
    stalls: list[float] = []
    if arm == "stock":
        real = made._save_checkpoint

        def save(*args: Any) -> None:
            began = time.monotonic()
            real(*args)
            stalls.append(time.monotonic() - began)

        made._save_checkpoint = save
        checkpointer = None
    else:
        checkpointer = SafeCheckpointer(arm.removeprefix("lazy "), lazy=arm.startswith("lazy ")).attach(made)
    steps = Steps()
    made.add_callback(steps)
    began = time.monotonic()
    made.train()
    seconds = time.monotonic() - began
    found = stalls if checkpointer is None else checkpointer.stalls
    size = max(report.size for report in list_checkpoints(folder))
    shutil.rmtree(folder)
    after = [steps.seconds[i] for i in range(len(steps.seconds)) if i and i % STALL_EVERY == 0]
    return {
        "first_stall": found[0],
        "stall": statistics.median(found[1:]),
        "step": statistics.median(steps.seconds),
        "step_after_a_save": statistics.median(after),
        "written_in": statistics.median(checkpointer.writes) if checkpointer else statistics.median(found),
        "run": seconds,
        "megabytes": size / 2**20,
    }


def stall_rows(base: Path) -> list[dict[str, Any]]:
    """Alternate the arms, and return the medians of each."""
    arms = ("stock", *MODES, *LAZY)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for round_ in range(STALL_ROUNDS):
        for arm in arms if round_ % 2 == 0 else reversed(arms):
            found[arm].append(stall(arm, base))
            print("stall", arm, found[arm][-1], flush=True)
    rows = []
    for arm in arms:
        row = {key: round(statistics.median(one[key] for one in found[arm]), 4) for key in found[arm][0]}
        row["stall_fraction"] = round(row["stall"] / (STALL_EVERY * row["step"]), 5)
        # Young and Daly: the interval that loses least to saves and to work done twice.
        row["best_interval_seconds_at_one_failure_a_day"] = round((2 * row["stall"] * 86400) ** 0.5, 1)
        rows.append({"part": "stall", "arm": arm, "rounds": STALL_ROUNDS, "save_every": STALL_EVERY, **row})
    return rows


def left_rows(base: Path) -> list[dict[str, Any]]:
    """Count threads, descriptors, processes and shared memory before and after 100 saves."""

    def state() -> dict[str, int]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return {
            "threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd")),
            "processes": len(children), "shared_memory": len(os.listdir("/dev/shm")),
        }  # fmt: skip

    rows = []
    for arm in MODES:
        seen = []
        for saves in (1, 100):
            made = trainer_of(Job("SFT", "stock", str(base / "left")))
            made.args.max_steps = saves
            SafeCheckpointer(arm).attach(made)
            made.train()
            seen.append(state())
            shutil.rmtree(base / "left")
        rows.append({"part": "left", "arm": arm, "saves": 100, **{k: seen[1][k] - seen[0][k] for k in seen[0]}})
        print(rows[-1], flush=True)
    return rows


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def total(arm: str, key: str) -> int:
        return sum(row[key] for row in rows if row["part"] == "kills" and row["arm"] == arm)

    found = [
        headline(f"kills_{arm}", total(arm, "kills"), ">= 60" if arm == "ours" else None) for arm in ("stock", "ours")
    ]
    for key in ("failed", "restarted"):
        found.append(headline(f"{key}_resumes_stock", total("stock", key)))
        found.append(headline(f"{key}_resumes_ours", total("ours", key), "= 0"))
    found.append(headline("differing_resumes_ours", total("ours", "differs"), "= 0"))
    of_sft = [
        row for row in rows if row["part"] == "kills" and row["arm"] == "stock" and not row["a_clean_stop_differs"]
    ]
    found.append(headline("differing_resumes_stock", sum(row["differs"] for row in of_sft)))
    stalls = {row["arm"]: row for row in rows if row["part"] == "stall"}
    if stalls:
        best = min(stalls[mode]["stall_fraction"] for mode in ("thread", "process"))
        found.append(headline("save_stall_fraction", best, "< 0.02"))
        found.append(
            headline(
                "save_stall_ratio_stock_to_thread", round(stalls["stock"]["stall"] / stalls["thread"]["stall"], 2)
            )
        )
        found.append(
            headline(
                "save_stall_ratio_stock_to_process", round(stalls["stock"]["stall"] / stalls["process"]["stall"], 2)
            )
        )
    if "lazy thread" in stalls:
        ratio = stalls["thread"]["stall"] / stalls["lazy thread"]["stall"]
        found.append(headline("save_stall_ratio_eager_to_lazy", round(ratio, 2)))
    left = [row for row in rows if row["part"] == "left"]
    if left:
        keys = ("threads", "descriptors", "processes", "shared_memory")
        found.append(headline("left_after_100_saves", sum(max(0, row[key]) for row in left for key in keys), "= 0"))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, help="at random moments, for each of 8 cells")
    parser.add_argument(
        "--only", action="append", default=[], choices=["kills", "stall", "left"],
        help="run this part again, and put its rows into the file that is there",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "kills": lambda base: crash_rows(args.kills, base),
        "stall": stall_rows,
        "left": left_rows,
    }
    wanted = args.only or list(parts)
    path = RESULTS / "crash.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if args.only and path.exists() else []
    rows = [row for row in before if row["part"] not in wanted]
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            rows += parts[name](Path(folder))
    rows.sort(key=lambda row: list(parts).index(row["part"]))
    for figure in figures(rows):
        print(figure)
    print(write_result("crash", command=command_line("bench.crash"), seeds=[SEED], headline=figures(rows), rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
