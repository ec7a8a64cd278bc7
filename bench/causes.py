"""What `CausesCallback` costs, whether its rules speak where they should, and what gradients say of worked answers.

    python -m bench.causes            # about 5 minutes of one thread
    python -m bench.causes --quick    # seconds: every part once, nothing is written into results

- cost: one run whose every second update is read, so that read and other updates alternate: CPU seconds of one thread
  from one update to the next, medians. At `every_steps=50` a fiftieth of what a reading adds falls on an update.
- healthy runs: three families, several sizes, optimizers, learning rates, LoRA, accumulation.
- broken runs: one for each rule; two processes of which one sleeps, or both do.
- 4 bits: what rounding the hidden states of each token to 4 bits costs a healthy model, and one with an outlier.
- arithmetic: gradients of the same sums with and without their working (2410.23743), on a tiny model trained on both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from bench import _cause_arithmetic as arithmetic
from bench import _cause_runs as runs
from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi.callbacks import CausesCallback, TrainDoctor
from hf_effi.functional import metrics
from hf_effi.functional.doctor_causes import CAUSE_RULES
from hf_effi.optim.layer_parts import layer_modules

EVERY = 50
PARTS = ("cost", "between readings", "4 bits", "broken run", "arithmetic", "healthy run", "two processes")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    healthy: int = 50
    updates: int = 40
    hidden: int = 192
    rows_of_cost: int = 8
    length_of_cost: int = 64
    trained: int = 120
    broken: tuple[str, ...] = tuple(runs.BROKEN)
    arithmetic: arithmetic.Study = field(default_factory=arithmetic.Study)


QUICK = Sizes(
    seeds=(0,), healthy=3, updates=6, hidden=32, rows_of_cost=4, length_of_cost=16, trained=2,
    arithmetic=arithmetic.Study(updates=2, batch=4, layers=3, hidden=16, rows=2),
)  # fmt: skip
#: of the test of this bench: its broken runs are trained elsewhere in the suite
SMOKE = dataclasses.replace(QUICK, healthy=1, updates=5, broken=("layer_dead",))


class Clock(TrainerCallback):
    """CPU seconds from the begin of one update to that of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def cost(sizes: Sizes, seed: int) -> dict[str, Any]:
    """Return the CPU seconds of updates that are read, and of those between them."""
    rows = runs.text_rows(seed, sizes.rows_of_cost * 4, sizes.length_of_cost)
    model = runs.build(seed, "qwen3", 4, sizes.hidden)
    clock = Clock()
    runs.train(
        model, rows, clock, CausesCallback(2), max_steps=sizes.updates,
        per_device_train_batch_size=sizes.rows_of_cost, seed=seed,
    )  # fmt: skip
    read, other = clock.seconds[2::2], clock.seconds[1::2]  # the first one pays for allocations
    one, plain = statistics.median(read), statistics.median(other)
    return {
        "part": "cost", "seed": seed, "read_seconds": round(one, 5), "other_seconds": round(plain, 5),
        "reading_over_update": round(one / plain, 4), "update_ratio": round(1 + (one / plain - 1) / EVERY, 5),
    }  # fmt: skip


def between(sizes: Sizes, seed: int) -> dict[str, Any]:
    """Return what an update costs while nothing is read, over one without the callback; runs alternate."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    for turn in range(4):
        for arm in ("with", "without") if turn % 2 else ("without", "with"):
            clock = Clock()
            extra = [CausesCallback(10_000)] if arm == "with" else []
            rows = runs.text_rows(seed, 16)
            runs.train(runs.build(seed), rows, clock, *extra, max_steps=max(4, sizes.updates // 2), seed=seed)
            found[arm] += clock.seconds[1:]
    ratio = statistics.median(found["with"]) / statistics.median(found["without"])
    return {"part": "between readings", "seed": seed, "update_ratio": round(ratio, 4)}


def four_bits(sizes: Sizes, seed: int) -> list[dict[str, Any]]:
    """Return the loss of a trained model as it is and with hidden states in 4 bits: healthy, and with an outlier."""
    found = []
    for name, size in (("healthy", None), ("outlier", 3.0)):
        model = runs.build(seed, "llama", 4, 64)
        if size is not None:
            runs.give_it_an_outlier(model, size)
        over = {"max_steps": sizes.trained, "learning_rate": 3e-3, "logging_steps": 20}
        callback = CausesCallback(20)
        runs.train(model, runs.text_rows(seed, 256), callback, **over)
        tokens = torch.stack([row["input_ids"] for row in runs.text_rows(1000 + seed)])
        whole, rounded = _loss(model, tokens), _loss(model, tokens, 4)
        kurtosis = max(value for key, value in callback.latest.items() if key.startswith(metrics.CAUSE_KURTOSIS))
        found.append(
            {
                "part": "4 bits", "seed": seed, "model": name, "kurtosis": round(kurtosis, 2),
                "loss": round(whole, 4), "loss_in_4_bits": round(rounded, 4), "gap": round(rounded - whole, 4),
            }
        )  # fmt: skip
    return found


@torch.no_grad()
def _loss(model: Any, tokens: torch.Tensor, bits: int | None = None) -> float:
    model.eval()
    hooks = []
    if bits is not None:
        most = 2 ** (bits - 1) - 1

        def rounded(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            step = hidden.abs().amax(-1, keepdim=True) / most
            kept = (hidden / step).round() * step
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        hooks = [layer.register_forward_hook(rounded) for layer in layer_modules(model).values()]
    loss = float(model(input_ids=tokens, labels=tokens).loss)
    for hook in hooks:
        hook.remove()
    return loss


# --- two processes -------------------------------------------------------------------------------------------------


#: seconds; far longer than an update takes, also where other jobs share the cores
SLEEP = 2.0


class Sleepy(Trainer):
    """A Trainer of which one process sleeps in every forward."""

    slow: dict[int, float] = {}

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        time.sleep(self.slow.get(self.args.process_index, 0.0))
        return super().compute_loss(model, inputs, **kwargs)


def _process(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(1)
    runs.quiet()
    found = {}
    for name, slow in (("even", {0: SLEEP, 1: SLEEP}), ("slow", {1: SLEEP})):
        Sleepy.slow = slow
        doctor = TrainDoctor(say=lambda sentence: None)
        runs.train(
            runs.build(0), runs.text_rows(0), CausesCallback(4), doctor, trainer=Sleepy, max_steps=13, logging_steps=4,
            per_device_train_batch_size=4, ddp_find_unused_parameters=False, ddp_broadcast_buffers=False,
        )  # fmt: skip
        found[name] = [finding.rule for finding in doctor.findings if finding.rule in _causes()]
    if rank == 0:
        Path(folder, "found.pickle").write_bytes(pickle.dumps(found))


def two_processes() -> dict[str, list[str]]:
    """Return which rules speak on two processes: both slow, and one of them."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(_process, (port, folder), nprocs=2)
        return pickle.loads(Path(folder, "found.pickle").read_bytes())


def _causes() -> set[str]:
    return {rule.__name__ for rule in CAUSE_RULES}


# --- all of it -----------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, processes: bool = True, only: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of the result, or those of one part."""

    def wanted(part: str) -> bool:
        return only in (None, part)

    rows: list[dict[str, Any]] = []
    for seed in sizes.seeds:
        rows += [cost(sizes, seed)] if wanted("cost") else []
        rows += [between(sizes, seed)] if wanted("between readings") else []
        rows += four_bits(sizes, seed) if wanted("4 bits") else []
        rows += [
            {"part": "broken run", "seed": seed, "for": rule, "found": runs.broken_rules(rule, seed)}
            for rule in (sizes.broken if wanted("broken run") else ())
        ]
        rows += arithmetic.measured(sizes.arithmetic, seed) if wanted("arithmetic") else []
    for name, make, over in runs.healthy_runs(sizes.healthy if wanted("healthy run") else 0):
        found = runs.rules_found(make(), runs.text_rows(over["seed"]), **over)
        rows.append({"part": "healthy run", "run": name, "found": found})
    if processes and wanted("two processes"):
        told = two_processes()
        rows.append({"part": "two processes", "run": "both slow", "for": None, "found": told["even"]})
        rows.append({"part": "two processes", "run": "one slow", "for": "straggler", "found": told["slow"]})
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline of the rows."""

    def of(part: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["part"] == part]

    two = of("two processes")
    broken = of("broken run") + [row for row in two if row["for"]]
    healthy = of("healthy run") + [row for row in two if not row["for"]]
    alone = [row["found"] == [row["for"]] for row in broken]
    gaps = {name: [row["gap"] for row in of("4 bits") if row["model"] == name] for name in ("healthy", "outlier")}
    kinds: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in of("arithmetic"):
        kinds.setdefault(f"{row['seed']} {row['module']}", {}).setdefault(row["answers"], []).append(row)
    pairs = [(pair["answer only"][0], pair["worked"][0]) for pair in kinds.values()]
    seeds = sorted({row["seed"] for row in of("arithmetic")})

    def larger(measure: str) -> float:
        """The least of the seeds' mean ratios over the modules."""
        return min(
            statistics.fmean(one[measure] / other[measure] for one, other in pairs if one["seed"] == seed)
            for seed in seeds
        )

    return [
        headline(
            "causes_update_ratio_at_every_50", statistics.median(row["update_ratio"] for row in of("cost")), "<= 1.02"
        ),
        headline("causes_reading_over_update", statistics.median(row["reading_over_update"] for row in of("cost"))),
        headline(
            "causes_update_ratio_between_readings",
            statistics.median(row["update_ratio"] for row in of("between readings")),
        ),
        headline("causes_healthy_runs", len(healthy)),
        headline("causes_false_alarms", sum(bool(row["found"]) for row in healthy), "<= 0"),
        headline("causes_rules_that_fired", len({row["for"] for row in broken if row["for"] in row["found"]}), ">= 6"),
        headline("causes_broken_runs_with_their_rule_alone", sum(alone) / len(alone), ">= 1"),
        headline("four_bit_loss_gap_healthy", round(statistics.median(gaps["healthy"]), 4)),
        headline("four_bit_loss_gap_with_an_outlier", round(statistics.median(gaps["outlier"]), 4)),
        headline("gradient_mad_answer_only_over_worked", round(larger("mad"), 3), ">= 1"),
        headline("gradient_nuclear_answer_only_over_worked", round(larger("nuclear_mean"), 3)),
        headline("gradient_relative_mad_answer_only_over_worked", round(larger("relative_mad"), 3)),
    ]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every part once; writes nothing into results")
    parser.add_argument("--part", choices=PARTS, help="measure one part anew, and keep the other rows of the result")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs.quiet()
    sizes = QUICK if args.quick else Sizes()
    rows = measure(sizes, processes=not args.quick, only=args.part)
    if args.part:
        kept = json.loads((folder / "causes.json").read_text(encoding="utf-8"))["rows"]
        rows = [row for row in kept if row["part"] != args.part] + rows
    if args.quick and folder == RESULTS:
        folder = Path(tempfile.mkdtemp(prefix="hf_effi_causes_quick_"))
    command = command_line("bench.causes")
    path = write_result("causes", command=command, seeds=sizes.seeds, headline=figures(rows), rows=rows, folder=folder)
    print(path)
    return path


if __name__ == "__main__":
    main()
