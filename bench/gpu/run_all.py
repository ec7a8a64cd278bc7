"""
Every kernel on one GPU: rooflines of the card, then correctness, time and peak memory against what users have today.

`python -m bench.gpu.run_all`: under eight minutes on one H200-class GPU; writes `bench/results/kernels_gpu.json`.
`python -m bench.gpu.run_all --dry-run-cpu`: the whole script on tiny sizes without a GPU; its figures mean nothing,
and it writes to a temporary folder. What is not installed is left out, with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from bench._schema import RESULTS, command_line, headline, write_result
from bench.gpu._cases import CASES
from bench.gpu._measure import Bench, Figures, table

GOALS = {
    "all_results_correct": "= 1",
    # Columns filtered, a tenth of them active; below the bare products, as exact cannot be.
    "lm_head_fwd_bwd_ms": "<= 35",
    "lora_layer_speedup": ">= 1.10",
    "low_bit_lora_fp8_cosine_of_dx_4096": ">= 0.998",
    "low_bit_lora_fp8_speedup_4096": ">= 1.3",
    "low_bit_lora_fp8_speedup_16384": ">= 1.3",
    "tiled_mlp_vs_checkpoint": "<= 1.03",
    "tiled_mlp_speedup_over_liger": ">= 1.15",
    "tiled_mlp_peak_vs_liger": "<= 1.1",
    "sparse_24_ffn_speedup": ">= 1.15",
}


def measure(bench: Bench) -> Figures:
    """
    Run the cases in order of weight; leave out those that would start too late, and those that fail, with the error.
    """
    figures: Figures = {}
    for case in CASES:
        if bench.is_late():
            bench.skip(case.__name__, "all", f"over {bench.limit_seconds:g} s")
            continue
        torch.manual_seed(0)
        try:
            figures |= case(bench)
        except Exception as error:  # the figures of the other cases are kept
            traceback.print_exc()
            bench.skip(case.__name__, "all", f"{type(error).__name__}: {error}")
            figures["failed_cases"] = figures.get("failed_cases", 0.0) + 1.0
    return figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run-cpu", action="store_true", help="tiny sizes on the CPU; no figure is kept")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--limit-seconds", type=float, default=420.0, help="start no further case after this time")
    parser.add_argument(
        "--output", type=Path, help="folder for the JSON; default: bench/results, a dry run's: temporary"
    )
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1.")
    if not args.dry_run_cpu and not torch.cuda.is_available():
        parser.error("no GPU here. `--dry-run-cpu` exercises the script without one.")
    folder = args.output or (Path(tempfile.mkdtemp(prefix="kernels_dry_run_")) if args.dry_run_cpu else RESULTS)
    if args.dry_run_cpu and folder.resolve() == RESULTS:
        parser.error(f"a dry run's figures mean nothing: --output must not be {RESULTS}.")
    device = torch.device("cpu" if args.dry_run_cpu else "cuda")
    warm_up, repeats = (0, 1) if args.dry_run_cpu else (3, args.repeats)
    bench = Bench(device, warm_up, repeats, args.limit_seconds)
    figures = measure(bench)
    names = [*GOALS, *(name for name in figures if name not in GOALS)]
    headlines = [headline(name, figures.get(name), GOALS.get(name)) for name in names]
    path = write_result(
        "kernels_gpu_dry_run" if args.dry_run_cpu else "kernels_gpu",
        command=command_line("bench.gpu.run_all"),
        seeds=[0],
        headline=headlines,
        rows=bench.rows,
        folder=folder,
    )
    print(table(bench.rows))
    for item in headlines:
        print(f"{item['name']}: {item['value']} (goal {item['goal']}, met {item['met']})")
    print(path)
    return 0 if figures.get("all_results_correct") == 1.0 and "failed_cases" not in figures else 1


if __name__ == "__main__":
    sys.exit(main())
