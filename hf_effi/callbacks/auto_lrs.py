"""`AutoLRSCallback`: search the LR of each stage by short probes and Bayesian optimisation, on a stock Trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._compat import require
from .._files import load_state
from ..checkpoint.snapshot import copy_weights, restore_snapshot, take_snapshot
from ..errors import BrokenFileError, MismatchError, RefusedError
from ..functional.kept_arguments import keeps_arguments
from ..functional.options import refuse_idle
from ..functional.probes import is_probed
from ..functional.schedules._checks import check_number, check_steps
from ._lr_factors import LRFactorCallback
from ._lr_search import (
    BROKEN,
    mean_over_ranks,
    predict_loss,
    probe_blocks,
    propose_lr,
    same_on_ranks,
    share_stage,
    validation_loss,
)
from ._side_file import SideFileCallback
from ._turns import MEASURE, WRITE, in_turn
from .adaptive_lr import refuse_sharded
from .lr_schedule import LEARNING_RATE, check_scheduler
from .probing import announce_probes, hold_back, mark_log, store_probes

STATE_KEY = "hf_effi.auto_lrs"
#: validation losses of one probe
_EVALUATIONS = 16


class AutoLRSCallback(LRFactorCallback, SideFileCallback):
    """
    AutoLRS: before each stage of `stage_steps` updates, `probes` LRs are tried for `stage_steps / probes` updates
    each, their losses extrapolated to the end of the stage, and the stage then runs at the best one.

    Weights, optimizer, loss scaler and random numbers are put back exactly after each probe. Probe updates count in
    the Trainer's `max_steps` and consume data (as the method says, as much as they search for); `useful_steps` counts
    the others. After each stage the next one is twice as long; once stages have `max_stage_steps`, probes are judged
    by the validation loss instead of the training loss, measured 16 times a probe. With `probes=1` nothing is probed
    and each stage gets a random LR. With too little of the run left for a search and a whole stage the last LR is
    kept; the first stage is shortened instead.
    Paper: Jin et al., AutoLRS (2105.10762).

    Args:
        low, high (`float`): Range of LRs, from a range test.
        stage_steps (`int`, *optional*, defaults to 1000): Updates of a stage (tau).
        probes (`int`, *optional*, defaults to 10): LRs tried for each stage.
        max_stage_steps (`int`, *optional*, defaults to 8000): Stages double until this length.
        kappa (`float`, *optional*, defaults to 2.0): Exploration of the search; the authors' code has 1e6, which is
            pure exploration.
        seed (`int`, *optional*, defaults to 0): Seed of the search.
        evaluate (`Callable[[Module], float]`, *optional*): Returns the validation loss of a model in evaluation mode;
            [`~AutoLRSCallback.use_eval_dataset`] takes the Trainer's instead.
        validation (`bool`, *optional*, defaults to `True`): `False` judges probes by the training loss to the end.

    Raises:
        MissingPackageError: scikit-learn or scipy is not installed (`pip install 'hf_effi[adaptive]'`).
        ValueError: a bad value, or a run too short for one search.
        RefusedError: sharded parameters, no validation loss, a schedule in the training arguments, or every probe of a
            search broke.
        MismatchError: a checkpoint without a search, or a resume inside of one on another number of processes.
        BrokenFileError: the weights before a search are missing.
    """

    role = LEARNING_RATE
    factor = "auto_lrs"

    @keeps_arguments
    def __init__(
        self,
        low: float,
        high: float,
        stage_steps: int = 1000,
        probes: int = 10,
        max_stage_steps: int = 8000,
        kappa: float = 2.0,
        seed: int = 0,
        evaluate: Callable[[torch.nn.Module], float] | None = None,
        validation: bool = True,
    ) -> None:
        check_number("high", high, 0.0, math.inf, low_open=True)
        check_number("low", low, 0.0, high, low_open=True, high_open=True)
        check_steps("probes", probes, 1)
        check_steps("stage_steps", stage_steps, probes, "A probe has at least one update.")
        check_steps("max_stage_steps", max_stage_steps, stage_steps)
        check_number("kappa", kappa, 0.0, math.inf)
        check_steps("seed", seed, 0)
        if evaluate is not None and not callable(evaluate):
            raise ValueError(f"evaluate={evaluate!r} is not a function. Pass one from a model to its loss, or None.")
        if evaluate is not None and not validation:
            raise ValueError("evaluate= would never be called with validation=False. Drop one of the two.")
        needs = "with two or more probes"
        refuse_idle("kappa", kappa, 2.0, probes > 1, needs)
        refuse_idle("evaluate", evaluate, None, probes > 1, needs)
        for package in ("sklearn.gaussian_process", "scipy.interpolate"):
            require(package, "AutoLRS")
        self.low, self.high, self.probes, self.kappa, self.seed = low, high, probes, kappa, seed
        self.max_stage_steps, self.validation = max_stage_steps, validation
        self._source: Any = evaluate
        self.stage_steps = stage_steps
        self.progress = self._at_the_start()
        self._snapshot: dict[str, Any] | None = None
        self._micro: list[float] = []
        self._handle: Any = None

    def _at_the_start(self) -> dict[str, Any]:
        return {
            "stage": 0,
            "stage_steps": self.stage_steps,
            "run_steps": self.stage_steps,
            "phase": "probe",
            "signal": "train",
            "done": 0,
            "tried": [],
            "lr": None,
            "losses": [],
            "steps": [],
            "before": None,
            "useful_steps": 0,
            "history": [],
            "world_size": 1,
        }

    @property
    def probe_steps(self) -> int:
        """Updates of one probe."""
        return self.progress["stage_steps"] // self.probes

    @property
    def _validates(self) -> bool:
        return self.validation and self.probes > 1

    def use_eval_dataset(self, trainer: Any) -> AutoLRSCallback:
        """
        Judge probes by the loss on `trainer.eval_dataset` in the validation stage, as `trainer.evaluate()` computes
        it.

        Raises:
            RefusedError: the Trainer has no eval dataset or a dictionary of several.
            ValueError: it would be ignored, as where `evaluate` was given.
        """
        if self._source is not None or not self._validates:
            raise ValueError(
                "use_eval_dataset would be ignored beside evaluate=, validation=False or probes=1. Drop one of the "
                "two."
            )
        dataset = getattr(trainer, "eval_dataset", None)
        if dataset is None or isinstance(dataset, dict):
            raise RefusedError(
                f"AutoLRSCallback needs one eval_dataset, the Trainer has {'a dictionary' if dataset else 'none'}. "
                "Pass eval_dataset= to the Trainer, or evaluate= to AutoLRSCallback."
            )
        self._source = trainer
        return self

    def multiplier(self, state: TrainerState, scheduler: LambdaLR) -> float:
        return self.progress["lr"] / scheduler.base_lrs[0]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_sharded(args, "AutoLRSCallback")
        self.side_file, self._written_at = f"hf_effi_auto_lrs_{args.process_index}.pt", None
        check_scheduler(kwargs["lr_scheduler"], "AutoLRSCallback")
        super().on_train_begin(args, state, control, **kwargs)
        kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if kind != "constant" or args.warmup_steps:
            raise RefusedError(
                f"AutoLRSCallback sets the LR, but lr_scheduler_type={kind!r} and warmup_steps={args.warmup_steps}. "
                "Use lr_scheduler_type='constant' and warmup_steps=0."
            )
        refuse_schedule(state, kwargs["lr_scheduler"])
        if self._validates and self._source is None:
            raise RefusedError(
                "AutoLRSCallback judges probes by the validation loss once stages have max_stage_steps="
                f"{self.max_stage_steps} updates, and has none. Pass evaluate=function, call "
                "use_eval_dataset(trainer), or stay with the training loss: validation=False."
            )
        if not args.logging_nan_inf_filter and self.probes > 1:
            raise RefusedError(
                "logging_nan_inf_filter=False: a probe may break, and the Trainer would log NaN for every later "
                "update, since it resets its sum of losses by subtraction. Leave it at True."
            )
        model = kwargs["model"]
        self._forget_last_run(args, model, kwargs["optimizer"])
        if state.global_step > 0:
            self._resume(args, state)
        else:
            self.progress = self._at_the_start()
            self.progress["world_size"] = args.world_size
            self._begin_stage(args, state)
        blocks = probe_blocks(self.progress, state.global_step, state.max_steps, self.probes, self.max_stage_steps)
        announce_probes(state, self, blocks, lambda: self._lend_weights(model))
        self._handle = model.register_forward_hook(self._note_loss)

    def _forget_last_run(self, args: TrainingArguments, model: torch.nn.Module, optimizer: Any) -> None:
        """A run that failed has left its hook, and perhaps the weights of a probe."""
        if self._snapshot is not None and args.auto_find_batch_size:
            restore_snapshot(self._snapshot, model, optimizer)  # the Trainer begins again with the weights it has
        if self._handle is not None:
            self._handle.remove()
        self._snapshot, self._micro = None, []

    @contextlib.contextmanager
    def _lend_weights(self, model: torch.nn.Module) -> Iterator[None]:
        now = copy_weights(model)
        model.load_state_dict(self._snapshot["model"])
        try:
            yield
        finally:
            model.load_state_dict(now)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        if STATE_KEY not in state.stateful_callbacks:
            raise MismatchError(
                f"The checkpoint at step {state.global_step} was trained without AutoLRSCallback; its search cannot "
                "go on. Start from its weights in a new run."
            )
        self.progress = state.stateful_callbacks[STATE_KEY]
        until = self.progress.get("step", state.global_step)
        if until != state.global_step:
            raise MismatchError(
                f"The checkpoint at step {state.global_step} was trained without AutoLRSCallback since update "
                f"{until}; its search cannot go on. Start from its weights in a new run."
            )
        if self.progress["phase"] == "probe" and (self.progress["tried"] or self.progress["done"]):
            # In the middle of a search the weights to go back to are not those of the checkpoint.
            trained, file = self.progress["world_size"], self.side_path(args, state)
            if trained != args.world_size:
                raise MismatchError(
                    f"The checkpoint at step {state.global_step} lies inside a search on {trained} processes, each "
                    f"with its own random numbers to go back to; this run has {args.world_size}. Resume on {trained}, "
                    "or from a checkpoint between two searches."
                )
            if not file.is_file():
                raise BrokenFileError(
                    f"The checkpoint at step {state.global_step} lies inside a search, and {file} with the weights "
                    "before it is missing. Resume with the output_dir that the checkpoint was written to."
                )
            self._snapshot = load_state(file)
        self.progress["world_size"] = args.world_size

    def _note_loss(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
        if module.training and loss is not None and not is_probed(module):
            self._micro.append(loss.detach().mean().item())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        # Only now has every other callback done what it does after the last update of training.
        if self.progress["phase"] == "probe" and self._snapshot is None:
            if self.progress["signal"] == "validation":
                self.progress["before"] = validation_loss(self._source, kwargs["model"], args.device)
            self._snapshot = take_snapshot(kwargs["model"], kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if not self._micro:
            raise RefusedError("The model returns no loss, which AutoLRS needs. Pass labels in the batch.")
        progress = self.progress
        progress["done"] += 1
        if progress["phase"] == "probe":
            self._measure(args, kwargs["model"])
            if progress["done"] == self.probe_steps:
                self._end_probe(args, state, **kwargs)
        else:
            progress["useful_steps"] += 1
            if progress["done"] >= progress["run_steps"]:
                self._lengthen()
                self._begin_stage(args, state)
        self._micro = []
        progress["step"] = state.global_step
        state.stateful_callbacks[STATE_KEY] = progress
        store_probes(state)
        hold_back(args, state, control)
        if control.should_save and args.process_index > 0:
            # Only the first process learns when a push begins; before its save it has to find the others' files.
            self.write_side_file(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        hold_back(args, state, control)

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_log(args, state, control, **kwargs)
        mark_log(state, kwargs["logs"])

    def _measure(self, args: TrainingArguments, model: torch.nn.Module) -> None:
        """Note the loss of a probe's update, the same on every process."""
        progress = self.progress
        if progress["signal"] == "train":
            loss = mean_over_ranks(sum(self._micro) / len(self._micro), args.device)
        elif progress["done"] % max(1, self.probe_steps // _EVALUATIONS) == 0:
            loss = validation_loss(self._source, model, args.device)
        else:
            return
        progress["losses"].append(loss)
        progress["steps"].append(progress["done"])

    def _lengthen(self) -> None:
        """Double the stage, or at its full length turn to the validation loss."""
        progress = self.progress
        progress["stage"] += 1
        if progress["stage_steps"] < self.max_stage_steps:
            progress["stage_steps"] = min(2 * progress["stage_steps"], self.max_stage_steps)
        elif self.validation:
            progress["signal"] = "validation"

    def _propose(self, args: TrainingArguments) -> float:
        tried = [tuple(pair) for pair in self.progress["tried"]]
        seed = self.seed + 1009 * self.progress["stage"] + len(tried)
        # Only the first process's proposal counts: another machine may round the Gaussian process differently.
        lr = propose_lr(tried, self.low, self.high, self.kappa, seed) if args.process_index == 0 else 0.0
        return same_on_ranks(lr, args.device)

    def _begin_stage(self, args: TrainingArguments, state: TrainerState) -> None:
        """Decide how long search and stage are, and the first LR; weights are only copied when the search begins."""
        progress = self.progress
        progress.update(done=0, losses=[], steps=[], tried=[], before=None)
        stage, first = progress["stage_steps"], progress["lr"] is None
        search, run_steps, keeps = share_stage(state.max_steps - state.global_step, stage, self.probes, first)
        if first and run_steps <= 0:
            raise ValueError(
                f"max_steps={state.max_steps} is not enough for one search of {search} updates and a stage after it. "
                f"Train longer, or lower stage_steps={stage}, of which a search takes as much."
            )
        progress["run_steps"] = run_steps
        progress["phase"] = "probe" if search else "run"
        if keeps:
            return
        progress["lr"] = self._propose(args)
        if not search:
            progress["history"].append({"step": state.global_step, "lr": progress["lr"], "tried": []})

    def _end_probe(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        progress = self.progress
        validation = progress["signal"] == "validation"
        predicted = predict_loss(
            progress["losses"], progress["steps"], progress["run_steps"], validation, progress["before"]
        )
        progress["tried"].append([progress["lr"], same_on_ranks(predicted, args.device)])
        # Each probe sees other data but the same random numbers (dropout), so probes differ by their LR and their
        # data.
        restore_snapshot(self._snapshot, kwargs["model"], kwargs["optimizer"], rng=True)
        progress.update(done=0, losses=[], steps=[])
        if len(progress["tried"]) < self.probes:
            progress["lr"] = self._propose(args)
            return
        lr, loss = min(progress["tried"], key=lambda pair: pair[1])
        if loss >= BROKEN:
            raise RefusedError(
                f"Every probe from {self.low} to {self.high} ended with a loss that is not finite. Lower `low` and "
                "`high`, or look for NaN in the data or the weights."
            )
        progress.update(lr=lr, phase="run")
        entry = {"step": state.global_step, "lr": lr, "tried": progress["tried"], "signal": progress["signal"]}
        progress["history"].append(entry)
        self._snapshot = None

    def side_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        return self._snapshot  # of every process: each has its own random numbers and buffers

    @in_turn(MEASURE)
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle.remove()
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self._snapshot is not None and self.progress["done"] and not best:
            # The run was stopped in the middle of a probe, which is no model to keep.
            restore_snapshot(self._snapshot, kwargs["model"], kwargs["optimizer"])


def refuse_schedule(state: TrainerState, scheduler: LambdaLR) -> None:
    """
    Refuse a scheduler of the user that moves the LR beside the search.

    Raises:
        RefusedError: its multiplier is not 1 at one of about a hundred updates, up to the end of the run.
    """
    steps = range(state.global_step, state.max_steps, max(1, (state.max_steps - state.global_step) // 100))
    if not all(multiplier(step) == 1 for multiplier in scheduler.lr_lambdas for step in steps):
        raise RefusedError(
            "AutoLRSCallback searches the LR of each stage, and the scheduler in `optimizers` moves it as well, in "
            "probes too. Pass (optimizer, None), or drop AutoLRSCallback."
        )
