"""
Run a part of the zoo by hand: `python -m tests.zoo CLASSES [FEATURE ...] [AXIS=LEVEL ...] [--rows]`.

`CLASSES` is a class, a model type, `kind/model_type`, a kind, or `all`. Without levels a single class runs its rows of
the design, several classes the plain row, or with `--rows` theirs.
"""

from __future__ import annotations

import logging
import sys
import warnings

import torch

from .run import everything, run_family


def main(arguments: list[str]) -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    name, *rest = arguments
    row = dict(item.split("=") for item in rest if "=" in item)
    keys = {item for item in rest if "=" not in item and item != "--rows"}
    found = [f for f in everything() if name in (f.name, f.model_type, f.kind, f"{f.kind}/{f.model_type}", "all")]
    single = len(found) < 4
    rows = [row] if row or not (single or "--rows" in rest) else None
    wrong = 0
    for family in found:
        for result in run_family(family, rows, lambda key: not keys or key in keys):
            wrong += not result.outcome.ok
            if single or not result.outcome.ok or result.outcome.status == "not built":
                print(result, flush=True)
    print(f"{len(found)} classes, {wrong} cells neither equal nor refused")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
