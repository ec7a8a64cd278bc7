"""Optimizers against AdamW, each with its learning rate tuned by the same number of values, at full decay.

    python -m bench.optimizers            # about 30 minutes on one core
    python -m bench.optimizers --smoke    # seconds: does every part run; nothing is written

Small decoders are trained from scratch on the source text of Python's standard library, in two sizes. Each optimizer
gets five learning rates, a factor of 2 apart, on one seed; the best one is then run with three seeds at two budgets,
each with a warm-up and a linear decay to zero of its own, since optimizers can be compared at the end of a decay only.
Rows, order and initial weights are the same for all.

The figure is the share of AdamW's tokens that an optimizer needs for AdamW's final loss: below 1 it is faster. It is a
compute-equivalent gain (`hf_effi.functional.referee`): loss and budget lie on a straight line between the two budgets,
both logarithmic; a share outside of them is not told but bounded. The headline is the larger share of the two sizes:
the smaller speed-up.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench._schema import command_line, figure_again, headline, write_result
from bench.schedules import LENGTH, Data
from hf_effi.functional.referee import compute_equivalent_gain
from hf_effi.optim import optimizer_report, parameter_groups
from hf_effi.optim.names import find_factory

BASELINE = "adamw"
WEIGHT_DECAY, BETAS, CLIP, WARMUP = 0.1, (0.9, 0.95), 1.0, 0.1


@dataclass(frozen=True)
class Arm:
    """
    One optimizer.

    Args:
        rates (`tuple[float, ...]`): Learning rates that are tried; the same number for each.
        options (`dict`): Arguments of its factory.
    """

    rates: tuple[float, ...]
    options: dict[str, Any]


def _rates(first: float) -> tuple[float, ...]:
    return tuple(first * 2**i for i in range(5))


ARMS: dict[str, Arm] = {
    BASELINE: Arm(_rates(1e-3), {"betas": BETAS}),
    "nadamw": Arm(_rates(1e-3), {"betas": BETAS}),
    "muon": Arm(_rates(2e-3), {"betas": BETAS}),
    "mars_m": Arm(_rates(2e-3), {"betas": BETAS}),
    "soap": Arm(_rates(4e-3), {"betas": (0.95, 0.95)}),
    "prodigy": Arm(_rates(0.125), {"betas": BETAS}),
    "lamb": Arm(_rates(1.6e-2), {"betas": BETAS}),
    "lars": Arm(_rates(0.125), {"trust_coefficient": 0.02}),
    "apollo": Arm(_rates(8e-3), {"rank": 16, "betas": BETAS}),
    "apollo_mini": Arm(_rates(2e-3), {"betas": BETAS}),
    "frugal": Arm(_rates(1e-3), {"density": 0.25, "betas": BETAS}),
}


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        models (`tuple`): Width and depth of each model.
        updates (`int`): Of the whole budget.
        budgets (`tuple`): Shares of it, rising, the last one 1.
        seeds (`tuple`): Initial weights and order of the rows.
        held_out (`int`): Rows of an evaluation, at most 384.
    """

    models: tuple[tuple[int, int], ...] = ((64, 2), (96, 3))
    updates: int = 300
    budgets: tuple[float, ...] = (0.6, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int = 256


WHOLE = Size()
SMOKE = Size(models=((32, 1),), updates=6, budgets=(0.5, 1.0), seeds=(0,), held_out=4)


def build(width: int, depth: int, seed: int) -> LlamaForCausalLM:
    """Return a fresh decoder whose embeddings and head are not tied, so that each has its own rule."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make(name: str, model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return the optimizer of an arm."""
    options = ARMS[name].options
    if name == BASELINE:
        groups = parameter_groups(model, lambda role: "adamw", lr=rate, weight_decay=WEIGHT_DECAY)
        return torch.optim.AdamW(groups, lr=rate, fused=True, **options)
    return find_factory(name)(model, lr=rate, weight_decay=WEIGHT_DECAY, **options)


def multiplier(step: int, updates: int) -> float:
    """Return the LR of an update, from 0, as a share of the peak: warm-up, then linear to zero."""
    warm = max(1, round(WARMUP * updates))
    return (step + 1) / warm if step < warm else (updates - step) / (updates - warm)


def run(data: Data, name: str, rate: float, shape: tuple[int, int], seed: int, updates: int) -> dict[str, Any]:
    """Train one model to the end of its decay."""
    model = build(*shape, seed)
    optimizer = make(name, model, rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps, wholes = [], []
    for step in range(updates):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * multiplier(step, updates)
        begin = time.process_time()
        tokens = data.batch(seed, step)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        middle = time.process_time()
        optimizer.step()
        steps.append(time.process_time() - middle)
        optimizer.zero_grad()
        wholes.append(time.process_time() - begin)
        if not math.isfinite(loss.item()):
            break
    final = data.loss(model)
    return {
        "arm": name,
        "width": shape[0],
        "depth": shape[1],
        "rate": rate,
        "seed": seed,
        "updates": updates,
        "loss": round(final, 4) if math.isfinite(final) else None,
        "state_bytes": optimizer_report(optimizer).state_bytes,
        "weights": sum(p.numel() for p in model.parameters()),
        "optimizer_seconds": round(statistics.median(steps), 6),
        "update_seconds": round(statistics.median(wholes), 6),
    }


def study(data: Data, name: str, shape: tuple[int, int], size: Size) -> list[dict[str, Any]]:
    """Tune one optimizer on one model, then run it with all seeds and budgets."""
    rows = []
    for rate in ARMS[name].rates:
        rows.append({"part": "sweep", **run(data, name, rate, shape, size.seeds[0], size.updates)})
    best = min((row for row in rows if row["loss"] is not None), key=lambda row: row["loss"], default=rows[0])
    for share in size.budgets:
        updates = round(share * size.updates)
        for seed in size.seeds:
            if share == 1.0 and seed == size.seeds[0]:
                rows.append({**best, "part": "budget"})
            else:
                rows.append({"part": "budget", **run(data, name, best["rate"], shape, seed, updates)})
    print(f"{name} {shape}: rate {best['rate']:g}, loss {best['loss']}", flush=True)
    return rows


# --- figures ---------------------------------------------------------------------------------------------------------


def share_of_tokens(own: dict[int, float], baseline: dict[int, float]) -> tuple[float, str]:
    """
    Return the share of the baseline's tokens that is needed for its final loss, and `"="`, or `"<"` or `">"` where it
    lies outside of the budgets that were run.

    Args:
        own, baseline (`dict[int, float]`): Updates -> mean final loss, for the same budgets.

    Example:
    ```python
    >>> share_of_tokens({50: 2.0, 100: 1.0}, {50: 3.0, 100: 2.0})
    (0.5, '=')
    >>> share_of_tokens({50: 3.5, 100: 3.0}, {50: 3.0, 100: 2.0})
    (2.0, '=')
    ```
    """
    small, large = min(own), max(own)
    if not math.isfinite(own[large]):
        return round(large / small, 3), ">"

    def share(curve: dict[int, float], loss: float) -> tuple[float, str]:
        """Return the share of the whole budget at which a curve of final losses has this loss."""
        points = [(float(updates), value) for updates, value in curve.items() if math.isfinite(value)]
        found = None if len(points) < 2 else compute_equivalent_gain(points, float(large), loss)
        return (small / large, "<") if found is None else (found, "=")

    if own[large] <= baseline[large]:
        found, sign = share(own, baseline[large])
        return round(found, 3), sign
    # Slower: how little of its budget the baseline needs for what this one has at the end.
    found, sign = share(baseline, own[large])
    return round(1 / found, 3), ">" if sign == "<" else "="


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each arm and model: mean losses, share of AdamW's tokens, state and time."""
    budgets = [row for row in rows if row["part"] == "budget"]
    shapes = sorted({(row["width"], row["depth"]) for row in budgets})
    found = []
    for shape in shapes:
        curves = {}
        for name in dict.fromkeys(row["arm"] for row in budgets):
            of = [row for row in budgets if row["arm"] == name and (row["width"], row["depth"]) == shape]
            curves[name] = {
                updates: statistics.mean(math.inf if row["loss"] is None else row["loss"] for row in group)
                for updates in sorted({row["updates"] for row in of})
                for group in [[row for row in of if row["updates"] == updates]]
            }
            base = [row for row in budgets if row["arm"] == BASELINE and (row["width"], row["depth"]) == shape]
            share, sign = share_of_tokens(curves[name], curves[BASELINE])
            last = max(curves[name])
            gaps = [
                round(row["loss"] - other["loss"], 4)
                for row in of
                for other in base
                if row["updates"] == other["updates"] == last and row["seed"] == other["seed"] and row["loss"]
            ]
            rates = ARMS[name].rates
            found.append(
                {
                    "part": "summary",
                    "arm": name,
                    "width": shape[0],
                    "depth": shape[1],
                    "weights": of[0]["weights"],
                    "rate": of[0]["rate"],
                    "rate_at_edge": of[0]["rate"] in (rates[0], rates[-1]),
                    "loss": round(curves[name][last], 4) if math.isfinite(curves[name][last]) else None,
                    "loss_minus_adamw_by_seed": gaps,
                    "tokens_share": share,
                    "tokens_share_sign": sign,
                    "state_bytes_ratio": round(of[0]["state_bytes"] / base[0]["state_bytes"], 3),
                    "update_seconds_ratio": round(
                        statistics.median(row["update_seconds"] for row in of)
                        / statistics.median(row["update_seconds"] for row in base),
                        3,
                    ),
                }
            )
    return found


def figures(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: for each optimizer the larger share of tokens of the sizes, and its state over AdamW's."""
    lines = []
    for name in dict.fromkeys(row["arm"] for row in found):
        if name == BASELINE:
            continue
        of = [row for row in found if row["arm"] == name]
        lines.append(headline(f"{name}_tokens_ratio_to_adamw_loss", max(row["tokens_share"] for row in of), "<= 1"))
        lines.append(headline(f"{name}_state_bytes_ratio", max(row["state_bytes_ratio"] for row in of)))
    return lines


def _judged(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    measured = [row for row in rows if row["part"] != "summary"]
    found = summary(measured)
    return figures(found), [*measured, *found]


def run_all(size: Size, names: Sequence[str]) -> list[dict[str, Any]]:
    data = Data()
    data.held_out = data.held_out[: size.held_out]
    rows = [row for shape in size.models for name in names for row in study(data, name, shape, size)]
    return [*rows, *summary(rows)]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part in seconds; nothing is written")
    parser.add_argument("--report", action="store_true", help="only compute the figures again, from the finished runs")
    options = parser.parse_args(arguments)
    smoke = options.smoke
    if options.report:
        return figure_again("optimizers", _judged)
    torch.set_num_threads(1)
    size = SMOKE if smoke else WHOLE
    rows = run_all(size, list(ARMS))
    found = figures([row for row in rows if row["part"] == "summary"])
    for figure in found:
        print(figure)
    if not smoke:
        command = command_line("bench.optimizers")
        write_result("optimizers", command=command, seeds=size.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
