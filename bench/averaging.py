"""Averages of weights along a run, and what Fast Forward tells of its learning rate.

    python -m bench.averaging            # about 8 minutes on one core
    python -m bench.averaging --smoke    # seconds: does every part run; nothing is written

Part "average": a small decoder is trained from scratch on the source text of Python's standard library with a constant
learning rate, at two rates. All averages are of the same run, so that differences within a seed are paired; beside
them stands the run of equal budget whose learning rate decays at the end. An average reaches the live run's final loss
at an update, which is what stopping early saves.

Part "fast forward": LoRA on another kind of text (the language reference in `pydoc_data/topics.py`), at a learning
rate that is too low, one between, and a good one; the walks of `FastForwardCallback` through the stock Trainer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from bench._progress import with_line
from bench._schema import command_line, figure_again, headline, write_result
from bench.adalora import ReferenceData
from bench.schedules import Data, build, make_optimizer
from hf_effi.callbacks import FastForwardCallback
from hf_effi.functional.averaging import RunningAverage, WindowAverage, averaging_weights, ema_rate, trend_weights
from hf_effi.functional.referee import median_cost, time_to_target

ARMS = (
    "ema 0.9",
    "ema 0.98",
    "ema 0.995",
    "uniform 5",
    "uniform 10",
    "uniform 60",
    "trend 10",
    "trend 40",
    "trend 60",
)


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        updates, decay (`int`): Of a run, and of its decay where it has one.
        every (`int`): Updates between two snapshots of a window.
        evaluate (`int`): Updates between two evaluations.
        rates (`tuple`): Constant learning rates.
        seeds (`tuple`): Initial weights and data.
        adapted (`int`): Updates of LoRA.
        adapter_rates (`tuple`): Learning rates of LoRA, the good one last.
        walk (`int`): Updates between two walks.
        held_out (`int`): Rows of an evaluation, at most 384.
    """

    updates: int = 1500
    decay: int = 300
    every: int = 10
    evaluate: int = 75
    rates: tuple[float, ...] = (1e-3, 3e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    adapted: int = 240
    adapter_rates: tuple[float, ...] = (1e-4, 1e-3, 5e-3)
    walk: int = 24
    held_out: int = 384


WHOLE = Size()
SMOKE = Size(
    updates=24, decay=8, every=2, evaluate=8, rates=(3e-3,), seeds=(0,), adapted=6, adapter_rates=(1e-5, 1e-2), walk=2,
    held_out=16,
)  # fmt: skip


# --- averages of one run ---------------------------------------------------------------------------------------------


class Averages:
    """The averages of all arms, of one run."""

    def __init__(self, every: int) -> None:
        self.every, self.updates = every, 0
        self.of: dict[str, Any] = {}
        for arm in ARMS:
            kind, size = arm.split()
            if kind == "ema":
                self.of[arm] = RunningAverage()
            else:
                self.of[arm] = WindowAverage(int(size), trend_weights if kind == "trend" else _uniform)

    def note(self, model: torch.nn.Module) -> None:
        """Look at the weights after one more update."""
        self.updates += 1
        state = dict(model.named_parameters())
        for arm, average in self.of.items():
            kind, size = arm.split()
            if kind == "ema":
                average.blend(state, ema_rate(self.updates, float(size), "bias"))
            elif self.updates % self.every == 0:
                average.push(state)


def _uniform(count: int) -> list[float]:
    return averaging_weights(count, "uniform")


def loss_with(data: Data, model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> float:
    """Return the held-out loss of other weights, and put the model's own back."""
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.load_state_dict(weights, strict=False)
    loss = data.loss(model)
    model.load_state_dict(own, strict=False)
    return loss


def train(
    data: Data, model: torch.nn.Module, optimizer: Any, seed: int, steps: range, each: Callable[[int], None]
) -> None:
    for step in steps:
        tokens = data.batch(seed, step)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        each(step)


def average_run(data: Data, size: Size, rate: float, seed: int) -> list[dict[str, Any]]:
    """Train once with a constant rate and, from the same weights, once with a decay; one row for each arm."""
    model = build(seed)
    optimizer = make_optimizer(model, rate)
    averages, curves = Averages(size.every), {arm: [] for arm in ("last", *ARMS)}
    branch: dict[str, Any] = {}

    def each(step: int) -> None:
        averages.note(model)
        done = step + 1
        if done == size.updates - size.decay:
            branch.update(model=copy.deepcopy(model.state_dict()), optimizer=copy.deepcopy(optimizer.state_dict()))
        if done % size.evaluate == 0:
            curves["last"].append([done, data.loss(model)])
            for arm, average in averages.of.items():
                curves[arm].append([done, loss_with(data, model, average.mean)])

    train(data, model, optimizer, seed, range(size.updates), each)
    model.load_state_dict(branch["model"])
    optimizer.load_state_dict(branch["optimizer"])
    begin = size.updates - size.decay

    def decay(step: int) -> None:
        share = min(1.0, (step + 2 - begin) / size.decay)
        optimizer.param_groups[0]["lr"] = rate * (1 - share**0.5)

    optimizer.param_groups[0]["lr"] = rate * (1 - (1 / size.decay) ** 0.5)
    train(data, model, optimizer, seed, range(begin, size.updates), decay)
    curves["1-sqrt decay"] = [[size.updates, data.loss(model)]]
    # One evaluation of a run with a constant rate is noise: its final loss is the mean of the last three.
    target = statistics.mean(loss for _, loss in curves["last"][-3:])
    return [
        {
            "part": "average",
            "arm": arm,
            "rate": rate,
            "seed": seed,
            "loss": round(target if arm == "last" else curve[-1][1], 4),
            "updates_to_the_live_loss": time_to_target(curve, target, "lower"),
            "curve": [[done, round(loss, 4)] for done, loss in curve],
        }
        for arm, curve in curves.items()
    ]


# --- fast forward ----------------------------------------------------------------------------------------------------


def adapted_run(data: Data, start: dict[str, torch.Tensor], size: Size, rate: float, seed: int) -> dict[str, Any]:
    """Adapt by LoRA with one learning rate, with walks along the updates."""
    model = build(seed)
    model.load_state_dict(start)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    rows = [
        {"input_ids": row, "labels": row} for step in range(size.adapted) for row in data.batch(seed, step).unbind()
    ]
    held_out = [{"input_ids": row, "labels": row} for row in data.held_out[:32].unbind()]
    said = []
    walks = FastForwardCallback(size.walk, longest=32)
    walks._say = lambda args: said.extend([walks.walks[-1][0]] if walks._is_low() else [])  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_steps=size.adapted,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            train_sampling_strategy="sequential",
            learning_rate=rate,
            lr_scheduler_type="constant",
            seed=seed,
        )
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=held_out, callbacks=[walks])
        with_line(trainer, f"LoRA at {rate:g}, seed {seed}", live=False)
        trainer.train()
    model.eval()
    return {
        "part": "fast forward",
        "arm": f"LoRA at {rate:g}",
        "rate": rate,
        "seed": seed,
        "loss": round(data.loss(model), 4),
        "typical_steps": walks.typical_steps,
        "walks": [list(walk) for walk in walks.walks],
        "said_at": said[0] if said else None,
    }


def pretrained(data: Data, size: Size) -> dict[str, torch.Tensor]:
    model = build(0)
    optimizer = make_optimizer(model, 3e-3)
    train(data, model, optimizer, 100, range(size.updates // 3), lambda step: None)
    return model.state_dict()


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(rows: Sequence[dict[str, Any]], size: Size) -> list[dict[str, Any]]:
    """Return the headline: means over seeds and rates, in nats; negative is better than the last weights."""
    averages = [row for row in rows if row["part"] == "average"]
    of = {(row["arm"], row["rate"], row["seed"]): row for row in averages}
    runs = sorted({(row["rate"], row["seed"]) for row in averages})

    def gain(arm: str, other: str) -> float:
        return round(statistics.mean(of[(arm, *run)]["loss"] - of[(other, *run)]["loss"] for run in runs), 4)

    def share(arm: str) -> float | None:
        """Median of the updates until the loss of the live run's end, as a share of the run."""
        reached = median_cost([of[(arm, *run)]["updates_to_the_live_loss"] for run in runs])
        return None if reached is None else round(reached / size.updates, 4)

    found = []
    for name, arm in (("lawa", "uniform 10"), ("ema", "ema 0.98"), ("trend", "trend 40")):
        found += [
            headline(f"{name}_minus_last", gain(arm, "last"), "<= 0"),
            headline(f"{name}_minus_decay", gain(arm, "1-sqrt decay")),
            headline(f"{name}_updates_share_to_live_loss", share(arm), "<= 0.8"),
        ]
    found.append(headline("too_long_uniform_minus_too_long_trend", gain("uniform 60", "trend 60"), ">= 0"))
    low, good = size.adapter_rates[0], size.adapter_rates[-1]
    walked = [row for row in rows if row["part"] == "fast forward"]

    def told(rate: float) -> float:
        return statistics.mean(row["said_at"] is not None for row in walked if row["rate"] == rate)

    found.append(headline("fast_forward_names_the_low_rate", told(low), ">= 1"))
    found.append(headline("fast_forward_names_the_good_rate", told(good), "<= 0"))
    losses = {rate: statistics.mean(row["loss"] for row in walked if row["rate"] == rate) for rate in (low, good)}
    found.append(headline("low_rate_minus_good_rate", round(losses[low] - losses[good], 4), ">= 0"))
    return found


def run_all(size: Size) -> list[dict[str, Any]]:
    data, other = Data(), ReferenceData()
    data.held_out, other.held_out = data.held_out[: size.held_out], other.held_out[: size.held_out]
    rows = [row for rate in size.rates for seed in size.seeds for row in average_run(data, size, rate, seed)]
    start = pretrained(data, size)
    return rows + [adapted_run(other, start, size, rate, seed) for rate in size.adapter_rates for seed in size.seeds]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part in seconds; nothing is written")
    parser.add_argument("--report", action="store_true", help="only compute the figures again, from the finished runs")
    options = parser.parse_args(arguments)
    smoke = options.smoke
    if options.report:
        return figure_again("averaging", lambda rows: (figures(rows, WHOLE), list(rows)))
    torch.set_num_threads(1)
    size = SMOKE if smoke else WHOLE
    rows = run_all(size)
    found = figures(rows, size)
    for figure in found:
        print(figure)
    if not smoke:
        command = command_line("bench.averaging")
        write_result("averaging", command=command, seeds=size.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
