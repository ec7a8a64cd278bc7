"""The parity table: loss and every gradient equal one rank's, for each P, mode, batch, wrapper and precision."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from bench.sequence_parallel import TOLERANCE, cells, costs, parity
from tests.helpers import run_distributed


def measured() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    dist.init_process_group("gloo")
    return parity(), costs()


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
    assert len(rows) == 2 * len(list(cells())) == 108
    worst = [row for row in rows if max(row["loss_error"], row["gradient_error"]) > TOLERANCE[row["precision"]]]
    assert not worst, worst
    one, two, four = sizes
    assert two["saved_bytes"] < 0.6 * one["saved_bytes"] and four["saved_bytes"] < 0.35 * one["saved_bytes"]
    assert [row["sent_bytes"] for row in sizes] == [row["formula_bytes"] for row in sizes]
