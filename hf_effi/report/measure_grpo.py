"""Short GRPO runs of a model's config on this machine, timed phase by phase as the trainer times itself."""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..functional import metrics
from ..functional.accounting import PhaseClock
from ..functional.forward_costs import ForwardCosts
from ..functional.grpo_expected import Lengths
from ..functional.grpo_plan import GRPOChoices, GRPOShape, PlannedWork, planned_work
from ..functional.grpo_speeds import fit_speeds
from .model_shapes import DTYPES, model_class_of

#: generations of a measured point; the first one is left out
CYCLES = 4
#: measured points that a fit needs
LEAST_POINTS = 6
#: words of the made-up tokenizer at most
_WORDS = 1024
_PAD, _END = "<pad>", "<end>"
Clock = Callable[[], float]


@dataclass(frozen=True)
class Point:
    """
    One short run that is timed. Its completions all run to `completion` tokens.

    Args:
        prompts, group_size, micro_batch, num_iterations (`int`): As in [`GRPOShape`].
        prompt, completion (`int`): Tokens.
        savings (`tuple[str, ...]`, *optional*): As in [`GRPOChoices`].
    """

    prompts: int
    group_size: int
    micro_batch: int
    prompt: int
    completion: int
    num_iterations: int = 2
    savings: tuple[str, ...] = ()

    @property
    def shape(self) -> GRPOShape:
        """What it trains on: no group is dead."""
        one = [Lengths((length,), (1.0,)) for length in (self.prompt, self.completion)]
        return GRPOShape(self.prompts, self.group_size, self.micro_batch, *one, num_iterations=self.num_iterations)


_FLAT = ("pack", "share")
#: what is measured, in this order; small and large rows, batches, forwards, padded and end to end
POINTS = (
    Point(2, 2, 4, 8, 8),
    Point(4, 4, 16, 8, 24),
    Point(2, 4, 8, 96, 8),
    Point(8, 4, 32, 24, 48),
    Point(2, 8, 4, 64, 24, savings=_FLAT),
    Point(2, 16, 16, 32, 16, savings=_FLAT),
    Point(4, 8, 32, 96, 32, num_iterations=1),
    Point(2, 8, 16, 16, 64, savings=_FLAT),
    Point(4, 4, 4, 64, 32, savings=("trim", "sort")),
    Point(2, 12, 24, 8, 96, num_iterations=1),
    Point(2, 8, 16, 32, 40, savings=("trim",)),
    Point(4, 8, 32, 16, 24, savings=("trim", "pack")),
    Point(4, 2, 2, 160, 12),
)


@dataclass
class Measured:
    """
    What a device does.

    Args:
        speeds (`dict`): Phase -> count -> seconds, as [`~hf_effi.functional.grpo_speeds.fit_speeds`] returns them.
        error (`float`): Largest relative error of the fit at a measured point.
        points (`list[dict]`): What was measured: the point, its seconds by phase, and those of the fit.
        seconds (`float`): How long it took.
    """

    speeds: dict[str, dict[str, float]]
    error: float
    points: list[dict[str, Any]]
    seconds: float


def measure_device(
    config: PreTrainedConfig,
    costs: ForwardCosts,
    *,
    dtype: str = "float32",
    budget_seconds: float = 60.0,
    points: Sequence[Point] = POINTS,
    cycles: int = CYCLES,
    now: Clock = time.perf_counter,
    seed: int = 0,
) -> Measured:
    """
    Time short runs of `EffiGRPOTrainer` on this machine, and fit what each token, row and call costs.

    Args:
        config (`PreTrainedConfig`): A model with random weights is built from it.
        costs ([`~hf_effi.functional.forward_costs.ForwardCosts`]): Of the model and the device.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the weights.
        budget_seconds (`float`, *optional*, defaults to `60.0`): No further point begins after it, on the clock
            of `now`; `LEAST_POINTS` do.
        points (`Sequence[Point]`, *optional*): What is measured.
        cycles (`int`, *optional*, defaults to `4`): Generations of a point; the first is left out. At least 2.
        now (`Callable[[], float]`, *optional*, defaults to `time.perf_counter`): Seconds; `time.process_time` on a
            busy machine with one thread.
        seed (`int`, *optional*, defaults to `0`): Of weights and prompts.

    Raises:
        ValueError: a budget of 0 or less, or fewer than 2 cycles.
    """
    if not budget_seconds > 0:
        raise ValueError(f"budget_seconds={budget_seconds!r} must be above 0.")
    if cycles < 2:
        raise ValueError(f"cycles={cycles!r} must be at least 2: the first is left out.")
    began, samples, told = now(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, point in enumerate(points):
            if number >= LEAST_POINTS and now() - began > budget_seconds:
                break
            choices = GRPOChoices(point.savings)
            model = random_model(config, dtype, seed)
            found = timed_run(
                model, point.shape, choices, Path(folder), cycles=cycles, fixed=True, now=now, seed=seed + number
            )
            samples.append((point, planned_work(point.shape, choices, costs), found))
    counted = [(_of_updates(work), seconds) for _, work, seconds in samples]
    speeds, error = fit_speeds(counted)
    for point, work, seconds in samples:
        rounded = {phase: round(value, 5) for phase, value in seconds.items()}
        fitted = {phase: round(value, 5) for phase, value in work.seconds(speeds).items()}
        told.append({"point": _named(point), "seconds": rounded, "fitted": fitted})
    return Measured(speeds, error, told, now() - began)


def _of_updates(work: PlannedWork) -> dict[str, dict[str, float]]:
    """Return the counts of one update."""
    return {
        phase: {name: count / work.updates for name, count in counts.items()} for phase, counts in work.counts.items()
    }


def _named(point: Point) -> str:
    return (
        f"{point.prompts} x {point.group_size} rows, micro-batches of {point.micro_batch}, {point.prompt} + "
        f"{point.completion} tokens, {point.num_iterations} updates, savings {','.join(point.savings) or 'off'}"
    )


def random_model(config: PreTrainedConfig, dtype: str, seed: int) -> Any:
    """Return a model of the config with random weights."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known. Known: {', '.join(DTYPES)}.")
    # Models and trainers write into it: one trainer turns `use_cache` off, and the next model would not cache.
    model_class, config = model_class_of(copy.deepcopy(config))
    torch.manual_seed(seed)
    return model_class._from_config(config, dtype=DTYPES[dtype])


def word_tokenizer(size: int) -> Any:
    """Return a tokenizer with a token for each of the words `w2`, `w3`, ..., padding 0 and end 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate([_PAD, _END, *(f"w{i}" for i in range(2, min(size, _WORDS)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_PAD, padding_side="left"
    )


@dataclass
class _Coins:
    """A reward function of 0 and 1: each prompt has a pass rate that is drawn once; or every other row is right."""

    shape: GRPOShape
    alternate: bool
    rng: random.Random
    rates: dict[str, float] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        if self.alternate:
            return [float(row % 2) for row in range(len(prompts))]
        rates, shares = zip(*self.shape.pass_rates, strict=True)
        for prompt in prompts:
            if prompt not in self.rates:
                self.rates[prompt] = self.rng.choices(rates, shares)[0]
        return [float(self.rng.random() < self.rates[prompt]) for prompt in prompts]


class _Updates(TrainerCallback):
    """Notes when updates begin, on the clock that the phases are timed by."""

    def __init__(self, now: Clock) -> None:
        self.now, self.began = now, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.append(self.now())


def timed_run(
    model: Any,
    shape: GRPOShape,
    choices: GRPOChoices,
    folder: Path,
    *,
    cycles: int,
    fixed: bool = False,
    now: Clock = time.perf_counter,
    seed: int = 0,
) -> dict[str, float]:
    """
    Train `EffiGRPOTrainer` for some generations, and return the mean seconds of an update by phase. Of three or more
    counted generations the slowest and the fastest are left out, for each phase.

    Args:
        model (`PreTrainedModel` or `str`): A model or its folder, which is needed with `beta` above 0.
        shape ([`~hf_effi.functional.grpo_plan.GRPOShape`]): Prompts of random words have its lengths; rewards its pass
            rates.
        choices ([`~hf_effi.functional.grpo_plan.GRPOChoices`]): What is on.
        folder (`Path`): Of the trainer; nothing is saved.
        cycles (`int`): Generations; the first is left out.
        fixed (`bool`, *optional*, defaults to `False`): Whether all completions have the longest length and no group
            is dead; else completions end where the model ends them, at the longest length at the latest.
        now, seed: As in [`measure_device`].

    Returns:
        `dict[str, float]`: Phase of `PHASES` -> seconds of an update; `update` is what lies outside of the others.
    """
    from datasets import Dataset

    from ..trainers.grpo import EffiGRPOTrainer

    rng, vocabulary = random.Random(seed), _vocabulary(model)
    groups = shape.prompts * choices.oversample * cycles * max(1, choices.filter_rounds)
    lengths = rng.choices(shape.prompt_lengths.values, shape.prompt_lengths.shares, k=groups)
    if fixed:  # every other prompt is a token shorter: without padding there is no mask, and attention is another
        lengths = [length - number % 2 for number, length in enumerate(lengths)]
    texts = [" ".join(f"w{rng.randrange(2, min(vocabulary, _WORDS))}" for _ in range(length)) for length in lengths]
    updates = (cycles + 1) * shape.num_iterations  # the last one only ends the last but one
    trainer = EffiGRPOTrainer(
        model=model,
        reward_funcs=_Coins(shape, fixed, random.Random(seed)),
        args=_arguments(shape, choices, str(folder), updates, fixed, seed),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=word_tokenizer(vocabulary),
    )
    watch = _Updates(now)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    if now is not time.perf_counter:
        trainer._accounting.clock = PhaseClock(now)
    trainer.train()
    return _mean_seconds(trainer.state.log_history, watch.began, shape.num_iterations)


def _arguments(shape: GRPOShape, choices: GRPOChoices, folder: str, updates: int, fixed: bool, seed: int) -> Any:
    """Return the trainer's arguments for a timed run."""
    from ..trainers.grpo import EffiGRPOConfig

    longest = shape.completion_lengths.values[-1]
    filtering: dict[str, Any] = {}
    if choices.filter_rounds:
        filtering = {"difficulty_range": [0.0, 1.0], "difficulty_max_rounds": choices.filter_rounds}
    return EffiGRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.micro_batch,
        gradient_accumulation_steps=shape.rows // shape.micro_batch,
        num_generations=shape.group_size,
        num_iterations=shape.num_iterations,
        beta=shape.beta,
        max_completion_length=longest,
        generation_kwargs={"min_new_tokens": longest} if fixed else None,
        exact_savings=",".join(choices.savings) or "off",
        prune_rate=choices.prune_rate,
        shuffle_dataset=not fixed,
        max_steps=updates,
        learning_rate=1e-7,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        run_record=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        seed=seed,
        **filtering,
    )


def _vocabulary(model: Any) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
    return int(config.get_text_config().vocab_size)


def _mean_seconds(history: Sequence[dict[str, Any]], began: Sequence[float], per_generation: int) -> dict[str, float]:
    """
    Return the seconds of an update by phase: the mean over generations from the second on, less the last one, without
    the largest and the smallest of three or more: what happens once in a run is no part of an update.
    """
    names = {phase: metrics.TIME + phase for phase in metrics.PHASES}
    logged = [entry for entry in history if names["train"] in entry]
    generations: list[dict[str, float]] = []
    for first in range(per_generation, len(began) - per_generation, per_generation):
        last = first + per_generation
        one = {phase: sum(entry[name] for entry in logged[first:last]) for phase, name in names.items()}
        generations.append({**one, "update": max(0.0, began[last] - began[first] - sum(one.values()))})
    return {
        phase: _trimmed([one[phase] for one in generations]) / per_generation for phase in (*metrics.PHASES, "update")
    }


def _trimmed(values: Sequence[float]) -> float:
    kept = sorted(values)[1:-1] if len(values) > 2 else values
    return sum(kept) / len(kept)
