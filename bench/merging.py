"""
Merging what a run has saved: LoRA on another kind of text, at a constant rate and with a decay to zero.

    python -m bench.merging
    python -m bench.merging --smoke --output FOLDER  # seconds, learns nothing

A decoder is trained on the bytes of Python's standard library, then adapted by LoRA of rank 16 on all linear layers to
the language reference in `pydoc_data/topics.py`, by the stock Trainer with a checkpoint every 16 updates. From the
folders of each run: the last checkpoint; uniform means of 3, 5, 10 and 20; weights by loss and by step; the trend; and
searched coefficients, which see a search set and a second set. All losses are of a third set. Then interpolation
with the base (loss on old and on new text), and the mean of the runs of all seeds. The learning rate of each schedule
is tuned for its last checkpoint, on a seed that is not counted.

Last the delta: the base is trained on the reference ("tuned"), and on the modules of `encodings` ("trained on"), all
weights, at a low and at a high rate. What the tuned model learnt is added to the base that was trained on, and stands
beside the tuned model that was trained on itself.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from bench._progress import with_line
from bench._schema import RESULTS, command_line, headline, write_result
from bench.adalora import PRETRAIN_UPDATES, ReferenceData
from bench.schedules import BATCH, LENGTH, Data, build, make_optimizer, train
from hf_effi.checkpoint import WeightFolder, average_runs, interpolate, plan_average, search_coefficients
from hf_effi.functional import schedules as S
from hf_effi.functional.merging import add_delta, combine

SEEDS, TUNING_SEED = (0, 1, 2), 100
SCHEDULES = ("constant", "linear")
#: of full training on: the weights move little, and far
FULL_RATES = (3e-4, 1e-3)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Size:
    """How much is trained and scored."""

    pretrain: int = PRETRAIN_UPDATES
    updates: int = 320
    every: int = 16
    rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2)
    budget: int = 64
    rows: int = 384
    full_updates: int = 200
    seeds: tuple[int, ...] = SEEDS


SMOKE = Size(pretrain=2, updates=4, every=1, rates=(5e-3,), budget=8, rows=8, full_updates=2, seeds=(0,))

#: arm -> (how many checkpoints, kind, penalty)
ARMS: dict[str, tuple[int, str, float | None]] = {
    "last": (1, "uniform", None),
    "uniform 3": (3, "uniform", None),
    "uniform 5": (5, "uniform", None),
    "uniform 10": (10, "uniform", None),
    "uniform 20": (20, "uniform", None),
    "loss^4 of 20": (20, "loss", 4.0),
    "loss^16 of 20": (20, "loss", 16.0),
    "step^4 of 5": (5, "step", 4.0),
    "step^4 of 20": (20, "step", 4.0),
    "trend 10": (10, "trend", None),
}
SEARCHED = "searched of 8"
_OF_SEARCH = 8


class Splits(ReferenceData):
    """Three sets of rows of the held-out text that share nothing: for the search, to confirm it, and to report."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        third = len(self.valid) // 3
        parts = [self.valid[place * third : (place + 1) * third] for place in range(3)]
        draws = [torch.Generator().manual_seed(777 + place) for place in range(3)]
        self.search, self.second, self.held_out = (
            self._crops(part, rows, draw) for part, draw in zip(parts, draws, strict=True)
        )


def adapted(weights: dict[str, Tensor], seed: int) -> Any:
    base = build(0)
    base.load_state_dict(weights)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def fine_tune(
    data: Splits, weights: dict[str, Tensor], schedule: str, lr: float, seed: int, size: Size, to: Path
) -> Path:
    """Train the adapter and leave its checkpoints in a folder."""
    model = adapted(weights, seed)
    rows = [
        {"input_ids": row, "labels": row} for step in range(size.updates) for row in data.batch(seed, step).unbind()
    ]
    args = TrainingArguments(
        str(to), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        save_strategy="steps", save_steps=size.every, save_only_model=True, logging_steps=max(1, size.every // 4),
        max_steps=size.updates, per_device_train_batch_size=BATCH, train_sampling_strategy="sequential",
        learning_rate=lr, lr_scheduler_type="constant" if schedule == "constant" else "linear", weight_decay=0.0,
        seed=seed,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows)
    with_line(trainer, f"{schedule}, lr {lr:g}, seed {seed}").train()
    return to


def loss_on(model: Any, rows: Tensor) -> Callable[[dict[str, Tensor]], float]:
    """Return the loss on some rows as a function of an adapter."""

    @torch.no_grad()
    def loss(state: dict[str, Tensor]) -> float:
        set_peft_model_state_dict(model, state)
        return model(rows, labels=rows).loss.item()

    return loss


def arms_of(run: Path, model: Any, data: Splits, size: Size) -> list[dict[str, Any]]:
    """Return the loss of each way to merge the checkpoints of a run, on the set that no search has seen."""
    report, rows = loss_on(model, data.held_out), []
    for arm, (last, kind, penalty) in ARMS.items():
        plan = plan_average(run, last, kind=kind, penalty=penalty)
        folders = [WeightFolder(folder) for folder in plan.folders]
        rows.append({"arm": arm, "loss": report(combine(folders, plan.weights)), "lr_ratio": plan.lr_ratio})
    folders = [WeightFolder(folder) for folder in plan_average(run, _OF_SEARCH, kind="uniform").folders]
    found = search_coefficients(
        folders,
        loss_on(model, data.search),
        confirm_fn=loss_on(model, data.second),
        budget=size.budget,
    )
    rows.append({
        "arm": SEARCHED, "loss": report(combine(folders, found.weights)), "used": found.name,
        "search_gain": min(found.plain.values()) - found.searched_score,
        "unconfirmed_loss": report(combine(folders, found.searched)),
    })  # fmt: skip
    return rows


def pareto(run: Path, base: Path, model: Any, old: Tensor, data: Splits, last: int) -> list[dict[str, Any]]:
    found = interpolate(
        base,
        run / f"checkpoint-{last}",
        ALPHAS,
        eval_fns={"old_loss": loss_on(model, old), "new_loss": loss_on(model, data.held_out)},
    )
    return [{"alpha": row.alpha, **row.scores, "pareto": row.pareto} for row in found.rows]


def mean_of_runs(runs: list[Path], weights: dict[str, Tensor], data: Splits, to: Path) -> float:
    """Return the loss of the exact mean of the adapters of several seeds."""
    from peft import PeftModel

    average_runs(runs, to)
    base = build(0)
    base.load_state_dict(weights)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, to)(data.held_out, labels=data.held_out).loss.item()


class EncodingsData(ReferenceData):
    """Crops of the character tables of Python's `encodings`."""

    def __init__(self, rows: int) -> None:
        root = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
        text = b"\n".join(path.read_bytes() for path in sorted(root.glob("*.py")))
        data = torch.frombuffer(bytearray(b for b in text if b < 128), dtype=torch.uint8).long()
        cut = int(len(data) * 0.9)
        self.train, self.valid = data[:cut], data[cut:]
        self.held_out = self._crops(self.valid, rows, torch.Generator().manual_seed(777))


def trained_on(data: Data, weights: dict[str, Tensor], lr: float, seed: int, updates: int) -> dict[str, Tensor]:
    """Train all weights on some text, to a rate of zero."""
    model = build(0)
    model.load_state_dict(weights)
    optimizer = make_optimizer(model, lr)
    scheduler = S.to_lambda_lr(S.linear(updates, warmup_fraction=0.05), optimizer)
    for step in range(updates):
        rows = data.batch(seed, step)
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def delta_rows(weights: dict[str, Tensor], tuning: Data, other: Data, size: Size) -> list[dict[str, Any]]:
    """Return the losses of the base, its two children, one with the delta of the other, and one after the other."""
    rows, model = [], build(0)
    for lr, seed in itertools.product(FULL_RATES, size.seeds):
        tuned = trained_on(tuning, weights, lr, seed, size.full_updates)
        further = trained_on(other, weights, lr, seed + 1000, size.full_updates)
        models = {
            "base": weights,
            "tuned": tuned,
            "trained on": further,
            "tuned, then trained on": trained_on(other, tuned, lr, seed + 1000, size.full_updates),
        }
        for scale in (0.5, 1.0):
            models[f"trained on + {scale:g} delta"] = {
                name: add_delta(value, tuned[name], weights[name], scale) for name, value in further.items()
            }
        for name, state in models.items():
            model.load_state_dict(state)
            rows.append({
                "part": "delta", "model": name, "seed": seed, "learning_rate": lr,
                "tuned_loss": tuning.loss(model), "other_loss": other.loss(model),
            })  # fmt: skip
    return rows


def study(size: Size, folder: Path) -> list[dict[str, Any]]:
    source, data = Data(), Splits(size.rows)
    old = source.held_out[: size.rows]
    weights = train(source, S.wsd(size.pretrain, warmup_fraction=0.05), 4e-3, 0)["state"]["model"]
    base = folder / "base"
    start: nn.Module = build(0)
    start.load_state_dict(weights)
    start.save_pretrained(base)  # type: ignore[operator]
    model = adapted(weights, 0)
    model.eval()
    rows: list[dict[str, Any]] = []
    for schedule in SCHEDULES:
        tuning = {}
        for lr in size.rates if len(size.rates) > 1 else ():
            run = fine_tune(data, weights, schedule, lr, TUNING_SEED, size, folder / f"{schedule}-tuning-{lr:g}")
            last = WeightFolder(run / f"checkpoint-{size.updates}")
            tuning[f"{lr:g}"] = loss_on(model, data.second)(dict(last))
        lr = float(min(tuning, key=tuning.__getitem__)) if tuning else size.rates[0]
        runs = []
        for seed in size.seeds:
            run = fine_tune(data, weights, schedule, lr, seed, size, folder / f"{schedule}-{seed}")
            runs.append(run)
            about = {"schedule": schedule, "learning_rate": lr, "seed": seed, "tuning": tuning}
            found = arms_of(run, model, data, size)
            rows += [{"part": "merge", **about, **row, "minus_last": row["loss"] - found[0]["loss"]} for row in found]
            rows += [
                {"part": "interpolation", **about, **row} for row in pareto(run, base, model, old, data, size.updates)
            ]
            print(schedule, seed, {row["arm"]: round(row["loss"], 4) for row in found}, flush=True)
        if len(runs) > 1:
            last_ones = [run / f"checkpoint-{size.updates}" for run in runs]
            loss = mean_of_runs(last_ones, weights, data, folder / f"{schedule}-mean")
            rows.append({"part": "runs", "schedule": schedule, "learning_rate": lr, "runs": len(runs), "loss": loss})
    return rows + delta_rows(weights, data, EncodingsData(size.rows), size)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures: mean loss minus that of the last checkpoint, in nats, with the standard error over seeds."""
    figures = []
    for schedule in SCHEDULES:
        for arm in (*ARMS, SEARCHED):
            gaps = [
                row["minus_last"]
                for row in rows
                if row["part"] == "merge" and row["schedule"] == schedule and row["arm"] == arm
            ]
            if arm == "last" or not gaps:
                continue
            name = f"{schedule}_{arm.replace(' ', '_').replace('^', '')}_minus_last"
            figures.append(headline(name, round(statistics.fmean(gaps), 4)))
            if len(gaps) > 1:
                error = statistics.stdev(gaps) / math.sqrt(len(gaps))
                figures.append(headline(f"{name}_standard_error", round(error, 4)))
        singles = [
            r["loss"] for r in rows if r["part"] == "merge" and r["schedule"] == schedule and r["arm"] == "last"
        ]
        of_runs = [row["loss"] for row in rows if row["part"] == "runs" and row["schedule"] == schedule]
        if of_runs:
            gap = of_runs[0] - statistics.fmean(singles)
            figures.append(headline(f"{schedule}_mean_of_runs_minus_one_run", round(gap, 4)))
        kept = [row for row in rows if row["part"] == "interpolation" and row["schedule"] == schedule]
        for alpha in (0.5, 1.0):
            for score in ("old_loss", "new_loss"):
                ends = {row["seed"]: row[score] for row in kept if row["alpha"] == 0}
                change = [row[score] - ends[row["seed"]] for row in kept if row["alpha"] == alpha]
                figures.append(
                    headline(f"{schedule}_{score}_at_{alpha:g}_minus_base", round(statistics.fmean(change), 4))
                )
    for lr, score in itertools.product(FULL_RATES, ("tuned_loss", "other_loss")):
        found: dict[str, list[float]] = {}
        for row in rows:
            if row["part"] == "delta" and row["learning_rate"] == lr:
                found.setdefault(row["model"], []).append(row[score])
        for name in ("trained on", "tuned, then trained on") if found else ():
            gap = statistics.fmean(found["trained on + 1 delta"]) - statistics.fmean(found[name])
            label = name.replace(",", "").replace(" ", "_")
            figures.append(headline(f"delta_{lr:g}_{score}_minus_{label}", round(gap, 4)))
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a test of the script in seconds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of merging.json")
    args = parser.parse_args(arguments)
    if args.smoke and args.output == RESULTS:
        parser.error("--smoke needs --output: its figures are no result.")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size = SMOKE if args.smoke else Size()
    with tempfile.TemporaryDirectory() as folder:
        rows = study(size, Path(folder))
    rows = [{**row, "tokens_per_update": BATCH * LENGTH, "updates": size.updates} for row in rows]
    rounded = [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_result(
        "merging",
        command=command_line("bench.merging"),
        seeds=size.seeds,
        headline=summary(rows),
        rows=rounded,
        folder=args.output,
    )


if __name__ == "__main__":
    main()
