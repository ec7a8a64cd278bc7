"""The selection suite beside TRL's GRPOTrainer at equal CPU seconds, each method beside its random control.

    python -m bench.grpo_selection --task lab --processes 2
    python -m bench.grpo_selection --task second --extra FOLDER

TRL's learning rate is chosen on seeds of its own, and all arms then have it; their own options are the paper's or our
defaults (`bench/_selection_arms.py`). A run is one process with one thread, and ends after the same CPU seconds of
training; evaluation, loading and the policy's own fine-tuning are not counted. Runs that are done are kept in
`--cache` by a fingerprint of their settings and of the package's source, so that an interrupted bench goes on. `lab`
writes `grpo_selection.json`, `second` writes `grpo_second_task.json`; a choice of arms (`--arms`) and `--quick` write
into the cache folder, without goals, where `--results` names no other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import _selection_tasks as tasks
from bench._schema import RESULTS, ROOT, command_line, write_result
from bench._selection_arms import ARMS, RATE, Arm, choose
from bench._selection_figures import figures, final_accuracy, summarize
from bench._selection_run import Settings, execute, execute_alone

#: task -> result file and goal of the ratio of CPU seconds
RESULT_OF = {"lab": ("grpo_selection", "<= 0.15"), "second": ("grpo_second_task", "<= 0.33")}
_SOURCES = ("bench/_selection_run.py", "bench/_selection_tasks.py", "bench/_selection_controls.py")


def source_fingerprint(root: Path = ROOT) -> str:
    """Return a hash of the package and of what runs an arm."""
    digest = hashlib.sha256()
    for path in [*sorted((root / "hf_effi").rglob("*.py")), *(root / name for name in _SOURCES)]:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Runs:
    """
    Runs jobs in processes of their own, so many at a time, and keeps their records.

    Args:
        folder (`Path`): Where records and logs lie.
        processes (`int`): Processes at a time; 0 runs all in this one, which measures nothing.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes, self.source = folder, processes, source_fingerprint()
        self.failed: dict[str, str] = {}
        # A run begins from a process that has imported everything, and is a process of its own all the same.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["bench._selection_run"])
        folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, job: Mapping[str, Any]) -> Path:
        """Return where the record of a job lies: another setting, or other source, is another record."""
        # The folders of the policy and of extra packages do not change a run.
        known = {name: value for name, value in job.items() if name not in ("policy", "extra", "name")}
        text = json.dumps([known, self.source], sort_keys=True)
        return self.folder / f"{job['name']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
        """Return the records of the jobs, `None` for one that failed."""
        waiting = [job for job in jobs if not self.path_of(job).exists()]
        if not self.processes:
            self._run_here(waiting)
            waiting = []
        total, running, began = len(waiting), [], time.perf_counter()
        try:
            while waiting or running:
                while waiting and len(running) < self.processes:
                    running.append(self._start(waiting.pop(0)))
                time.sleep(0.2)
                for one in [one for one in running if not one[1].is_alive()]:
                    running.remove(one)
                    self._ended(*one)
                    minutes = (time.perf_counter() - began) / 60
                    done = total - len(waiting) - len(running)
                    print(f"{one[0]['name']}: {done} of {total} runs, {minutes:.1f} minutes", flush=True)
        finally:
            for _, process in running:
                process.terminate()
        return [json.loads(path.read_text()) if (path := self.path_of(job)).exists() else None for job in jobs]

    def _run_here(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        for job in jobs:
            try:
                execute(job, self.path_of(job))
            except Exception as error:  # as a process that ends badly
                self._failed(job, f"{type(error).__name__}: {error}")

    def _failed(self, job: Mapping[str, Any], why: str) -> None:
        self.failed[job["name"]] = why
        print(f"{job['name']} failed: {why}", file=sys.stderr, flush=True)

    def _start(self, job: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
        out = self.path_of(job)
        process = self.context.Process(target=execute_alone, args=(dict(job), out, out.with_suffix(".log")))
        process.start()
        return job, process

    def _ended(self, job: Mapping[str, Any], process: Any) -> None:
        log = self.path_of(job).with_suffix(".log")
        if process.exitcode:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            self._failed(job, f"{lines[-1] if lines else f'exit code {process.exitcode}'} ({log})")
        else:
            log.unlink(missing_ok=True)


class Bench:
    """The runs of one task: the policy, the tuning of TRL, the arms, and the controls that need a rate of theirs."""

    def __init__(
        self, task: str, settings: Settings, arms: Sequence[Arm], runs: Runs, *, extra: Path, quick: bool
    ) -> None:
        self.settings, self.arms, self.runs = settings, arms, runs
        # Through JSON, so that tuples and lists make one fingerprint.
        plain = json.loads(json.dumps(asdict(settings)))
        policy = str(runs.folder / ("policy-quick" if quick else "policy"))
        self.shared = {"task": task, "quick": quick, "settings": plain, "policy": policy, "extra": str(extra)}

    def job(self, arm: Arm, seed: int, learning_rate: float, rate: float | None = None) -> dict[str, Any]:
        """Return what a process is told."""
        name = f"{arm.key}-{learning_rate:g}-{seed}"
        made = {"arm": arm.key, "made": arm.plain(), "seed": seed, "learning_rate": learning_rate, "rate": rate}
        return {**self.shared, **made, "name": name}

    def run(self) -> tuple[float, list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the learning rate, the rows on tuning and prompts, and the records of all arms."""
        (start,) = self.runs.run([{**self.shared, "prepare": True, "name": "prepare"}])
        if start is None:
            raise SystemExit(f"the policy could not be made: {self.runs.failed['prepare']}")
        rate, tuning = self.tune()
        there = [arm for arm in self.arms if not arm.missing()]
        first = [arm for arm in there if not _needs_rate(arm)]
        records = self._records(self.job(arm, seed, rate) for seed, arm in self._turns(first))
        kept = {(record["arm"], record["seed"]): record["groups_kept"] for record in records}
        second = [
            self.job(arm, seed, rate, kept[arm.rate_of, seed])
            for seed, arm in self._turns([arm for arm in there if _needs_rate(arm)])
            if (arm.rate_of, seed) in kept
        ]
        return rate, [*start["mix"], *tuning], records + self._records(second)

    def _turns(self, arms: Sequence[Arm]) -> Iterator[tuple[int, Arm]]:
        """Arms take turns within a seed, in the other direction every other seed."""
        for place, seed in enumerate(self.settings.seeds):
            for arm in arms if place % 2 == 0 else arms[::-1]:
                yield seed, arm

    def _records(self, jobs: Any) -> list[dict[str, Any]]:
        return [record for record in self.runs.run(list(jobs)) if record is not None]

    def tune(self) -> tuple[float, list[dict[str, Any]]]:
        """Return TRL's learning rate with the best final accuracy over the tuning seeds, the lowest of equals."""
        stock, settings = ARMS[0], self.settings
        jobs = [
            self.job(stock, seed, learning_rate)
            for seed in settings.tuning_seeds
            for learning_rate in settings.learning_rates
        ]
        found: dict[float, list[float]] = {}
        for record in self._records(jobs):
            found.setdefault(record["learning_rate"], []).append(final_accuracy(record["curve"]))
        if not found:
            raise SystemExit("no run of the tuning ended well; see the logs.")
        rows = [
            {"part": "tuning", "learning_rate": one, "final_accuracy": round(statistics.fmean(values), 4)}
            for one, values in sorted(found.items())
        ]
        return max(sorted(found), key=lambda one: round(statistics.fmean(found[one]), 4)), rows


def _needs_rate(arm: Arm) -> bool:
    return any(RATE in made.arguments.values() for made in arm.made)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(RESULT_OF), default="lab")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at a time, one thread each; default: 1")
    parser.add_argument("--arms", metavar="A,B", help="only these, with the baseline and their controls")
    parser.add_argument("--budget", type=float, metavar="S", help="CPU seconds of training of each run")
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "cache" / "grpo_selection")
    parser.add_argument("--extra", type=Path, default=ROOT / "bench" / "cache" / "gym", help="where reasoning-gym is")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where the result file goes")
    parser.add_argument("--allow-failures", action="store_true", help="write the result although an arm failed")
    parser.add_argument("--list", action="store_true", help="list the arms and what is missing of them, and end")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run every part on tiny sizes, in this process without --processes; nothing is learned",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Run the bench of one task; returns the result file."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        arms = choose(None if args.arms is None else [key.strip() for key in args.arms.split(",")])
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for arm in arms:
            print(f"{arm.key:<20} {arm.title}" + "".join(f"  MISSING {name}" for name in arm.missing()))
        return None
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}.")
    if args.task == "second":
        try:
            tasks.import_gym(args.extra)
        except tasks.MissingExtra as error:
            parser.error(str(error))
    settings = Settings().quick() if args.quick else Settings()
    if args.budget is not None:
        settings = replace(settings, budget_seconds=args.budget)
    runs = Runs(args.cache.resolve() / args.task, args.processes or (0 if args.quick else 1))
    bench = Bench(args.task, settings, arms, runs, extra=args.extra.resolve(), quick=args.quick)
    learning_rate, rows, records = bench.run()
    if runs.failed and not args.allow_failures:
        for name, why in runs.failed.items():
            print(f"{name}: {why}", file=sys.stderr)
        raise SystemExit("nothing was written: repair what failed and run again, or pass --allow-failures.")
    name, goal = RESULT_OF[args.task]
    of_arms = summarize(records, arms, settings.grid)
    for row in of_arms:
        if "missing" in row and (why := [text for job, text in runs.failed.items() if job.startswith(row["arm"])]):
            row["missing"] = why[:1]
    machine = sorted(record["machine_seconds"] for record in records)
    shared = {
        "part": "settings",
        "task": args.task,
        "learning_rate": learning_rate,
        "machine_seconds_range": [machine[0], machine[-1]],
        **json.loads(json.dumps(asdict(settings))),
    }
    partial = args.quick or (args.arms is not None and args.results is None)
    folder = args.results or (args.cache / "results" if partial else RESULTS)
    found = figures(of_arms, None if partial else goal)
    for figure in found:
        print(figure)
    path = write_result(
        name, command=command_line("bench.grpo_selection"), seeds=settings.seeds, headline=found,
        rows=[shared, *rows, *of_arms], folder=folder,
    )  # fmt: skip
    print(path)
    return path


if __name__ == "__main__":
    main()
