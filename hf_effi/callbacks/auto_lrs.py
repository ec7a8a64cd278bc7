"""`AutoLRSCallback`: search the LR of each stage by short probes and Bayesian optimisation, on a stock Trainer."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._compat import require
from ..functional.schedules import ScheduleError, apply_multiplier
from ..functional.schedules._checks import check_number, check_steps
from ..functional.schedules.adaptive import extrapolate_exponential
from .adaptive_lr import refuse_sharded
from .lr_schedule import check_scheduler
from .snapshot import restore_snapshot, take_snapshot

STATE_KEY = "hf_effi.auto_lrs"


def propose_lr(tried: list[tuple[float, float]], low: float, high: float, kappa: float, seed: int) -> float:
    """
    Next LR to probe: the lowest `mu - kappa sigma` of a Gaussian process over log LR, on a grid of 101.

    A function of its arguments alone, so the search resumes from the list of pairs. The first LR is the middle.

    Args:
        tried (`list[tuple[float, float]]`): Pairs of LR and predicted loss; a broken probe has 1e6.
        low, high (`float`): Range.
        kappa (`float`): Weight of the uncertainty.
        seed (`int`): Seed of the optimiser of the kernel's parameters.
    """
    grid = [low * (high / low) ** (i / 100) for i in range(101)]
    if not tried:
        return grid[50]
    fresh = [lr for lr in grid if all(abs(math.log(lr / old)) > 1e-9 for old, _ in tried)]
    gp = require("sklearn.gaussian_process", "AutoLRS")
    usable = [y for _, y in tried if y < 1e6]
    if not usable:
        return min(fresh)
    # A broken probe counts as clearly worse than the worst usable one, without flattening the rest.
    worst = max(usable) + max(max(usable) - min(usable), 0.1)
    x = [[math.log(lr)] for lr, _ in tried]
    y = [min(value, worst) for _, value in tried]
    kernel = gp.kernels.Matern(length_scale=1.0, length_scale_bounds=(0.1, 10.0), nu=2.5)
    kernel = kernel + gp.kernels.WhiteKernel(1e-3, (1e-6, 1.0))
    model = gp.GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
    with warnings.catch_warnings():
        # A kernel parameter at its bound is expected with so few points.
        warnings.simplefilter("ignore")
        mean, deviation = model.fit(x, y).predict([[math.log(lr)] for lr in fresh], return_std=True)
    scores = [float(m) - kappa * float(s) for m, s in zip(mean, deviation, strict=True)]
    return fresh[scores.index(min(scores))]


class AutoLRSCallback(TrainerCallback):
    """
    AutoLRS: before each stage of `stage_steps` updates, `probes` LRs are tried for `stage_steps / probes` updates each,
    their losses extrapolated to the end of the stage, and the stage then runs at the best one.

    Weights, optimizer and random numbers are put back exactly after each probe. Probe updates count in the Trainer's
    `max_steps` and consume data (as the method says, as much as they search for); `useful_steps` counts the others.
    Paper: Jin et al., AutoLRS (2105.10762).

    Args:
        low, high (`float`): Range of LRs, from a range test.
        stage_steps (`int`, *optional*, defaults to 1000): Updates of a stage (tau).
        probes (`int`, *optional*, defaults to 10): LRs tried for each stage.
        max_stage_steps (`int`, *optional*, defaults to 8000): Stages double until this length.
        kappa (`float`, *optional*, defaults to 2.0): Exploration of the search; the authors' code has 1e6, which is
            pure exploration.
        seed (`int`, *optional*, defaults to 0): Seed of the search.

    Raises:
        ImportError: scikit-learn is not installed (`pip install 'hf_effi[adaptive]'`).
        ScheduleError: sharded parameters, several processes, a schedule in the training arguments, a bad value.
    """

    def __init__(
        self,
        low: float,
        high: float,
        stage_steps: int = 1000,
        probes: int = 10,
        max_stage_steps: int = 8000,
        kappa: float = 2.0,
        seed: int = 0,
    ) -> None:
        check_number("high", high, 0.0, math.inf, low_open=True)
        check_number("low", low, 0.0, high, low_open=True, high_open=True)
        check_steps("probes", probes, 1)
        check_steps("stage_steps", stage_steps, probes, "A probe has at least one update.")
        check_steps("max_stage_steps", max_stage_steps, stage_steps)
        check_number("kappa", kappa, 0.0, math.inf)
        require("sklearn.gaussian_process", "AutoLRS")
        self.low, self.high, self.probes, self.kappa, self.seed = low, high, probes, kappa, seed
        self.max_stage_steps = max_stage_steps
        self.progress: dict[str, Any] = {
            "stage": 0,
            "stage_steps": stage_steps,
            "phase": "probe",
            "done": 0,
            "tried": [],
            "lr": None,
            "losses": [],
            "useful_steps": 0,
            "history": [],
        }
        self._snapshot: dict[str, Any] | None = None
        self._micro: list[float] = []
        self._handle: Any = None

    @property
    def probe_steps(self) -> int:
        """Updates of one probe."""
        return self.progress["stage_steps"] // self.probes

    @staticmethod
    def _file(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "hf_effi_auto_lrs.pt"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_sharded(args, "AutoLRSCallback")
        if args.world_size > 1:
            raise ScheduleError("AutoLRSCallback runs on one process. Use LRScheduleCallback with several.")
        check_scheduler(kwargs["lr_scheduler"])
        kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if kind != "constant" or args.warmup_steps:
            raise ScheduleError("AutoLRSCallback sets the LR. Use lr_scheduler_type='constant' and no warmup_steps.")
        if state.global_step > 0:
            if STATE_KEY not in state.stateful_callbacks:
                raise ScheduleError("The checkpoint was trained without AutoLRSCallback; its search cannot go on.")
            self.progress = state.stateful_callbacks[STATE_KEY]
            if self.progress["phase"] == "probe":
                # In the middle of a search the weights to go back to are not those of the checkpoint.
                # Only tensors and plain containers are in the file, but numpy's RNG state is an array.
                self._snapshot = torch.load(self._file(args, state), map_location=args.device, weights_only=False)
        self._micro = []
        self._handle = kwargs["model"].register_forward_hook(self._note_loss)
        if state.global_step == 0:
            self._begin_stage(state, **kwargs)

    def _note_loss(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
        if module.training and loss is not None:
            self._micro.append(loss.detach().item())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler = kwargs["lr_scheduler"]
        apply_multiplier(scheduler, self.progress["lr"] / scheduler.base_lrs[0])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._micro:
            raise ScheduleError("The model returns no loss, which AutoLRS needs. Pass labels in the batch.")
        progress = self.progress
        progress["losses"].append(sum(self._micro) / len(self._micro))
        progress["done"] += 1
        self._micro = []
        if progress["phase"] == "probe" and progress["done"] == self.probe_steps:
            self._end_probe(args, state, **kwargs)
        elif progress["phase"] == "run":
            progress["useful_steps"] += 1
            if progress["done"] == progress["stage_steps"]:
                if 2 * progress["stage_steps"] <= self.max_stage_steps:
                    progress["stage_steps"] *= 2
                progress["stage"] += 1
                self._begin_stage(state, **kwargs)
        state.stateful_callbacks[STATE_KEY] = progress

    def _begin_stage(self, state: TrainerState, **kwargs: Any) -> None:
        progress = self.progress
        progress.update(done=0, losses=[], tried=[])
        left = state.max_steps - state.global_step
        if left < self.probes * self.probe_steps + 1 and progress["lr"] is not None:
            # Too little is left to search and then to use the result.
            progress["phase"] = "run"
            return
        progress["phase"] = "probe"
        progress["lr"] = propose_lr([], self.low, self.high, self.kappa, self.seed)
        self._snapshot = take_snapshot(kwargs["model"], kwargs["optimizer"])

    def _end_probe(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        progress = self.progress
        predicted = extrapolate_exponential(progress["losses"], progress["stage_steps"])
        progress["tried"].append([progress["lr"], predicted])
        # Each probe sees other data but the same random numbers (dropout), so probes differ by their LR and their data.
        restore_snapshot(self._snapshot, kwargs["model"], kwargs["optimizer"], rng=True)
        progress.update(done=0, losses=[])
        tried = [tuple(pair) for pair in progress["tried"]]
        if len(tried) < self.probes:
            progress["lr"] = propose_lr(tried, self.low, self.high, self.kappa, self.seed + len(tried))
            return
        progress["lr"] = min(tried, key=lambda pair: pair[1])[0]
        progress["phase"] = "run"
        progress["history"].append({"step": state.global_step, "lr": progress["lr"], "tried": progress["tried"]})
        self._snapshot = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save and self._snapshot is not None:
            torch.save(self._snapshot, self._file(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle.remove()
