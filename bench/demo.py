"""EffiGRPOTrainer against TRL's GRPOTrainer over several seeds: `python -m bench.demo --seeds 5`.

Writes `bench/results/demo.json` and leaves the report page and the model in `bench/cache/demo`. Interrupt it at any
time: seeds that are done are kept. A seed is the unit, because its arms take turns and are only comparable together.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

for _name, _value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(_name, _value)

from bench._schema import ROOT, command_line, write_result  # noqa: E402  (the threads are set before torch is loaded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each arm")
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "cache" / "demo")
    args = parser.parse_args()

    from hf_effi.demo.arms import ARMS
    from hf_effi.demo.command import run_demo
    from hf_effi.demo.run import DemoSettings
    from hf_effi.demo.table import render_table
    from hf_effi.report.comparison import summarize

    settings = DemoSettings() if args.steps is None else replace(DemoSettings(), steps=args.steps)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    result = run_demo(args.cache, settings, seeds, arms=ARMS, command=command_line("bench.demo"))
    print(render_table(summarize(result["rows"])))
    keys = ("command", "seeds", "headline", "rows")
    print(write_result("demo", **{key: result[key] for key in keys}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
