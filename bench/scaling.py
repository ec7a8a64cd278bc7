"""Does a scaling law of small runs predict a larger one?

    python -m bench.scaling            # about 7 minutes on one core
    python -m bench.scaling --smoke    # seconds: does every part run; nothing is written

Decoders of six widths are trained from scratch on the source text of Python's standard library with four budgets each,
every run with a warm-up and a linear decay of its own. The law is fitted to all points but those of the widest model;
its predictions for that model are held against what it reached, beside two guesses without a law: the loss of the next
smaller model at the same tokens, and that of the same tokens extrapolated along the widths on a line in log N.
Parameters count without embeddings and head.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench._schema import command_line, headline, write_result
from bench.optimizers import CLIP, build, make, multiplier
from bench.schedules import BATCH, LENGTH, Data
from hf_effi.functional.scaling import fit_scaling_law, held_out_error


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        widths (`tuple[int, ...]`): Of the models, rising; the last one is held out.
        updates (`tuple[int, ...]`): Budgets.
        rate (`float`): Peak learning rate of all.
        seeds (`tuple[int, ...]`): Initial weights and order of the rows.
        bootstrap (`int`): Resampled fits.
    """

    widths: tuple[int, ...] = (16, 32, 48, 64, 80, 112)
    updates: tuple[int, ...] = (125, 250, 500, 1000)
    rate: float = 4e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    bootstrap: int = 200


WHOLE = Size()
SMOKE = Size(widths=(16, 32, 48), updates=(4, 6, 8), seeds=(0,), bootstrap=2)


def run(data: Data, width: int, updates: int, rate: float, seed: int) -> dict[str, Any]:
    """Train one model to the end of its decay."""
    model = build(width, 2, seed)
    optimizer = make("adamw", model, rate)
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * multiplier(step, updates)
        tokens = data.batch(seed, step)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    return {
        "part": "run",
        "width": width,
        "updates": updates,
        "seed": seed,
        "parameters": weights,
        "tokens": updates * BATCH * LENGTH,
        "loss": round(data.loss(model), 5),
    }


def judge(rows: Sequence[dict[str, Any]], size: Size) -> list[dict[str, Any]]:
    """Return one row for each budget of the widest model: what it reached, and what was predicted for it."""
    points = {
        (row["width"], row["updates"]): (row["parameters"], row["tokens"], None)
        for row in rows
        if row["part"] == "run"
    }
    means = {
        key: (n, d, statistics.mean(row["loss"] for row in rows if (row["width"], row["updates"]) == key))
        for key, (n, d, _) in points.items()
    }
    widest, next_one = size.widths[-1], size.widths[-2]
    known = [point for (width, _), point in means.items() if width != widest]
    law = fit_scaling_law(known, bootstrap=size.bootstrap)
    found = []
    for updates in size.updates:
        n, d, loss = means[widest, updates]
        low, high = law.interval(n, d)
        column = [means[width, updates] for width in size.widths[:-1]]
        found.append(
            {
                "part": "held out",
                "updates": updates,
                "loss": round(loss, 4),
                "predicted": round(law.predict(n, d), 4),
                "interval_80": [round(low, 4), round(high, 4)],
                "relative_error": round(abs(law.predict(n, d) - loss) / loss, 5),
                "relative_error_of_the_next_smaller": round(abs(means[next_one, updates][2] - loss) / loss, 5),
                "relative_error_of_a_line": round(abs(_line(column, n) - loss) / loss, 5),
            }
        )
    one_out = held_out_error(list(means.values()))
    constants = {name: getattr(law, name) for name in ("E", "A", "B", "alpha", "beta")}
    return [
        *found,
        {"part": "law", **constants, "leave_one_size_out": max(one_out["leave_one_out"].values(), default=None)},
    ]


def _line(column: Sequence[tuple[float, float, float]], n: float) -> float:
    """Return the loss at `n` on the least-squares line of loss over log N."""
    x = [math.log(point[0]) for point in column]
    slope, offset = statistics.linear_regression(x, [point[2] for point in column])
    return offset + slope * math.log(n)


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: the largest and the mean relative error for the model that was held out."""
    held = [row for row in rows if row["part"] == "held out"]

    def mean(name: str) -> float:
        return round(statistics.mean(row[name] for row in held), 5)

    return [
        headline("scaling_heldout_relative_error", max(row["relative_error"] for row in held), "<= 0.04"),
        headline("mean_relative_error_law", mean("relative_error")),
        headline("mean_relative_error_next_smaller_model", mean("relative_error_of_the_next_smaller")),
        headline("mean_relative_error_line_in_log_size", mean("relative_error_of_a_line")),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part in seconds; nothing is written")
    smoke = parser.parse_args(arguments).smoke
    torch.set_num_threads(1)
    size = SMOKE if smoke else WHOLE
    data = Data()
    if smoke:
        data.held_out = data.held_out[:8]
    rows = []
    for width in size.widths:
        for updates in size.updates:
            rows += [run(data, width, updates, size.rate, seed) for seed in size.seeds]
            print(rows[-1], flush=True)
    rows += judge(rows, size)
    found = figures(rows)
    for figure in found:
        print(figure)
    if not smoke:
        command = command_line("bench.scaling")
        write_result("scaling", command=command, seeds=size.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
