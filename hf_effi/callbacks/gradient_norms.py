"""`GradientNormsCallback`: records the L1 and L2 norms of the gradient, as it is before clipping."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.run_folder import calling_trainer
from ..errors import RefusedError
from ..functional import metrics
from ..functional.gradient_norms import GradientNorms, sum_norms, unclipped
from ._engines import is_fsdp2, sharding_engine
from ._turns import MEASURE, WRITE, TurnCallback, in_turn
from .observer import describe, only_observes
from .owners import Role
from .probing import outside_probes, trained_steps, trained_total

logger = logging.getLogger(__name__)
STATE_KEY = "hf_effi.gradient_norms"


class GradientNormsCallback(TurnCallback):
    """
    Record the L1 and the L2 norm of the whole gradient of an update: what [`refined_by_gradient_norm`] makes the next
    run's schedule of.

    Formula: `||g||_1 = sum_i |g_i|`, `||g||_2`, with `g` as it leaves the last backward: accumulated over the
    micro-batches, averaged over the processes, without the factor of a loss scaler, and before the Trainer clips. The
    L2 norm is the Trainer's own; the L1 norm is measured after clipping and divided by what clipping multiplied by.
    Paper: When, Why and How Much? (2310.07831).

    It changes nothing of the run. With each training loss it logs the means since the last one, `effi/gradient_l1` and
    `effi/gradient_l2`. Updates whose gradient is not finite are left out, as are those that a search tries and undoes.

    Args:
        every_steps (`int`, *optional*, defaults to 1): Record every so many updates, at least 1.

    Attributes:
        norms ([`GradientNorms`] or `None`): The record so far; `None` while it is empty. It is kept over a resume.

    Where the norms cannot be had in a run, it says so once, and the run goes on.

    Raises:
        ValueError: an argument out of range.
        RefusedError: DeepSpeed, FSDP1 or tensor parallelism. FSDP2 and DDP work.

    Example:
    ```python
    recorder = GradientNormsCallback()
    Trainer(model, args, train_dataset=rows, callbacks=[recorder]).train()
    schedule = refined_by_gradient_norm(recorder.norms)
    ```
    """

    role = Role("gradient norms", "Two callbacks record the norms of the gradient", "Keep one.")
    in_recipe = False

    def __init__(self, every_steps: int = 1) -> None:
        if isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1:
            raise ValueError(f"every_steps={every_steps!r} must be an integer of at least 1.")
        self.every_steps = every_steps
        self._trainer: Any = None
        self._sharded = False
        self._before: Any = None
        self._measured: tuple[torch.Tensor, Any] | None = None
        self._record = _empty()

    @property
    def norms(self) -> GradientNorms | None:
        return read_norms(self._record)

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        engine = sharding_engine(args)
        if engine is not None and not (engine == "FSDP" and is_fsdp2()):
            raise RefusedError(
                f"GradientNormsCallback adds up the gradients of the parameters, and with {engine} they are not to "
                "be had there. Train with FSDP2 (fsdp_version 2), with DDP or on one device."
            )
        self._let_go()
        self._record = _empty()
        stored = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
        if stored is not None:
            self._resume(stored)
        state.stateful_callbacks[STATE_KEY] = self._record
        self._sharded = engine is not None
        self._hold_on(calling_trainer(state))

    @only_observes
    def _resume(self, stored: dict[str, Any]) -> None:
        read_norms(stored)  # raises on what is damaged
        for name in self._record:
            self._record[name] = stored[name]

    @only_observes
    def _hold_on(self, trainer: Any) -> None:
        """Note the norm that the Trainer takes before it clips; no event hands it over."""
        if trainer is None:
            raise RefusedError("no Trainer called it, and only the Trainer knows the norm before clipping")
        taken: Callable[..., Any] = trainer._get_grad_norm

        def noting(*args: Any, **kwargs: Any) -> Any:
            self._before = norm = taken(*args, **kwargs)
            return norm

        trainer._get_grad_norm = noting
        self._trainer = trainer

    @in_turn(MEASURE)
    @outside_probes
    @only_observes
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before, self._before = self._before, None
        if self._trainer is None or (trained_steps(state) + 1) % self.every_steps:
            return
        if before is None:
            raise RefusedError("the Trainer took no norm of the gradient in this update")
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        sums = _over_shards(gradients, args.world_size) if self._sharded else torch.stack(sum_norms(gradients))
        self._measured = (sums, before)

    @only_observes
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Only now, when the optimizer's work is under way, is the device waited for.
        if self._measured is None:
            return
        (sums, before), self._measured = self._measured, None
        absolute, squares = sums.tolist()
        l2 = float(before.full_tensor() if isinstance(before, DTensor) else before)
        l1 = unclipped(absolute, squares, l2) if math.isfinite(l2) and math.isfinite(squares) else math.nan
        if math.isfinite(l1):
            record = self._record
            record["total"] = trained_total(state)  # now that every callback has said which updates it tries
            record["updates"].append(trained_steps(state))
            record["l1"].append(float(f"{l1:.7g}"))
            record["l2"].append(float(f"{l2:.7g}"))

    @in_turn(WRITE)
    @only_observes
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, record = kwargs["logs"], self._record
        first, record["logged"] = record["logged"], len(record["l1"]) if "loss" in logs else record["logged"]
        if record["logged"] == first:
            return
        for name, key in (("l1", metrics.GRADIENT_L1), ("l2", metrics.GRADIENT_L2)):
            recent = record[name][first:]
            logs[key] = state.log_history[-1][key] = sum(recent) / len(recent)

    @only_observes
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()

    # ---- helpers ----

    def stop_observing(self, error: Exception) -> None:
        """Say why nothing more is recorded: what only observes ends no run."""
        self._let_go()
        logger.warning(f"GradientNormsCallback records no more, and the run goes on: {describe(error)}")

    def _let_go(self) -> None:
        if self._trainer is not None:
            self._trainer.__dict__.pop("_get_grad_norm", None)
        self._trainer = self._before = self._measured = None


def _empty() -> dict[str, Any]:
    return {"updates": [], "l1": [], "l2": [], "total": 0, "logged": 0}


def read_norms(record: dict[str, Any]) -> GradientNorms | None:
    """
    Return the norms that a checkpoint keeps of a run, `None` where there are none yet.

    Raises:
        ValueError: they are damaged.
    """
    try:
        if not record["updates"]:
            return None
        lists = {name: tuple(float(value) for value in record[name]) for name in ("l1", "l2")}
        return GradientNorms(tuple(int(update) for update in record["updates"]), int(record["total"]), **lists)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The record of gradient norms is damaged: {describe(error)}.") from error


def _over_shards(gradients: list[torch.Tensor], processes: int) -> torch.Tensor:
    """Return both sums over the shards of all processes; each element counts once, however many processes have it."""
    copies: dict[int, list[torch.Tensor]] = {}
    for gradient in gradients:
        parts = 1
        if isinstance(gradient, DTensor):
            for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
                if placement.is_partial():
                    raise RefusedError("a gradient is not yet added up over the processes")
                parts *= size if placement.is_shard() else 1
            gradient = gradient.to_local()
        copies.setdefault(processes // parts, []).append(gradient)
    sums = torch.stack([torch.stack(sum_norms(part)) / count for count, part in copies.items()]).sum(0)
    torch.distributed.all_reduce(sums)
    return sums
