"""Instruments: held-out accuracy, and the time split, rows and tokens of any `GRPOTrainer`, stock or ours."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..functional.accounting import PhaseClock, count_tokens
from .task import MAX_COMPLETION_TOKENS, Problem, final_number

PHASES = ("generation", "reward", "logprobs", "training", "other")
_EXCLUDED = "excluded"


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy with half-widths of the 95 % confidence interval, all as fractions of 1."""

    greedy: float
    greedy_ci: float
    sampled: float
    sampled_ci: float


def rng_state() -> tuple[Any, ...]:
    """Return the state of the three global generators that training and generation draw from."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_rng_state(state: tuple[Any, ...]) -> None:
    """Put back what [`rng_state`] returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """
    Return the mean and the half-width of its 95 % interval (normal, sample standard deviation).

    One value is one prompt: several samples of a prompt are averaged first, since they are not independent.

    Example:
    ```python
    >>> mean, half = mean_and_half_width([1.0, 0.0, 1.0, 0.0])
    >>> mean, round(half, 4)
    (0.5, 0.5658)
    ```
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, 1.96 * math.sqrt(variance / len(values))


@torch.no_grad()
def _solve(policy: Any, tokenizer: Any, problems: Sequence[Problem], do_sample: bool) -> list[float]:
    batch = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    prompt_ids = batch["input_ids"].to(policy.device)
    output = policy.generate(
        input_ids=prompt_ids,
        attention_mask=batch["attention_mask"].to(policy.device),
        max_new_tokens=MAX_COMPLETION_TOKENS,
        do_sample=do_sample,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(output[:, prompt_ids.shape[1] :], skip_special_tokens=True)
    return [float(final_number(text) == problem.answer) for text, problem in zip(texts, problems, strict=True)]


def evaluate_policy(
    policy: Any, tokenizer: Any, problems: Sequence[Problem], samples_per_prompt: int, seed: int
) -> Accuracy:
    """
    Measure greedy and sampled (temperature 1) accuracy without touching the run that is being measured.

    The global generators and the train/eval mode of `policy` are put back; samples depend on `seed` only.
    """
    state, was_training = rng_state(), policy.training
    policy.eval()
    try:
        torch.manual_seed(seed)
        greedy = _solve(policy, tokenizer, problems, do_sample=False)
        flat = _solve(policy, tokenizer, [p for p in problems for _ in range(samples_per_prompt)], do_sample=True)
    finally:
        policy.train(was_training)
        set_rng_state(state)
    n = samples_per_prompt
    sampled = [sum(flat[i * n : (i + 1) * n]) / n for i in range(len(problems))]
    return Accuracy(*mean_and_half_width(greedy), *mean_and_half_width(sampled))


class Instrument:
    """
    Measures one `GRPOTrainer` from outside, by wrapping bound methods of the instance: stock and ours are measured
    by the same code.

    CPU seconds are those of the calling thread, wall seconds those of the clock; both leave out what runs inside
    [`excluded`] (evaluation, waiting for other arms). Tokens and rows are counted where they enter the model:
    `tokens_generated` are the real tokens of all prompts and completions, `tokens_forwarded` all tokens of the
    log-prob forwards with padding, `tokens_real` those without.

    Args:
        trainer ([`~trl.GRPOTrainer`]): Not yet trained. Its methods are wrapped in place.
    """

    def __init__(self, trainer: Any) -> None:
        self.clocks = PhaseClock(time.thread_time), PhaseClock(time.perf_counter)
        self.counts: Counter[str] = Counter()
        self._started: tuple[float, float] | None = None
        self._not_counting = False
        self._wrap(trainer, "_generate_single_turn", "generation", after=self._after_generation)
        self._wrap(trainer, "_calculate_rewards", "reward")
        self._wrap(trainer, "_get_per_token_logps_and_entropies", "logprobs")
        self._wrap(trainer.accelerator, "backward", "training")
        trainer.model.register_forward_pre_hook(self._count_forwarded, with_kwargs=True)

    def _wrap(self, owner: Any, name: str, phase: str, after: Callable[[Any, Any], None] | None = None) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                result = method(*args, **kwargs)
            if after is not None:
                after(args[0], result)
            return result

        setattr(owner, name, timed)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to phase `name`."""
        cpu, wall = self.clocks
        outer, self._not_counting = self._not_counting, name in ("generation", _EXCLUDED)
        try:
            with cpu.phase(name), wall.phase(name):
                yield
        finally:
            self._not_counting = outer

    def excluded(self) -> contextlib.AbstractContextManager[None]:
        """Leave the time and the tokens spent inside out of every figure."""
        return self.phase(_EXCLUDED)

    def start(self) -> None:
        """Start both clocks."""
        self._started = (time.thread_time(), time.perf_counter())

    def elapsed(self) -> tuple[float, float]:
        """Return (CPU, wall) seconds since [`start`], without what was excluded."""
        if self._started is None:
            raise RuntimeError("the instrument was read before `start()`.")
        cpu, wall = time.thread_time() - self._started[0], time.perf_counter() - self._started[1]
        return cpu - self.clocks[0].seconds[_EXCLUDED], wall - self.clocks[1].seconds[_EXCLUDED]

    def split(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return (CPU, wall) seconds by phase; `other` is what no phase claims (data loading, bookkeeping)."""
        parts = []
        for total, clock in zip(self.elapsed(), self.clocks, strict=True):
            named = {phase: clock.seconds[phase] for phase in PHASES[:-1]}
            parts.append({**named, "other": max(0.0, total - sum(named.values()))})
        return parts[0], parts[1]

    def _after_generation(self, prompt_ids: list[list[int]], result: tuple[Any, ...]) -> None:
        completion_ids = result[0]
        self.counts["rows_generated"] += len(completion_ids)
        self.counts["tokens_generated"] += sum(map(len, prompt_ids)) + sum(map(len, completion_ids))

    def _count_forwarded(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._not_counting:
            return
        forwarded, real = count_tokens(kwargs["input_ids"], kwargs.get("attention_mask"))
        self.counts["tokens_forwarded"] += forwarded
        self.counts["tokens_real"] += int(real)
        if torch.is_grad_enabled():
            self.counts["rows_trained"] += _rows_in(kwargs)


def _rows_in(call: dict[str, Any]) -> int:
    """Return the rows of a forward: of a flat one, the segments that are no shared prompt."""
    if call.get("cu_seq_lens_q") is None:
        return len(call["input_ids"])
    prefixes = call.get("shared_prefix_cu_seq_lens_k")
    return len(call["cu_seq_lens_q"]) - (1 if prefixes is None else len(prefixes))
