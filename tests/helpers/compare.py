"""Compare two training runs to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]

#: entries of `log_history` that measure time or memory, and so differ between two equal runs
VOLATILE_KEYS = frozenset({"step_time", "eval_step_time"})
VOLATILE_PARTS = ("runtime", "per_second", "mem_", "data_wait")


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Return detached copies of all parameters and buffers by name; DDP's and accelerate's wrapping is taken off."""
    while hasattr(model, "module") and isinstance(model.module, torch.nn.Module):
        model = model.module
    return {name: tensor.detach().clone().cpu() for name, tensor in model.state_dict().items()}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _as_weights(side: Any) -> Weights:
    return side if isinstance(side, Mapping) else weights_of(side)


def assert_bitwise_equal(a: Any, b: Any, what: str = "weights") -> None:
    """
    Fail unless every tensor of `a` and `b` (dicts of tensors, or modules) has the same bits.

    Stricter than `torch.equal`: -0.0 differs from 0.0, and a NaN equals itself. The failure names the first tensor
    that differs (in the order of `a`), how many of its elements do, its largest difference, and how many tensors
    differ.
    """
    a, b = _as_weights(a), _as_weights(b)
    if set(a) != set(b):
        raise AssertionError(
            f"{what}: the names differ. Only on the left: {sorted(set(a) - set(b))[:5]}; "
            f"only on the right: {sorted(set(b) - set(a))[:5]}."
        )
    for name in a:
        if (a[name].shape, a[name].dtype) != (b[name].shape, b[name].dtype):
            raise AssertionError(
                f"{what}: {name} is {tuple(a[name].shape)} {a[name].dtype} on the left and "
                f"{tuple(b[name].shape)} {b[name].dtype} on the right."
            )
    differing = [name for name in a if not torch.equal(_bits(a[name]), _bits(b[name]))]
    if not differing:
        return
    name = differing[0]
    left, right = a[name].detach().cpu(), b[name].detach().cpu()
    size = left.element_size()
    unequal = (_bits(left).view(-1, size) != _bits(right).view(-1, size)).any(dim=1)
    gap = (left.double() - right.double()).abs().max().item()
    raise AssertionError(
        f"{what}: {len(differing)} of {len(a)} tensors differ. First: {name}, {int(unequal.sum())} of "
        f"{left.numel()} elements, first at flat index {int(unequal.nonzero()[0])}, max difference {gap:.3e}."
    )


@dataclass
class Run:
    """What a training run left: picklable, so that it can come back from another process."""

    weights: dict[str, torch.Tensor]
    log_history: list[dict[str, Any]] = field(default_factory=list)
    global_step: int = 0


def record_run(trainer: Any) -> Run:
    """Return the weights and the log history of a trainer whose `train()` has returned."""
    return Run(
        weights_of(trainer.model), [dict(entry) for entry in trainer.state.log_history], trainer.state.global_step
    )


def _is_volatile(key: str) -> bool:
    return key in VOLATILE_KEYS or any(part in key for part in VOLATILE_PARTS)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float) and left != left and right != right:
        return True
    return left == right


def compare_runs(run_a: Any, run_b: Any, keys: Sequence[str] | None = None) -> None:
    """
    Fail unless two runs have bitwise equal weights and equal logs.

    Args:
        run_a, run_b ([`Run`] or a trainer after `train()`):
            The runs. The failure calls them left and right.
        keys (`Sequence[str]`, *optional*):
            Entries of `log_history` to compare, exactly. Each must occur at least once. By default every entry that
            does not measure time or memory is compared.
    """
    run_a = run_a if isinstance(run_a, Run) else record_run(run_a)
    run_b = run_b if isinstance(run_b, Run) else record_run(run_b)
    if run_a.global_step != run_b.global_step:
        raise AssertionError(f"the runs took {run_a.global_step} and {run_b.global_step} steps.")
    for key in keys or ():
        if not any(key in entry for entry in run_a.log_history):
            raise AssertionError(f"log_history has no entry {key!r}, so that it compares nothing.")
    if len(run_a.log_history) != len(run_b.log_history):
        raise AssertionError(f"log_history has {len(run_a.log_history)} and {len(run_b.log_history)} entries.")
    for index, (left, right) in enumerate(zip(run_a.log_history, run_b.log_history, strict=True)):
        chosen = keys if keys is not None else sorted({k for k in {*left, *right} if not _is_volatile(k)})
        for key in chosen:
            if (key in left) != (key in right) or not _same(left.get(key), right.get(key)):
                raise AssertionError(
                    f"log_history[{index}] (step {left.get('step')}): {key} is {left.get(key, '<missing>')!r} on the "
                    f"left and {right.get(key, '<missing>')!r} on the right."
                )
    assert_bitwise_equal(run_a.weights, run_b.weights)
