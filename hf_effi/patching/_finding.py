"""The answer to a question about a model, how it is measured, and what all ranks make of theirs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: largest relative difference that is rounding, by the dtype that the model could be run in
ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-3}

#: what a question about a model returns: one tensor, or several by name
Results = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Finding:
    """
    The answer to a question.

    Args:
        gap (`float`, *optional*): Largest relative difference of the two runs; `None` where it could not be measured.
        what (`str`): Which result that is, such as `"the logits"`.
        allowed (`float`): What rounding may be responsible for.
        reason (`str`): Why it could not be measured.
        drawn (`tuple[str, ...]`): Names of the random operations that were met, where the question is about them.
        failed (`bool`): Whether the model ran in the first way and not in the second.
    """

    gap: float | None
    what: str = ""
    allowed: float = 0.0
    reason: str = ""
    drawn: tuple[str, ...] = ()
    failed: bool = False

    @property
    def looked(self) -> bool:
        """Whether there is a measurement."""
        return self.gap is not None

    @property
    def equal(self) -> bool:
        """Whether the two runs agree up to rounding; never true where nothing could be measured."""
        return self.gap is not None and self.gap <= self.allowed

    def __str__(self) -> str:
        if self.failed:
            return f"it does not run the second way: {self.reason}"
        if self.gap is None:
            return f"this could not be measured: {self.reason}"
        return f"{self.what}: a relative difference of {self.gap:.1e}"

    def worst(self, other: Finding) -> Finding:
        """Return the one that speaks more against equality."""
        return max(
            self, other, key=lambda finding: (not finding.equal, math.inf if finding.gap is None else finding.gap)
        )


def named_results(results: Results) -> dict[str, Tensor]:
    """Return the results of a run by name, without their graph."""
    named = {"the results": results} if isinstance(results, Tensor) else dict(results)
    with torch._C.DisableTorchFunction():
        return {name: tensor.detach() for name, tensor in named.items()}


def gap_of(one: Mapping[str, Tensor], other: Mapping[str, Tensor], precision: torch.dtype) -> Finding:
    """
    Measure how far the results of two runs are apart, by `max |a - b| / max |a|` of each.

    Args:
        one, other (`Mapping[str, Tensor]`): Results by name.
        precision (`torch.dtype`): What they were computed in.
    """
    if one.keys() != other.keys():
        return Finding(math.inf, f"the results {sorted(one.keys() ^ other.keys())}", 0.0)
    if precision not in ALLOWED:
        reason = f"the model runs in {str(precision).removeprefix('torch.')} only here, whose rounding hides an effect"
        return Finding(None, reason=reason)
    # A gradient that is zero by symmetry is all rounding: it is measured against the largest of them.
    floor = 1e-6 * max((_largest(t) for name, t in one.items() if name.startswith("the gradient")), default=0.0)
    worst, largest = Finding(0.0, next(iter(one), "nothing"), ALLOWED[precision]), 0.0
    for name, a in one.items():
        gap = _relative(a, other[name], floor)
        if math.isnan(gap):
            return Finding(None, reason=f"{name} are not finite")
        if gap > largest:
            worst, largest = Finding(gap, name, ALLOWED[precision]), gap
    return worst


def show_nothing(results: Mapping[str, Tensor]) -> bool:
    """Whether there is no number but zero: two such runs are alike whatever the model does."""
    return not any(_largest(tensor) for tensor in results.values())


def _largest(tensor: Tensor) -> float:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return values.abs().max().item() if values.numel() else 0.0


def _relative(a: Tensor, b: Tensor, floor: float) -> float:
    if a.shape != b.shape:
        return math.inf
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    if a.is_sparse:  # numbers by token id
        difference, a, b = (t.coalesce().values() for t in (a - b, a, b))
        return _ratio(a, b, difference, floor)
    return _ratio(a, b, a - b, floor)


def _ratio(a: Tensor, b: Tensor, difference: Tensor, floor: float) -> float:
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    scale = max(_largest(a), floor)
    gap = _largest(difference)
    return 0.0 if gap == 0.0 else gap / scale if scale else math.inf


def agreed(finding: Finding) -> Finding:
    """
    Return one finding for all ranks: the worst of those that looked, else the first rank's reason. One collective.

    A rank may hold weights that are not loaded yet (FSDP with `cpu_ram_efficient_loading`); all ranks have to decide
    alike.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return finding
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, finding)
    looked = [f for f in found if f.looked]
    return functools.reduce(Finding.worst, looked) if looked else found[0]
