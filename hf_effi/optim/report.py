"""Which parameter follows which rule of an optimizer, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """
    One parameter in an [`OptimizerReport`].

    Args:
        name (`str`): Its name.
        shape (`tuple[int, ...]`): Its shape; of the shard under FSDP2, what the whole tensor has.
        rule (`str`): What its group says, e.g. `"muon"`.
        lr, weight_decay (`float`): Of its group now.
        state_bytes (`int`): Of its state now; 0 before the first update.
        role, reason (`str`): What it is, and why; empty where the optimizer was not made by a factory of ours.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    lr: float
    weight_decay: float
    state_bytes: int
    role: str
    reason: str


@dataclasses.dataclass(frozen=True)
class OptimizerReport:
    """
    Which parameter follows which rule, and why. `print` shows it as a table; `rows` are for programs.

    Args:
        optimizer (`str`): Name of its class.
        rows (`tuple[ReportRow, ...]`): One for each parameter.
    """

    optimizer: str
    rows: tuple[ReportRow, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(row.state_bytes for row in self.rows)

    def rules(self) -> dict[str, int]:
        """Number of scalars for each rule."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.rule] = counts.get(row.rule, 0) + _numel(row.shape)
        return counts

    def __str__(self) -> str:
        head = ("parameter", "shape", "rule", "lr", "decay", "state", "what it is")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        shares = ", ".join(f"{rule}: {count:,} weights" for rule, count in self.rules().items())
        return "\n".join([f"{self.optimizer}: {shares}; state {self.state_bytes:,} bytes", *table])


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _cells(row: ReportRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "1"
    what = ": ".join(part for part in (row.role, row.reason) if part)
    return row.name, shape, row.rule, f"{row.lr:.3g}", f"{row.weight_decay:.3g}", f"{row.state_bytes:,}", what


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate and DeepSpeed; one of a user may wrap one too."""
    while hasattr(optimizer, "optimizer") and type(optimizer).__module__.startswith(("accelerate.", "deepspeed.")):
        optimizer = optimizer.optimizer
    return optimizer


def state_bytes(state: Any) -> int:
    """Return the bytes of the tensors in the state of one parameter."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(state_bytes(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(state_bytes(value) for value in state)
    return 0


def report_of(holder: Any) -> OptimizerReport:
    """Read the [`OptimizerReport`] of a trainer or an optimizer."""
    optimizer = holder
    if not isinstance(holder, torch.optim.Optimizer) and hasattr(holder, "args"):
        optimizer = holder.optimizer
        if optimizer is None:
            raise ValueError("The trainer has no optimizer yet: it is made when training begins. Ask after train().")
    inner = innermost(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise ValueError(f"{type(holder).__name__} is neither a trainer nor an optimizer.")
    reasons = getattr(inner, "hf_effi_reasons", {})
    rows = []
    for number, group in enumerate(inner.param_groups):
        names = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            role, reason = reasons.get(name, ("", ""))
            rows.append(
                ReportRow(
                    name,
                    tuple(parameter.shape),
                    str(group.get("rule", type(inner).__name__.lower())),
                    float(group["lr"]),
                    float(group.get("weight_decay", 0.0)),
                    state_bytes(inner.state.get(parameter, {})),
                    role,
                    reason,
                )
            )
    return OptimizerReport(type(inner).__name__, tuple(rows))
