"""Tables of the docs from `optimizers.json`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from bench.optimizers import ARMS, BASELINE
from hf_effi.report.result_card import markdown_table

#: cards that show several arms
GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(ARMS),
    "adapters": ("soap", "prodigy", "lars", "lamb"),
    "apollo": ("apollo", "apollo_mini"),
}


def table(names: Sequence[str], result: Mapping[str, Any]) -> str:
    """Return one row for each optimizer and model: its best LR, its loss, and the share of AdamW's tokens it needs."""
    rows = []
    for row in result["rows"]:
        if row["part"] != "summary" or row["arm"] not in (BASELINE, *names):
            continue
        gaps = row["loss_minus_adamw_by_seed"]
        sign = (
            "" if row["tokens_share_sign"] == "=" else {"<": "less than ", ">": "more than "}[row["tokens_share_sign"]]
        )
        edge = " (edge of its sweep)" if row["rate_at_edge"] else ""
        rows.append(
            [
                row["arm"],
                f"{row['weights']:,}",
                f"{row['rate']:g}{edge}",
                "diverged" if row["loss"] is None else f"{row['loss']:.3f}",
                "" if row["arm"] == BASELINE else f"{min(gaps):+.3f} to {max(gaps):+.3f}" if gaps else "",
                "1" if row["arm"] == BASELINE else f"{sign}{row['tokens_share']:.2f}",
                f"{row['state_bytes_ratio']:.2f}",
                f"{row['update_seconds_ratio']:.2f}",
            ]
        )
    header = ["optimizer", "weights", "best LR of five", "held-out loss at the end, nats", "minus AdamW's, by seed"]
    header += [
        "tokens to AdamW's loss, over AdamW's",
        "bytes of state, over AdamW's",
        "CPU time of an update, over AdamW's",
    ]
    from bench.render import provenance

    told = "Means over the seeds; the LR was tuned on the first of them."
    return markdown_table(header, rows) + f"\n\n{told}\n\n{provenance(result)}"


VIEWS = {
    **{f"card_{name}": functools.partial(table, (name,)) for name in ARMS},
    **{f"card_{name}": functools.partial(table, names) for name, names in GROUPS.items()},
}
