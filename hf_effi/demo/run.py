"""Train all arms from one checkpoint with one seed, in alternation, and record what each did."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from .._files import save_aside
from ..functional import metrics
from .alternation import Job, alternate
from .arms import Arm
from .measure import Accuracy, Instrument, evaluate_policy
from .policy import PolicySettings
from .task import MAX_COMPLETION_TOKENS, Problem, build_tokenizer, exact_answer_reward, training_problems


@dataclass(frozen=True)
class DemoSettings:
    """
    Everything all arms share. What differs between arms is in the table of [`hf_effi.demo.arms`] only.

    Args:
        steps (`int`): Optimizer steps, a multiple of `num_iterations`.
        rows_per_step (`int`): Completions that the baseline trains on in a step.
        num_iterations (`int`): Optimizer steps that each generation is used for. The baseline learns as much a step
            with 2 as with 1, and needs less time for it (bench/LOG.md).
        max_terms (`int`): Longest chain asked for; longer than what fine-tuning showed, see [`PolicySettings`].
        steps (`int`): Optimizer steps at which the arms are compared.
        extra_steps (`int`): Further steps of the arms that go on, a multiple of `num_iterations`. Their accuracy at
            equal steps differs from the baseline's by less than one evaluation's noise, so stopping all arms at the
            same step would decide between "3x sooner" and "never" by chance. The other arms run one evaluation
            further, so that the smoothed accuracy after `steps` is a centred mean for every arm.
        eval_every_steps (`int`): Optimizer steps between two held-out evaluations.
        held_out_per_length (`int`): Held-out problems of each chain length.
        samples_per_prompt (`int`): Samples of each held-out prompt for the sampled accuracy.
    """

    steps: int = 32
    extra_steps: int = 16
    rows_per_step: int = 256
    num_generations: int = 8
    num_iterations: int = 2
    learning_rate: float = 8e-5
    warmup_steps: int = 10
    adam_beta2: float = 0.95
    loss_type: str = "dapo"
    min_terms: int = 2
    max_terms: int = 8
    train_prompts: int = 6000
    eval_every_steps: int = 4
    held_out_per_length: int = 64
    samples_per_prompt: int = 2
    policy: PolicySettings = field(default_factory=PolicySettings)

    def __post_init__(self) -> None:
        if self.steps < self.eval_every_steps or self.steps % self.eval_every_steps:
            raise ValueError(
                f"steps must be a positive multiple of eval_every_steps={self.eval_every_steps}, got {self.steps}: "
                "the arms are compared at an evaluation."
            )
        if self.steps % self.num_iterations:
            raise ValueError(
                f"steps must be a positive multiple of num_iterations={self.num_iterations}, got {self.steps}: each "
                "generation is trained on that many times."
            )

    def steps_of(self, goes_on: bool) -> int:
        """Return how many steps an arm runs."""
        return self.steps + (self.extra_steps if goes_on else self.eval_every_steps)

    def quick(self) -> DemoSettings:
        """Return the smoke-test variant: every part runs, nothing is learned, seconds in all."""
        policy = replace(
            self.policy, hidden_size=48, num_layers=2, intermediate_size=96, sft_max_terms=3, sft_steps=150
        )
        return replace(
            self,
            steps=4,
            extra_steps=2,
            rows_per_step=32,
            warmup_steps=1,
            train_prompts=200,
            eval_every_steps=2,
            held_out_per_length=4,
            max_terms=4,
            policy=policy,
        )


@dataclass(frozen=True)
class Work:
    """
    What all arms of a comparison train on.

    Args:
        load_policy (`Callable`): Returns a fresh copy of the starting policy.
        build_tokenizer (`Callable`): Returns its tokenizer.
        reward (`Callable`): Reward function.
        prompts (`datasets.Dataset`): Training prompts, with the columns that `reward` asks for.
        evaluate (`Callable`): `evaluate(policy, tokenizer, seed)` returns the [`Accuracy`] on held-out problems.
        max_completion (`int`): Most tokens of a completion.
    """

    load_policy: Callable[[], Any]
    build_tokenizer: Callable[[], Any]
    reward: Any
    prompts: Dataset
    evaluate: Callable[[Any, Any, int], Accuracy]
    max_completion: int = MAX_COMPLETION_TOKENS


def grpo_arguments(
    settings: DemoSettings, seed: int, output_dir: str, max_completion: int = MAX_COMPLETION_TOKENS
) -> dict[str, Any]:
    """Return the keyword arguments that every arm gives to its configuration."""
    return {
        "output_dir": output_dir,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.rows_per_step,
        "num_generations": settings.num_generations,
        "num_iterations": settings.num_iterations,
        "max_completion_length": max_completion,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "temperature": 1.0,
        "loss_type": settings.loss_type,
        "scale_rewards": "group",
        "seed": seed,
        # bf16 is 60 to 500 times slower than fp32 on CPUs without bf16 instructions, and TRL turns it on by default.
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def build_trainer(arm: Arm, settings: DemoSettings, work: Work, *, seed: int, runs: Path) -> GRPOTrainer:
    """Return the arm's trainer on a fresh copy of the starting policy."""
    arguments = grpo_arguments(settings, seed, str(runs / arm.key), work.max_completion)
    arguments["max_steps"] = settings.steps_of(arm.goes_on)
    if arm.options is None:
        trainer_class, config = GRPOTrainer, GRPOConfig(**arguments)
    else:
        from ..trainers.grpo.config import EffiGRPOConfig
        from ..trainers.grpo.trainer import EffiGRPOTrainer

        trainer_class, config = EffiGRPOTrainer, EffiGRPOConfig(**arguments, **arm.options)
    trainer = trainer_class(
        model=work.load_policy(),
        reward_funcs=work.reward,
        args=config,
        train_dataset=work.prompts,
        processing_class=work.build_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Recorder(TrainerCallback):
    """Times the optimizer, evaluates every few steps outside the clock, and hands over to the next arm."""

    def __init__(
        self, instrument: Instrument, evaluate: Callable[[int], Accuracy], settings: DemoSettings, job: Job
    ) -> None:
        self.instrument, self.evaluate, self.settings, self.job = instrument, evaluate, settings, job
        self.curve: list[dict[str, float]] = []
        self.logged: Counter[str] = Counter()
        self.num_iterations = 1
        self.at_equal_steps: Any = None
        self._optimizer_phase: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_iterations = args.num_iterations
        self.instrument.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer_phase = self.instrument.phase("training")
        self._optimizer_phase.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer_phase.__exit__(None, None, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.global_step > self.settings.steps:
            return
        for name, value in (logs or {}).items():
            if name.startswith(metrics.DROPPED):
                self.logged[name.removeprefix(metrics.DROPPED)] += round(value)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.settings.steps:
            # Seconds, rows and tokens are those of the equal steps; only the curve goes on.
            self.at_equal_steps = (self.instrument.split(), self.instrument.counts.copy())
        with self.instrument.excluded():
            if state.global_step % self.settings.eval_every_steps == 0 or state.global_step == state.max_steps:
                self.curve.append(self._point(state.global_step))
            self.job.pause()

    def _point(self, step: int) -> dict[str, float]:
        cpu, wall = self.instrument.elapsed()
        counts = self.instrument.counts
        return {
            "step": step,
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "rows_generated": counts["rows_generated"],
            **asdict(self.evaluate(step)),
        }


def run_arms(
    arms: Sequence[Arm],
    settings: DemoSettings,
    checkpoint: Path,
    *,
    start: Accuracy,
    held_out: Sequence[Problem],
    seed: int,
    keep_policy_of: str | None = None,
    on_step: Callable[[str, int], None] = lambda arm, step: None,
    output_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """
    Train each arm on the demo's task, see [`run_work`].

    Args:
        output_dir (`Path`, *optional*): Defaults to the folder that holds `checkpoint`.
    """
    problems = itertools.islice(
        training_problems(10_000 + seed, held_out, settings.min_terms, settings.max_terms), settings.train_prompts
    )
    work = Work(
        load_policy=lambda: Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        build_tokenizer=build_tokenizer,
        reward=exact_answer_reward,
        prompts=Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]),
        evaluate=lambda policy, tokenizer, step: evaluate_policy(
            policy, tokenizer, held_out, settings.samples_per_prompt, seed=step
        ),
    )
    folder = checkpoint.parent if output_dir is None else output_dir
    return run_work(
        arms, settings, work, start=start, seed=seed, keep_policy_of=keep_policy_of, on_step=on_step, folder=folder
    )


def run_work(
    arms: Sequence[Arm],
    settings: DemoSettings,
    work: Work,
    *,
    start: Accuracy,
    seed: int,
    folder: Path,
    keep_policy_of: str | None = None,
    on_step: Callable[[str, int], None] = lambda arm, step: None,
) -> list[dict[str, Any]]:
    """
    Train each arm for `settings.steps` steps (the ones that go on: further), one step of each in turn.

    Machine noise (another job starts, the clock frequency falls) then hits all arms alike; the curves themselves do
    not depend on the alternation.

    Args:
        start ([`Accuracy`]): That of the starting policy.
        keep_policy_of (`str`, *optional*): Arm whose trained policy is saved to `folder / "model"`.
        on_step (`Callable`): Called with (arm key, its finished steps) after each turn.
        folder (`Path`): For the policy, and for what trainers write.

    Returns:
        `list[dict]`: One record an arm: curve, seconds by phase, rows, tokens. Plain JSON values.
    """

    def train(arm: Arm) -> Callable[[Job], dict[str, Any]]:
        def run(job: Job) -> dict[str, Any]:
            trainer = build_trainer(arm, settings, work, seed=seed, runs=folder / "cache" / "runs")
            tokenizer, instrument = trainer.processing_class, Instrument(trainer)
            recorder = _Recorder(instrument, lambda step: work.evaluate(trainer.model, tokenizer, step), settings, job)
            trainer.add_callback(recorder)
            job.pause()
            trainer.train()
            if arm.key == keep_policy_of:
                save_aside(folder / "model", lambda part: _save_policy(trainer.model, tokenizer, part))
            return _record(arm, seed, start, recorder)

        return run

    turns, results = Counter(), {}
    for key, job in alternate({arm.key: train(arm) for arm in arms}):
        turns[key] += 1
        on_step(key, min(turns[key] - 1, settings.steps_of(next(arm.goes_on for arm in arms if arm.key == key))))
        if job.finished:
            results[key] = job.result
    return [results[arm.key] for arm in arms]


def _save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _record(arm: Arm, seed: int, start: Accuracy, recorder: _Recorder) -> dict[str, Any]:
    (cpu, wall), counts = recorder.at_equal_steps
    dropped = dict(recorder.logged)
    # Rows that no selection dropped and that were not forwarded: their advantage is zero, so is their gradient.
    passes = recorder.num_iterations
    dropped["zero_gradient"] = counts["rows_generated"] - counts["rows_trained"] // passes - sum(dropped.values())
    origin = {"step": 0, "cpu_seconds": 0.0, "wall_seconds": 0.0, "rows_generated": 0}
    return {
        "arm": arm.key,
        "title": arm.title,
        "control": arm.control,
        "options": None if arm.options is None else dict(arm.options),
        "seed": seed,
        "steps": recorder.settings.steps,
        "curve": [{**origin, **asdict(start)}, *recorder.curve],
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "rows": {
            "generated": counts["rows_generated"],
            "trained": counts["rows_trained"] // passes,
            "dropped": {reason: rows for reason, rows in sorted(dropped.items()) if rows},
        },
        "tokens": {name: counts[f"tokens_{name}"] for name in ("generated", "forwarded", "real")},
    }
