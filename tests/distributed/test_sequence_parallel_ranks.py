"""
The parity table: loss and every gradient equal one rank's, for each P, mode, batch, wrapper and precision.

The bench runs the whole product, 108 cells. Here each pair of levels comes together, and each mode of each P with
every level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from bench.sequence_parallel import MODES, PRECISIONS, SIZES, TOLERANCE, Cell, cells, costs, parity
from tests.helpers import run_distributed
from tests.zoo.design import covering_design

AXES = {
    "place": [f"{size} {mode}" for size in SIZES for mode in MODES],
    "batch": ["plain", "packed", "padded"],
    "precision": list(PRECISIONS),
    "checkpointing": ["no", "yes"],
    "wrapper": ["ddp", "fsdp2"],
}


def in_product(row: Mapping[str, str]) -> bool:
    """Padded rows have one wrapper, with checkpointing."""
    padded = row.get("batch") == "padded"
    return not padded or (row.get("checkpointing") != "no" and row.get("wrapper") != "fsdp2")


def chosen() -> dict[int, list[Cell]]:
    found: dict[int, list[Cell]] = {size: [] for size in SIZES}
    for row in covering_design(AXES, allowed=in_product):
        size, mode = row["place"].split()
        cell = mode, row["batch"], row["precision"], row["checkpointing"] == "yes", row["wrapper"]
        found[int(size)].append(cell)
    return found


def measured() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    dist.init_process_group("gloo")
    return parity(chosen=chosen()), costs()


def test_loss_and_gradients_equal_one_rank(capsys) -> None:
    rows, sizes = run_distributed(measured, 4)[0]
    with capsys.disabled():
        print("\nP mode       batch  prec ckpt wrapper  loss     gradient")
        for row in rows:
            print(
                f"{row['size']} {row['mode']:10} {row['batch']:6} {row['precision']} "
                f"{'yes' if row['checkpointing'] else 'no':4} {row['wrapper']:7} "
                f"{row['loss_error']:8.1e} {row['gradient_error']:8.1e}"
            )
    whole = set(cells())
    assert len(SIZES) * len(whole) == 108 and all(set(cells_of) <= whole for cells_of in chosen().values())
    assert len(rows) == sum(map(len, chosen().values())) >= len(AXES["place"]) * len(AXES["batch"])
    worst = [row for row in rows if max(row["loss_error"], row["gradient_error"]) > TOLERANCE[row["precision"]]]
    assert not worst, worst
    one, two, four = sizes
    assert two["saved_bytes"] < 0.6 * one["saved_bytes"] and four["saved_bytes"] < 0.35 * one["saved_bytes"]
    assert [row["sent_bytes"] for row in sizes] == [row["formula_bytes"] for row in sizes]
