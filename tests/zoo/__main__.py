"""Run a part of the zoo by hand: `python -m tests.zoo CLASS [FEATURE] [AXIS=LEVEL ...]`."""

from __future__ import annotations

import logging
import sys
import warnings

import torch

from .cases import describe
from .run import everything, run_family


def main(arguments: list[str]) -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    name, *rest = arguments
    row = dict(item.split("=") for item in rest if "=" in item)
    keys = [item for item in rest if "=" not in item] or None
    found = [f for f in everything() if name in (f.name, f.model_type, f.kind, "all")]
    wrong = 0
    for family in found:
        for result in run_family(family, [row] if row or len(found) > 1 and "rows" not in rest else None, keys):
            outcome = result.outcome
            wrong += not outcome.ok
            if len(found) < 4 or not outcome.ok or outcome.status == "not built":
                print(
                    f"{family.name} | {result.feature} | {describe(result.row)} | {outcome.status} | {outcome.note} "
                    f"| {outcome.difference:.1e} | {result.seconds:.2f} s",
                    flush=True,
                )
    print(f"{len(found)} classes, {wrong} cells neither equal nor refused")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
