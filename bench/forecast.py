"""Where will a curve end, and does a forecast stop a run whose rate still falls?

    python -m bench.forecast            # some minutes on one core
    python -m bench.forecast --smoke    # seconds: does every part run; nothing is written

1. Decoders on the source text of Python's standard library at a constant rate: from the held-out losses up to a
   quarter of the run, its end is predicted by the power law, by the last value, and by the annealing law that
   `hf-effi plan lr predict` fits, which needs a decayed run beside: it gets one as long as what was seen.
2. The callback meets 100 schedules that fall, with losses so flat that it would stop at once if it could, and 20
   that stand: a stop or a forecast before the last fall is a false one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import lr_scheduler as of_torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from bench._schema import command_line, headline, write_result
from bench.schedules import corpus
from hf_effi.callbacks import ForecastCallback
from hf_effi.errors import RefusedError
from hf_effi.functional import schedules as ours
from hf_effi.functional.learning_curve import forecast
from hf_effi.functional.schedules.planner_loss import LossCurve, fit_annealing_law

BATCH, LENGTH = 16, 32
FLAT = 0.05


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        seen (`int`): Updates up to which a curve is seen; it ends after four times as many.
        every (`int`): Updates between two evaluations.
        seeds (`tuple[int, ...]`): Of the curves.
        schedules, standing (`int`): Schedules that fall, and that stand.
    """

    seen: int = 120
    every: int = 6
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    schedules: int = 100
    standing: int = 20


WHOLE = Size()
SMOKE = Size(seen=10, every=1, seeds=(0,), schedules=30, standing=4)


def build(width: int, seed: int, length: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Text:
    """Crops of a text at places that depend on a seed and a step alone."""

    def __init__(self, length: int, batch: int, held_out: int) -> None:
        self.train, self.valid, _ = corpus()
        self.length, self.count = length, batch
        self.held_out = self.crops(self.valid, held_out, 12345)

    def crops(self, data: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(data) - self.length, (count,), generator=generator)
        return torch.stack([data[s : s + self.length] for s in starts.tolist()])

    def batch(self, seed: int, step: int) -> torch.Tensor:
        return self.crops(self.train, self.count, seed * 1_000_003 + step)

    @torch.no_grad()
    def loss(self, model: torch.nn.Module) -> float:
        return model(self.held_out, labels=self.held_out).loss.item()


def train(
    model: torch.nn.Module,
    text: Text,
    rates: Sequence[float],
    seed: int,
    every: int,
    look: Callable[[int, float], None],
) -> None:
    """Train with these rates, and call `look(update, norm of the gradient)` every few updates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rates[0], betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = text.batch(seed, step)
        model(tokens, labels=tokens).loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            look(step + 1, norm)


# --- 1: the end of a curve -------------------------------------------------------------------------------------------


def curve(text: Text, rates: Sequence[float], seed: int, every: int) -> LossCurve:
    model, steps, losses = build(48, seed, LENGTH), [], []

    def look(step: int, norm: float) -> None:
        steps.append(step)
        losses.append(text.loss(model))

    train(model, text, rates, seed, every, look)
    return LossCurve(tuple(rates), tuple(steps), tuple(losses))


def ends(text: Text, size: Size) -> Iterator[dict[str, Any]]:
    """Predict the end of each curve from its first quarter."""
    warm, rate = max(1, size.seen // 12), 2e-3
    whole = 4 * size.seen
    for seed in size.seeds:
        rates = [rate * min(1.0, (step + 1) / warm) for step in range(whole)]
        full = curve(text, rates, seed, size.every)
        decayed = [rate * one for one in ours.cosine(size.seen, warmup_steps=warm).trace()]
        other = curve(text, decayed, seed, size.every)
        points = [(t, y) for t, y in zip(full.steps, full.losses, strict=True) if t <= size.seen]
        truth = statistics.fmean(full.losses[-5:])
        since = [(t, y) for t, y in points if t >= warm]  # the callback fits from where the rate stands on
        found = None
        try:
            found = forecast([t for t, _ in since], [y for _, y in since], end=whole, skip_fraction=0.1)
        except RefusedError as error:
            print(f"seed {seed}: {error}")
        prefix = LossCurve(tuple(rates[: size.seen]), tuple(t for t, _ in points), tuple(y for _, y in points))
        law = fit_annealing_law([prefix, other], bootstrap=0)
        annealed = law.losses(rates, [whole])[0]
        yield {
            "part": "end",
            "seed": seed,
            "seen": size.seen,
            "updates": whole,
            "loss": round(truth, 4),
            "last_seen": round(points[-1][1], 4),
            "forecast": None if found is None else round(found.at_end, 4),
            "range": None if found is None else [round(found.at_end_low, 4), round(found.at_end_high, 4)],
            "annealing_law": round(annealed, 4),
            "error_forecast": None if found is None else round(abs(found.at_end - truth) / truth, 5),
            "error_last_value": round(abs(points[-1][1] - truth) / truth, 5),
            "error_annealing_law": round(abs(annealed - truth) / truth, 5),
        }


# --- 2: schedules that fall ------------------------------------------------------------------------------------------

Make = Callable[[torch.optim.Optimizer, int, random.Random], Any]


def _own(name: str, **options: Any) -> Make:
    return lambda optimizer, steps, draw: ours.to_lambda_lr(ours.make_schedule(name, **options).bind(steps), optimizer)


def _hf(name: str, warm: bool = True, **options: Any) -> Make:
    def make(optimizer: torch.optim.Optimizer, steps: int, draw: random.Random) -> Any:
        warmup = draw.randrange(0, steps // 5) if warm else None
        return get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=options or None)

    return make


def _stable(optimizer: torch.optim.Optimizer, steps: int, draw: random.Random) -> Any:
    shape = draw.choice(["1-sqrt", "linear", "cosine"])
    schedule = ours.wsd(
        steps, warmup_fraction=draw.uniform(0, 0.2), decay_fraction=draw.uniform(0.02, 0.5), shape=shape
    )
    return ours.to_lambda_lr(schedule, optimizer)


def _second_group(optimizer: torch.optim.Optimizer, steps: int, draw: random.Random) -> Any:
    late = draw.randrange(steps // 2, steps - 1)
    return of_torch.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1.0 if step < late else 0.5])


def _dip(optimizer: torch.optim.Optimizer, steps: int, draw: random.Random) -> Any:
    late = draw.randrange(steps // 2, steps - 1)
    return of_torch.LambdaLR(optimizer, lambda step: 0.5 if step == late else 1.0)


FALLS: dict[str, Make] = {
    "ours: cosine": _own("cosine", floor=0.1),
    "ours: rex": _own("rex"),
    "ours: infinite": _own("infinite", warmup_fraction=0.1, cooldown_fraction=0.3, constant_ratio=0.5),
    "ours: linear": _own("linear"),
    "ours: wsd": _stable,
    "transformers: linear": _hf("linear"),
    "transformers: cosine": _hf("cosine"),
    "transformers: restarts": _hf("cosine_with_restarts", num_cycles=3),
    "transformers: polynomial": _hf("polynomial"),
    "transformers: inverse square root": _hf("inverse_sqrt", timescale=30),
    "transformers: cosine with a floor": _hf("cosine_with_min_lr", min_lr_rate=0.2),
    "torch: step": lambda o, n, draw: of_torch.StepLR(o, draw.randrange(n // 3, n - 1), 0.5),
    "torch: milestones": lambda o, n, draw: of_torch.MultiStepLR(o, [n // 2, draw.randrange(n // 2 + 1, n - 1)]),
    "torch: exponential": lambda o, n, draw: of_torch.ExponentialLR(o, 0.1 ** (1 / n)),
    "torch: cosine": lambda o, n, draw: of_torch.CosineAnnealingLR(o, n, eta_min=draw.choice([0.0, 1e-4])),
    "torch: one cycle": lambda o, n, draw: of_torch.OneCycleLR(o, 1e-2, n + 1),
    "torch: constant, then linear": lambda o, n, draw: of_torch.SequentialLR(
        o, [of_torch.ConstantLR(o, 1.0), of_torch.LinearLR(o, 1.0, 0.1, n // 3)], [2 * n // 3]
    ),
    "torch: cyclic": lambda o, n, draw: of_torch.CyclicLR(o, 1e-4, 1e-3, n // 6, cycle_momentum=False),
    "torch: plateau": lambda o, n, draw: of_torch.ReduceLROnPlateau(o, patience=2, threshold=FLAT),
    "two groups": _second_group,
    "one low update": _dip,
}
STANDS: dict[str, Make] = {
    "ours: constant": _own("constant"),
    "transformers: constant": _hf("constant", warm=False),
    "transformers: warm-up": _hf("constant_with_warmup"),
    "ours: ended long ago": lambda o, n, draw: ours.to_lambda_lr(
        ours.table(n, values=[1.0] * (n // 10) + [0.3] * (n - n // 10)), o
    ),
}


def _optimizer() -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": [one]} for one in weights], lr=1e-3)


def loss_at(step: int, draw: random.Random) -> float:
    return 2 + 1 / step + draw.gauss(0, 1e-4)


def follow(make: Make, steps: int, seed: int, seer: ForecastCallback | None, folder: str) -> dict[str, Any]:
    """Drive a scheduler, and the callback, through a run; return the rates of each update, forecasts and the stop."""
    draw, noise, optimizer = random.Random(seed), random.Random(seed + 1), _optimizer()
    scheduler = make(optimizer, steps, draw)
    args = TrainingArguments(folder, use_cpu=True, bf16=False, report_to="none")
    state, control = TrainerState(max_steps=steps), TrainerControl()
    state.stateful_callbacks = {}
    parts = {"optimizer": optimizer, "lr_scheduler": scheduler, "model": None}
    rates, forecasts, stop = [], [], None
    every = max(1, steps // 40)
    if seer is not None:
        seer.on_train_begin(args, state, control, **parts)
    for step in range(1, steps + 1):
        rates.append([group["lr"] for group in optimizer.param_groups])
        if seer is not None:
            seer.on_step_begin(args, state, control, **parts)
            seer.on_optimizer_step(args, state, control, **parts)
        optimizer.step()
        by_metric = isinstance(scheduler, of_torch.ReduceLROnPlateau)
        if not by_metric:
            scheduler.step()
        state.global_step = step
        if step % every == 0:
            logs = {"eval_loss": loss_at(step, noise)}
            state.log_history.append({**logs, "step": step})
            if seer is not None:
                seer.on_log(args, state, control, logs=logs, **parts)
                forecasts += [step] if seer.forecast is not None else []
            if by_metric:
                scheduler.step(logs["eval_loss"])
            if control.should_training_stop and stop is None:
                stop = step  # and on, as if nobody had stopped: what the rates would have been
                control.should_training_stop = False
    return {"rates": rates, "forecasts": forecasts, "stop": stop}


def falls_after(rates: Sequence[Sequence[float]], step: int) -> bool:
    """Return whether a group's rate falls below that of update `step` later in the run."""
    return any(later[i] < rate * (1 - 1e-6) for i, rate in enumerate(rates[step - 1]) for later in rates[step:])


def schedules(size: Size) -> Iterator[dict[str, Any]]:
    """Meet schedules that fall and that stand."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, table, count in (("falls", FALLS, size.schedules), ("stands", STANDS, size.standing)):
            for number in range(count):
                name = list(table)[number % len(table)]
                steps = random.Random(number).randrange(80, 800)
                seer = ForecastCallback(stop=FLAT, tolerance=FLAT)
                found = follow(table[name], steps, number, seer, folder)
                rates, stop = found["rates"], found["stop"]
                yield {
                    "part": kind,
                    "schedule": name,
                    "updates": steps,
                    "forecasts": len(found["forecasts"]),
                    "forecasts_before_a_fall": sum(falls_after(rates, step) for step in found["forecasts"]),
                    "stopped_at": stop,
                    "false_stop": stop is not None and falls_after(rates, stop),
                }


# --- all -------------------------------------------------------------------------------------------------------------


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline."""
    of = {part: [row for row in rows if row["part"] == part] for part in ("end", "falls", "stands")}

    def mean(name: str) -> float | None:
        values = [row[name] for row in of["end"] if row[name] is not None]
        return round(statistics.fmean(values), 5) if len(values) == len(of["end"]) else None

    def ratio(one: float | None, other: float | None) -> float | None:
        return round(one / other, 3) if one is not None and other else None

    told = [row for row in of["end"] if row["forecast"] is not None]
    error, last, law = (mean(f"error_{name}") for name in ("forecast", "last_value", "annealing_law"))
    inside = sum(row["range"][0] <= row["loss"] <= row["range"][1] for row in told)
    return [
        headline("forecast_relative_error_at_4x", error, "<= 0.03"),
        headline("forecast_error_over_last_value", ratio(error, last), "<= 0.5"),
        headline("forecast_error_over_annealing_law", ratio(error, law), "<= 1.0"),
        headline("forecast_range_holds_the_end", round(inside / len(of["end"]), 3)),
        headline("false_stops_on_falling_schedules", sum(row["false_stop"] for row in of["falls"]), "<= 0"),
        headline("falling_schedules", len(of["falls"]), ">= 100"),
        headline("forecasts_before_a_fall", sum(row["forecasts_before_a_fall"] for row in of["falls"]), "<= 0"),
        headline(
            "stops_on_standing_schedules",
            round(sum(row["stopped_at"] is not None for row in of["stands"]) / len(of["stands"]), 3),
            ">= 1.0",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part in seconds; nothing is written")
    smoke = parser.parse_args(arguments).smoke
    torch.set_num_threads(1)
    size = SMOKE if smoke else WHOLE
    rows: list[dict[str, Any]] = []
    parts = (
        schedules(size),
        ends(Text(LENGTH, BATCH, 8 if smoke else 192), size),
    )
    for part in parts:
        for row in part:
            rows.append(row)
            print(row, flush=True)
    found = figures(rows)
    for figure in found:
        print(figure)
    if not smoke:
        write_result("forecast", command=command_line("bench.forecast"), seeds=size.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
