"""What a run did, in a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..functional import metrics

#: the trainer's name of a phase -> what the summary and the report call it
PHASES = dict(zip(metrics.PHASES, ("generation", "reward", "log-probs", "training"), strict=True))


def time_parts(totals: Mapping[str, Any]) -> dict[str, float]:
    """
    Return part -> seconds: the time of the steps split into the trainer's own phases where it tells them.

    Less than 1 % is no part of its own and goes into `other`.

    Example:
    ```python
    >>> time_parts({"seconds": {"train": 9.0, "data": 1.0}, "phases": {"gen": 6.0, "train": 2.5}})
    {'generation': 6.0, 'training': 2.5, 'data': 1.0, 'other': 0.5}
    ```
    """
    seconds = dict(totals.get("seconds", {}))
    phases, step = totals.get("phases", {}), seconds.pop("train", 0.0)
    parts = {word: phases.get(name, 0.0) for name, word in PHASES.items()}
    parts["whole step" if not phases else "other"] = max(0.0, step - sum(parts.values()))
    for name, value in seconds.items():
        parts[name] = parts.get(name, 0.0) + value
    whole = sum(parts.values())
    small = [name for name, value in parts.items() if name != "other" and value < 0.01 * whole]
    parts["other"] = parts.pop("other", 0.0) + sum(parts.pop(name) for name in small)
    return {name: value for name, value in parts.items() if value >= 0.005}


def summary_lines(run: Mapping[str, Any]) -> list[str]:
    """
    Return the lines for a record from [`read_run`]; those that it has nothing for are left out.

    Example:
    ```python
    >>> totals = {"seconds": {"train": 9.0, "data": 1.0}, "drops": {"pruned": 6}}
    >>> totals["rows"] = {"generated": 24, "trained": 18}
    >>> print("\\n".join(summary_lines({"progress": {"step": 3}, "totals": totals})))
    ***** hf_effi: 3 steps in 10.0 s (whole step 90 %, data 10 %) *****
      completions: 24 generated, 18 trained on; dropped: pruned 6
    ```
    """
    totals = run["totals"]
    whole = sum(totals.get("seconds", {}).values())
    shares = sorted(time_parts(totals).items(), key=lambda item: -item[1])
    split = ", ".join(f"{part} {100 * value / whole:.0f} %" for part, value in shares if value >= 0.01 * whole > 0)
    step = run.get("progress", {}).get("step", 0)
    lines = [f"***** hf_effi: {step} steps in {whole:,.1f} s ({split}) *****"]
    rows = totals.get("rows", {})
    if rows.get("generated"):
        drops = ", ".join(
            f"{reason.replace('_', ' ')} {n:,}" for reason, n in sorted(totals.get("drops", {}).items()) if n
        )
        line = f"  completions: {rows['generated']:,} generated, {rows.get('trained', 0):,} trained on"
        lines.append(line + (f"; dropped: {drops}" if drops else ""))
    if ratio := totals.get("tokens_forwarded_per_real_token"):
        lines.append(f"  tokens: {totals['tokens']['forwarded']:,} forwarded, {ratio:.2f} for each real one")
    peaks = totals.get("peak_memory_bytes", {})
    if peaks:
        lines.append("  peak memory: " + ", ".join(f"{where} {n / 2**30:.2f} GiB" for where, n in peaks.items()))
    return lines
