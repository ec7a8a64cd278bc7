"""One run of `bench.grpo_selection`, in a process of its own."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

for _name, _value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402  (the threads are set before)
from datasets import Dataset  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from bench import _selection_tasks as tasks  # noqa: E402
from bench._selection_arms import RATE, SEED, SIZE, Arm, Made, find_arm  # noqa: E402
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer  # noqa: E402
from hf_effi.demo.command import quiet_libraries  # noqa: E402
from hf_effi.demo.measure import Instrument  # noqa: E402
from hf_effi.functional import metrics  # noqa: E402
from hf_effi.selection import side_column  # noqa: E402

#: drops that are no verdict of a filter on a group
_NO_VERDICT = {"pruned", "surplus", "uneven"}
_FAR = 1_000_000


@dataclass(frozen=True)
class Settings:
    """
    What all arms share.

    Args:
        budget_seconds (`float`): CPU seconds of training of each run, evaluation aside.
        least_steps (`int`): Updates that a run has however long they take.
        evaluations (`int`): Evaluations of a run after the one at its start, at equal distances of CPU seconds.
        prompts (`int`): Training prompts, which are passed over as often as the budget allows.
        rows_per_step (`int`): Completions that stock trains on in an update.
        num_iterations (`int`): Updates for each generation; the demo found 2 to serve stock best (bench/LOG.md).
        probe_per_size (`int`): Probe problems of each size.
        samples (`int`): Samples of each probe problem.
        learning_rates, tuning_seeds: Grid and seeds on which TRL's learning rate is chosen; all arms then have it.
    """

    budget_seconds: float = 40.0
    least_steps: int = 1
    evaluations: int = 16
    prompts: int = 640
    rows_per_step: int = 256
    num_generations: int = 8
    num_iterations: int = 2
    warmup_steps: int = 10
    probe_per_size: int = 64
    samples: int = 2
    learning_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 4e-4)
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (0, 1, 2)

    def quick(self) -> Settings:
        """Return a variant in which every part runs and nothing is learned."""
        return replace(
            self, budget_seconds=0.2, least_steps=4, evaluations=2, prompts=64, rows_per_step=32, warmup_steps=1,
            probe_per_size=2, samples=1, learning_rates=(1e-4,), tuning_seeds=(100,), seeds=(0, 1),
        )  # fmt: skip

    @property
    def grid(self) -> list[float]:
        """CPU seconds of the evaluations, from 0 to the budget."""
        return [self.budget_seconds * i / self.evaluations for i in range(self.evaluations + 1)]


class Meter(Instrument):
    """The instrument of the demo, which also counts the prompts that completions were generated for."""

    def __init__(self, trainer: Any) -> None:
        self._fresh: set[tuple[int, ...]] = set()
        super().__init__(trainer)

    def _after_generation(self, prompt_ids: list[list[int]], result: tuple[Any, ...]) -> None:
        super()._after_generation(prompt_ids, result)
        self._fresh |= {tuple(ids) for ids in prompt_ids}

    def _count_forwarded(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "input_ids" in kwargs:
            super()._count_forwarded(module, args, kwargs)

    def go_on(self, spent: Mapping[str, float]) -> None:
        """Add the CPU seconds of an earlier part of the run, by phase; after [`start`]."""
        clock = self.clocks[0]
        for phase, seconds in spent.items():
            if phase != "other":
                clock.seconds[phase] += seconds
        cpu, wall = self._started or (0.0, 0.0)
        self._started = cpu - sum(spent.values()), wall

    def end_step(self) -> None:
        """A prompt counts once for each update, in however many turns it was generated for."""
        self.counts["prompts"] += len(self._fresh)
        self._fresh.clear()


class Recorder(TrainerCallback):
    """Times the optimizer, evaluates outside of the clock, and ends the run with its budget."""

    def __init__(self, meter: Meter, settings: Settings, evaluate: Callable[[int], float]) -> None:
        self.meter, self.settings, self.evaluate = meter, settings, evaluate
        self.curve: list[dict[str, float]] = []
        self.dropped: Counter[str] = Counter()
        self._optimizer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.meter.excluded():
            self._point(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer = self.meter.phase("training")
        self._optimizer.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer.__exit__(None, None, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kw: Any) -> None:
        for name, value in (logs or {}).items():
            if name.startswith(metrics.DROPPED):
                self.dropped[name.removeprefix(metrics.DROPPED)] += round(value)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, budget = state.global_step, self.settings.budget_seconds
        with self.meter.excluded():
            self.meter.end_step()
            spent = self.meter.elapsed()[0]
            over = spent >= budget and step >= self.settings.least_steps
            if over or spent >= len(self.curve) * budget / self.settings.evaluations:
                self._point(step)
        # What follows the progress of the run sees the share of its budget.
        state.max_steps = step if over else max(step + 1, round(step * budget / spent))
        control.should_training_stop = over

    def _point(self, step: int) -> None:
        counts = self.meter.counts
        self.curve.append(
            {
                "cpu_seconds": round(self.meter.elapsed()[0], 4),
                "steps": step,
                "prompts": counts["prompts"],
                "rollouts": counts["rows_generated"],
                "tokens_forwarded": counts["tokens_forwarded"],
                "accuracy": self.evaluate(step),
            }
        )


def grpo_arguments(
    settings: Settings, task: tasks.Task, seed: int, learning_rate: float, folder: str
) -> dict[str, Any]:
    """Return what every arm gives to its configuration."""
    return {
        "output_dir": folder,
        "max_steps": _FAR,
        "per_device_train_batch_size": settings.rows_per_step,
        "num_generations": settings.num_generations,
        "num_iterations": settings.num_iterations,
        "max_completion_length": task.max_completion,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "temperature": 1.0,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "seed": seed,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def arm_trainer(
    arm: Arm,
    arguments: Mapping[str, Any],
    policy: Any,
    dataset: Dataset,
    tokenizer: Any,
    reward: Callable[..., list[float]],
    *,
    seed: int,
    rate: float | None,
) -> GRPOTrainer:
    """Return the trainer of an arm, with its objects."""
    rewards = reward if arm.side is None else [reward, side_column(tasks.worked_share, name=arm.side)]
    shared = {"reward_funcs": rewards, "train_dataset": dataset, "processing_class": tokenizer}
    if arm.options is None:
        return GRPOTrainer(policy, args=GRPOConfig(**arguments), **shared)
    places = {SIZE: len(dataset), SEED: seed, RATE: rate}
    objects = {
        name: value.build(places) if isinstance(value, Made) else [one.build(places) for one in value]
        for name, value in arm.objects.items()
    }
    config = EffiGRPOConfig(**arguments, **arm.options, run_record=False)
    return EffiGRPOTrainer(policy, args=config, **shared, **objects)


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train one arm with one seed and return its record."""
    arm, settings = find_arm(job["arm"]), Settings(**job["settings"])
    task = tasks.load_task(job["task"], Path(job["extra"]))
    task = tasks.quick(task) if job["quick"] else task
    probe = task.probe(settings.probe_per_size)
    excluded = frozenset(item.prompt for item in probe)
    items = task.prompts(job["seed"], settings.prompts, excluded)
    columns = {name: [getattr(item, name) for item in items] for name in ("prompt", "answer", "kind")}
    columns["demonstration"] = [item.worked for item in items]  # for arms that learn from worked answers
    dataset = Dataset.from_dict({**columns, "difficulty": [float(item.size) for item in items]})
    policy = tasks.load_policy(Path(job["policy"]))

    def evaluate(step: int) -> float:
        rates = tasks.pass_rates(trainer.model, task, probe, settings.samples, seed=step)
        return round(sum(rates) / len(rates), 5)

    with tempfile.TemporaryDirectory() as folder:
        arguments = grpo_arguments(settings, task, job["seed"], job["learning_rate"], folder)
        trainer = arm_trainer(
            arm, arguments, policy, dataset, task.tokenizer(), task.reward, seed=job["seed"], rate=job["rate"]
        )
        trainer.remove_callback(PrinterCallback)
        meter = Meter(trainer)
        recorder = Recorder(meter, settings, evaluate)
        trainer.add_callback(recorder)
        meter.start()
        trainer.train()
    spent, _ = meter.split()
    generated = max(1, meter.counts["rows_generated"])
    judged = sum(rows for reason, rows in recorder.dropped.items() if reason not in _NO_VERDICT)
    return {
        **{name: job[name] for name in ("arm", "seed", "learning_rate", "rate")},
        "curve": recorder.curve,
        "cpu_seconds": {phase: round(seconds, 3) for phase, seconds in spent.items()},
        "counts": {
            "prompts": meter.counts["prompts"],
            "rollouts": meter.counts["rows_generated"],
            "steps": trainer.state.global_step,
            "rows_trained": meter.counts["rows_trained"],
            "tokens_generated": meter.counts["tokens_generated"],
            "tokens_forwarded": meter.counts["tokens_forwarded"],
        },
        "dropped": dict(sorted(recorder.dropped.items())),
        "groups_kept": round(max(0.0, 1 - judged / generated), 4),
        "machine_seconds": round(_machine_seconds(), 3),
    }


def _machine_seconds() -> float:
    """Return the CPU seconds of a fixed piece of work: how fast the machine was at the end of this run."""
    left, began = torch.randn(512, 512), time.process_time()
    for _ in range(40):
        left = torch.tanh(left @ left.T / 512)
    return time.process_time() - began


def prepare(job: Mapping[str, Any]) -> dict[str, Any]:
    """Make the starting policy, and return how it does on the training prompts of the first seed."""
    task = tasks.load_task(job["task"], Path(job["extra"]))
    task = tasks.quick(task) if job["quick"] else task
    settings = Settings(**job["settings"])
    probe = task.probe(settings.probe_per_size)
    excluded = frozenset(item.prompt for item in probe)
    policy = tasks.load_policy(tasks.prepare_policy(task, excluded, Path(job["policy"])))
    prompts = task.prompts(settings.seeds[0], settings.prompts, excluded)
    return {"mix": _mix(prompts, tasks.pass_rates(policy, task, prompts, settings.num_generations, seed=0))}


def execute(job: Mapping[str, Any], out: Path) -> None:
    """Do what a job says, and write its record whole."""
    torch.set_num_threads(1)
    with quiet_libraries():
        record = prepare(job) if job.get("prepare") else run(job)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(record), encoding="utf-8")
    part.replace(out)


def execute_alone(job: Mapping[str, Any], out: Path, log: Path) -> None:
    """[`execute`] as the target of a process: what it says goes to a file."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    execute(job, out)


def _mix(items: list[tasks.Item], rates: list[float]) -> list[dict[str, Any]]:
    """Return how the starting policy does on the prompts of each source."""
    out = []
    for kind in dict.fromkeys(item.kind for item in sorted(items, key=lambda item: item.size)):
        mine = [rate for item, rate in zip(items, rates, strict=True) if item.kind == kind]
        out.append(
            {
                "part": "mix",
                "kind": kind,
                "prompts": len(mine),
                "pass_rate": round(sum(mine) / len(mine), 4),
                "all_wrong": round(sum(rate == 0 for rate in mine) / len(mine), 4),
                "all_right": round(sum(rate == 1 for rate in mine) / len(mine), 4),
            }
        )
    return out
