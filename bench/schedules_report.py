"""What the finished runs of `bench.schedules` say: tables, noise, loss law, bound, branches and callback overhead."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerState, TrainingArguments

from bench import schedules as bench
from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.functional import schedules as S
from hf_effi.functional.schedules.planner_bound import omega
from hf_effi.functional.schedules.planner_loss import LossCurve, fit_annealing_law, fit_multi_power_law

#: two-sided 5 % quantile of Student's t with two degrees of freedom, for three paired seeds
T_CRITICAL = 4.303
REFERENCE = "wsd 1-sqrt 20%"
#: schedules that are the same family of curve by construction, or whose plateau has no end
FITTED = "cosine to 0"
TRAINER_OVERHEAD = "callback_overhead_fraction_trainer"


def _final(results: bench.Results, name: str, budget: int, seed: int) -> dict[str, Any] | None:
    peak = _peak(results, name, budget)
    return results.find(stage="final", schedule=name, budget=budget, seed=seed, peak_lr=peak)


def _peak(results: bench.Results, name: str, budget: int) -> float:
    rows = [r for r in results.payload["rows"] if r["stage"] == "tune" and r["schedule"] == name]
    rows = [r for r in rows if r["budget"] == budget]
    return min(rows, key=lambda r: r["loss"])["peak_lr"]


def comparison(results: bench.Results) -> list[dict[str, Any]]:
    """Mean and spread over seeds, and the paired difference to the reference with its significance."""
    table = []
    for budget in bench.BUDGETS:
        reference = [_final(results, REFERENCE, budget, seed) for seed in bench.SEEDS]
        for name in bench.SCHEDULES:
            rows = [_final(results, name, budget, seed) for seed in bench.SEEDS]
            if None in rows or None in reference:
                continue
            losses = [row["loss"] for row in rows]
            paired = [row["loss"] - base["loss"] for row, base in zip(rows, reference, strict=True)]
            mean, spread = statistics.mean(paired), statistics.stdev(paired)
            exceeds = abs(mean) > T_CRITICAL * spread / len(paired) ** 0.5 if spread else False
            table.append(
                {
                    "stage": "table",
                    "schedule": name,
                    "budget": budget,
                    "peak_lr": rows[0]["peak_lr"],
                    "mean": round(statistics.mean(losses), 4),
                    "sd": round(statistics.stdev(losses), 4),
                    "minus_reference": round(mean, 4),
                    "minus_reference_sd": round(spread, 4),
                    "exceeds_noise": exceeds,
                }
            )
    return table


def law_errors(results: bench.Results) -> list[dict[str, Any]]:
    """
    Fit on cosine runs of the long budget, predict every other schedule's curve: first where all share one peak LR,
    which is the laws' own setting, then each at its tuned peak LR.
    """
    budget = bench.BUDGETS[-1]
    pool = [r for r in results.payload["rows"] if r["stage"] in ("final", "tune") and r["budget"] == budget]
    shared: list[dict[str, Any]] = []
    # The peak LR and the seeds for which runs of all schedules exist.
    for peak in sorted({r["peak_lr"] for r in pool}):
        for seed in sorted({r["seed"] for r in pool}):
            rows = [r for r in pool if r["peak_lr"] == peak and r["seed"] == seed]
            if {r["schedule"] for r in rows} == set(bench.SCHEDULES):
                shared += rows
    peaks = [r["peak_lr"] for r in shared]
    most = max(set(peaks), key=peaks.count) if peaks else None
    shared = [r for r in shared if r["peak_lr"] == most]
    tuned = [r for name in bench.SCHEDULES for s in bench.SEEDS if (r := _final(results, name, budget, s))]
    table = []
    for kind, rows in (("one peak LR", shared), ("each its tuned peak LR", tuned)):
        curves = {name: [_curve(r) for r in rows if r["schedule"] == name] for name in bench.SCHEDULES}
        if curves[FITTED]:
            table += [{**row, "peaks": kind} for row in _errors_of_laws(curves, budget)]
    return table


def _curve(row: dict[str, Any]) -> LossCurve:
    budget = row["budget"]
    etas = tuple(row["peak_lr"] * m for m in bench.SCHEDULES[row["schedule"]](budget).trace())
    points = [(int(s), y) for s, y in row["curve"] if s > 0.1 * budget]
    return LossCurve(etas, tuple(s for s, _ in points), tuple(y for _, y in points))


def _errors_of_laws(curves: dict[str, list[LossCurve]], budget: int) -> list[dict[str, Any]]:
    laws = {"annealing": fit_annealing_law(curves[FITTED]), "multi-power": fit_multi_power_law(curves[FITTED])}
    table = []
    for kind, law in laws.items():
        for name, tested in curves.items():
            errors, finals = [], []
            for curve in tested:
                predicted = law.losses(curve.etas, curve.steps)
                errors += [abs(a - b) for a, b in zip(predicted, curve.losses, strict=True)]
                finals.append(predicted[-1] - curve.losses[-1])
            if errors:
                row = {"stage": "law", "law": kind, "fitted_on": FITTED, "schedule": name, "budget": budget}
                row.update(runs=len(tested), peak_lr=round(max(tested[0].etas), 6))
                row["mean_abs_error"] = round(statistics.mean(errors), 4)
                row["final_error"] = round(statistics.mean(finals), 4)
                table.append(row)
    return table


def bound_against_found(results: bench.Results) -> list[dict[str, Any]]:
    """Best peak LR that tuning found, beside the one the bound carries over from the reference."""
    table = []
    for budget in bench.BUDGETS:
        anchor = omega(bench.SCHEDULES[REFERENCE](budget).trace()).best_lr
        for name, build in bench.SCHEDULES.items():
            predicted = _peak(results, REFERENCE, budget) * omega(build(budget).trace()).best_lr / anchor
            row = {"stage": "bound", "schedule": name, "budget": budget, "predicted_lr": float(f"{predicted:.3g}")}
            table.append({**row, "found_lr": _peak(results, name, budget)})
    return table


def callback_overhead(repeats: int = 2000) -> dict[str, Any]:
    """Time that the callback adds to an update, over the time of an update of a 10M-parameter model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=320,
        intermediate_size=896,
        num_hidden_layers=7,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 2048, (8, 64))

    def update() -> float:
        start = time.process_time()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    steps = [update() for _ in range(12)][2:]
    total = 10**9
    args = TrainingArguments("unused", use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    state = TrainerState(max_steps=total, stateful_callbacks={})
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    schedulers = {}
    for kind in ("stock", "ours"):
        own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        own.step()
        schedulers[kind] = torch.optim.lr_scheduler.LambdaLR(own, lambda step: max(0.0, 1 - step / total))
    callback = LRScheduleCallback(S.wsd(warmup_steps=10, decay_fraction=0.2))
    callback.on_train_begin(args, state, control, lr_scheduler=schedulers["ours"])
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(repeats):
        for kind, scheduler in schedulers.items():
            start = time.perf_counter()
            scheduler.step()
            if kind == "ours":
                callback.on_step_end(args, state, control)
            seconds[kind].append(time.perf_counter() - start)
    added = statistics.median(seconds["ours"]) - statistics.median(seconds["stock"])
    update_seconds = statistics.median(steps)
    return {
        "stage": "overhead",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_update": tokens.numel(),
        "update_seconds": round(update_seconds, 4),
        "added_seconds": round(added, 8),
        "fraction": round(max(0.0, added) / update_seconds, 8),
        "method": "median of alternated scheduler steps over the median CPU time of an update",
    }


def summarise(results: bench.Results) -> None:
    """Replace the derived rows and the headline, save and print."""
    derived = ("setup", "table", "law", "bound", "overhead")
    digest = results.payload.pop("corpus_sha256", None) or results.digest
    raw = [row for row in results.payload["rows"] if row["stage"] not in derived]
    results.payload["rows"] = raw
    table, laws, bounds = comparison(results), law_errors(results), bound_against_found(results)
    overhead = callback_overhead()
    branches = [row for row in raw if row["stage"] == "branch"]
    headline = [{"name": "callback_overhead_fraction", "value": overhead["fraction"], "goal": 0.005}]
    headline[0]["met"] = headline[0]["value"] < headline[0]["goal"]
    if branches:
        ends = sorted({row["end"] for row in branches})
        steps = max(row["steps_so_far"] for row in branches)
        headline.append(
            {"name": "branch_total_steps_ratio", "value": round(steps / sum(ends), 4), "goal": None, "met": None}
        )
    for suffix, peaks in (("", "one peak LR"), ("_other_peak", "each its tuned peak LR")):
        errors = [
            r["mean_abs_error"]
            for r in laws
            if r["law"] == "annealing" and r["schedule"] != FITTED and r["peaks"] == peaks
        ]
        if errors:
            value = round(statistics.mean(errors), 4)
            headline.append({"name": f"loss_law_mean_abs_error{suffix}", "value": value, "goal": None, "met": None})
    # Measured by a flag of its own, from its own runs.
    headline += [h for h in results.payload.get("headline", []) if h["name"] == TRAINER_OVERHEAD]
    results.payload["headline"] = headline
    setup = {
        "stage": "setup",
        "corpus": "top-level modules of the Python standard library, ASCII bytes",
        "corpus_sha256": digest,
        "parameters": sum(p.numel() for p in bench.build(0).parameters()),
        "tokens_per_update": bench.BATCH * bench.LENGTH,
        "held_out_tokens": 384 * bench.LENGTH,
        "cpu_seconds": round(sum(row.get("cpu_seconds", 0.0) for row in raw), 1),
    }
    results.payload["rows"] = [setup, *table, *laws, *bounds, overhead, *raw]
    results.save()
    for row in table:
        print(
            f"{row['budget']:4d} {row['schedule']:16s} peak {row['peak_lr']:.4g} loss {row['mean']:.4f} "
            f"(sd {row['sd']:.4f}) minus WSD {row['minus_reference']:+.4f} (sd {row['minus_reference_sd']:.4f}) "
            f"{'exceeds noise' if row['exceeds_noise'] else 'within noise'}"
        )
    for row in laws + bounds + branches + [overhead] + headline:
        print(row)
