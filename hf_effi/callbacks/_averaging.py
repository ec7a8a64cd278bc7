"""What callbacks share that average the weights along a run: when it is read, evaluated, saved and taken up again."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._files import load_state, save_aside, save_json
from ..checkpoint.capture import replaced
from ..checkpoint.run_folder import calling_trainer, is_saved_aside, run_folder
from ..checkpoint.snapshot import restore_rng, take_rng
from ..errors import MismatchError, RefusedError
from ..functional import metrics
from ..functional.schedules import warn_decay_to_zero
from ..optim.report import innermost
from ..optim.schedule_free import is_schedule_free
from ._engines import is_fsdp2, sharding_engine
from ._live_weights import lent, overwrite, trained, whole_state
from ._side_file import SideFileCallback
from ._turns import READ, WRITE, TurnCallback, in_turn
from .owners import Role
from .probing import outside_probes

logger = logging.getLogger(__name__)

AVERAGE_FILE = "effi_average.pt"
#: file of each process, where each has shards
SHARD_FILE = "effi_average_{}.pt"
DESCRIPTION = "average.json"
#: between the prefix of a metric and its name, where both kinds of weights are evaluated: `eval_averaged_loss`
AVERAGED = "averaged"

EvaluateOn = Literal["live", "average", "both"]


class Average(Protocol):
    """What holds an average: [`RunningAverage`] or [`WindowAverage`]."""

    @property
    def mean(self) -> dict[str, torch.Tensor]: ...

    @property
    def count(self) -> int: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AveragingCallback(TurnCallback, SideFileCallback):
    """
    Base of a callback that averages weights while they are trained.

    It asks its subclass which average that is, and whether an update belongs to it. Training itself is not changed.
    """

    role = Role(
        "weight average",
        "Two averages of the weights want the same place in a checkpoint",
        "Keep one; average_checkpoints makes others from the checkpoints of the run.",
    )
    side_file = AVERAGE_FILE
    _average: Average

    def __init__(self, evaluate_on: EvaluateOn, swap_in: bool, save_with_checkpoints: bool, folder: str) -> None:
        if evaluate_on not in get_args(EvaluateOn):
            raise ValueError(f"evaluate_on={evaluate_on!r} is unknown. Choose 'live', 'average' or 'both'.")
        if not folder or Path(folder).name != folder:
            raise ValueError(f"folder={folder!r} must be a plain name; it is made inside output_dir.")
        self.evaluate_on, self.swap_in, self.folder = evaluate_on, swap_in, folder
        self.save_with_checkpoints = save_with_checkpoints
        #: updates of the snapshots that the average is of, where it holds each of them
        self._steps: list[int] = []
        self._ready = False
        self._evaluating = False
        #: while the average is in the model: its values, and those of the model
        self._lent: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None
        self._undo: ExitStack | None = None
        self._model: Any = None
        self._processing: Any = None

    # ---- what a subclass says ----

    def _fresh(self, args: TrainingArguments, state: TrainerState) -> Average:
        """Return an average of nothing."""
        raise NotImplementedError

    def _begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Look at the weights before the first update."""

    def _note(self, state: TrainerState) -> None:
        """Add the weights after an update of training, if it belongs to the average."""
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        """Return what two runs must have in common for one to go on with the average of the other."""
        raise NotImplementedError

    def _check_stored(
        self, args: TrainingArguments, path: Path, stored: dict[str, Any] | None, state: TrainerState
    ) -> bool:
        """Return whether a checkpoint's average is this run's; raise where the run cannot do without it."""
        raise NotImplementedError

    def _description(self, average: Average, steps: list[int]) -> dict[str, Any]:
        """Return what `average.json` says."""
        raise NotImplementedError

    # ---- the events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._leave_trainer()  # of a run that failed
        trainer = calling_trainer(state)
        self._check(args, state, trainer)
        optimizer = kwargs.get("optimizer")
        # One that was passed to the Trainer is not what `optim=` names; without an optimizer only the name is known.
        named = optimizer is None and "schedule_free" in str(args.optim)
        if named or is_schedule_free(optimizer):
            name = args.optim if optimizer is None else type(innermost(optimizer)).__name__
            raise RefusedError(
                f"{name} averages its iterates itself. Drop {type(self).__name__}; ScheduleFreeCallback lets "
                "checkpoints hold that average."
            )
        self.side_file = SHARD_FILE.format(args.process_index) if is_fsdp2() else AVERAGE_FILE
        self._model, self._processing = kwargs["model"], kwargs.get("processing_class")
        self._steps, self._ready, self._written_at = [], False, None
        self._average = self._fresh(args, state)
        if trainer is not None:
            self._undo = ExitStack()
            self._undo.enter_context(replaced(trainer, "_run_epoch", self._run_epoch_of(trainer)))
            if self.evaluate_on != "live":
                self._undo.enter_context(replaced(trainer, "evaluate", self._evaluate_of(trainer)))

    def _leave_trainer(self) -> None:
        """Give the Trainer its own methods back."""
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def _make_ready(self, args: TrainingArguments, state: TrainerState) -> None:
        """Begin, or take up what a checkpoint holds, once every callback has said which updates are probes."""
        if self._ready:
            return
        self._ready = True
        if state.global_step == 0:
            self._begin(args, state)
            return
        path = self.side_path(args, state)
        stored = load_state(path) if path.exists() else None
        if stored is not None and stored.get("world_size", 1) != (args.world_size if is_fsdp2() else 1):
            raise MismatchError(
                f"{path} holds the shards of {stored.get('world_size', 1)} processes, and this run has "
                f"{args.world_size}. Resume on as many."
            )
        if self._check_stored(args, path, stored, state) and stored is not None:
            self._load(stored)

    def _load(self, stored: dict[str, Any]) -> None:
        self._average.load_state_dict(stored["average"])
        self._steps = list(stored["steps"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._make_ready(args, state)
        if state.global_step == 0 and args.process_index == 0:
            warn_decay_to_zero(
                kwargs["lr_scheduler"],
                state.max_steps,
                "and after such a decay the average of the last checkpoints is worth little or nothing. Let it end at "
                f"a third of its peak, or drop {type(self).__name__}.",
            )

    @in_turn(READ)
    @outside_probes
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._make_ready(args, state)
        self._note(state)

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_log(args, state, control, **kwargs)
        if self._evaluating:
            count = float(self._average.count)
            kwargs["logs"][metrics.AVERAGE_SNAPSHOTS] = state.log_history[-1][metrics.AVERAGE_SNAPSHOTS] = count

    def side_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        if not (args.should_save or is_fsdp2()) or not self._average.count:
            return None
        stored = {"settings": self._settings(), "steps": self._steps, "average": self._average.state_dict()}
        return stored | {"world_size": args.world_size if is_fsdp2() else 1}

    def write_side_file(self, args: TrainingArguments, state: TrainerState) -> None:
        due = self.save_with_checkpoints and self._written_at != state.global_step and args.should_save
        if due and self._average.count:
            folder = self.side_path(args, state).parent / self.folder
            with self._average_lent():
                if is_saved_aside(state):
                    self._save(folder, self._average, self._steps)
                else:
                    save_aside(folder, lambda part: self._save(part, self._average, self._steps))
        super().write_side_file(args, state)

    @in_turn(READ)
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            self._make_ready(args, state)  # a run that was resumed at its end has no epoch
            self._finish(args, state, self._judged_by_average(args, calling_trainer(state)))
        finally:
            self._end(args, state)

    def _finish(self, args: TrainingArguments, state: TrainerState, judged: bool) -> None:
        best = state.best_model_checkpoint
        judged = judged and best is not None and self._take_best(Path(best))
        if not self._average.count:
            logger.warning(
                "Training ended after %d updates, before the first snapshot: nothing was averaged.", state.global_step
            )
            return
        with self._average_lent() as held:
            self._save_at_end(args, state)
            if (self.swap_in or judged) and held is not None:
                held.update({name: tensor.to("cpu", copy=True) for name, tensor in trained(self._model).items()})
                logger.warning("The model now holds the average of its weights %s, not the last.", self._of_what())

    def _end(self, args: TrainingArguments, state: TrainerState) -> None:
        self._leave_trainer()
        self._average, self._steps, self._model, self._processing = self._fresh(args, state), [], None, None

    # ---- evaluation ----

    @contextmanager
    def _average_lent(self) -> Iterator[dict[str, torch.Tensor] | None]:
        """A context in which the model holds the average; its own weights where there is none yet."""
        if self._lent is not None or not self._average.count:
            yield None
            return
        average = self._average.mean
        try:
            with lent(self._model, average) as held:
                self._lent = average, held
                yield held
        finally:
            self._lent = None

    def _evaluate_of(self, trainer: Any) -> Callable[..., Any]:
        evaluate = trainer.evaluate
        signature = inspect.signature(evaluate)
        if missing := {"eval_dataset", "metric_key_prefix"} - signature.parameters.keys():
            raise RefusedError(
                f"evaluate_on={self.evaluate_on!r} calls {type(trainer).__name__}.evaluate, which does not name its "
                f"parameters {sorted(missing)}. Give it those of Trainer.evaluate, or leave evaluate_on at 'live'."
            )

        def evaluate_on_average(*args: Any, **kwargs: Any) -> Any:
            asked = signature.bind(*args, **kwargs)
            asked.apply_defaults()
            datasets = asked.arguments.get("eval_dataset")
            datasets = trainer.eval_dataset if datasets is None else datasets
            if self._evaluating or isinstance(datasets, dict):  # a dictionary comes back here, one by one
                return evaluate(*args, **kwargs)
            self._make_ready(trainer.args, trainer.state)
            if self.evaluate_on == "average":
                return self._evaluate_average(trainer, lambda: evaluate(*args, **kwargs))
            asked.arguments["metric_key_prefix"] += f"_{AVERAGED}"
            return self._evaluate_both(
                trainer, lambda: evaluate(*asked.args, **asked.kwargs), lambda: evaluate(*args, **kwargs)
            )

        return evaluate_on_average

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        self._evaluating = True
        try:
            with self._average_lent():
                yield
        finally:
            self._evaluating = False

    def _evaluate_average(self, trainer: Any, on_average: Callable[[], Any]) -> Any:
        """Evaluate on the average; the event that tells of it finds the live weights."""
        handler = trainer.callback_handler
        tell = handler.on_evaluate

        def with_live_weights(*event: Any, **more: Any) -> Any:
            if self._lent is None:
                return tell(*event, **more)
            average, live = self._lent
            overwrite(self._model, live)
            try:
                return tell(*event, **more)
            finally:  # the Trainer may go on to another part of its evaluation
                overwrite(self._model, average)

        with replaced(handler, "on_evaluate", with_live_weights), self._evaluation():
            return on_average()

    def _evaluate_both(self, trainer: Any, on_average: Callable[[], Any], on_live: Callable[[], Any]) -> Any:
        """Evaluate twice, with one event for both: whoever stops or chooses by a metric finds those of both."""
        handler, rng = trainer.callback_handler, take_rng()
        tell = handler.on_evaluate

        def without_event(args: Any, state: Any, control: Any, found: Any, **more: Any) -> Any:
            return handler.on_predict(args, state, control, found, **more)  # ends the bar of this pass

        with self._evaluation(), replaced(handler, "on_evaluate", without_event):
            of_average = on_average()
        restore_rng(rng)  # the second pass is the one that a run without an average makes

        def together(args: Any, state: Any, control: Any, found: dict[str, float], **more: Any) -> Any:
            if both := sorted(found.keys() & of_average.keys() - {"epoch"}):
                raise RefusedError(
                    f'evaluate_on="both": compute_metrics returns {both}, which are the names of the metrics of the '
                    "average. Rename them."
                )
            found.update(of_average)
            return tell(args, state, control, found, **more)

        with replaced(handler, "on_evaluate", together):
            return on_live()

    def _judged_by_average(self, args: TrainingArguments, trainer: Any) -> bool:
        """Whether the best checkpoint is chosen by a metric of the average, so that this is what is best."""
        if not args.load_best_model_at_end or self.evaluate_on == "live":
            return False
        datasets = getattr(trainer, "eval_dataset", None)
        names = [f"{name}_" for name in datasets] if isinstance(datasets, dict) else [""]
        metric = str(args.metric_for_best_model).removeprefix("eval_")
        return self.evaluate_on == "average" or any(metric.startswith(f"{name}{AVERAGED}_") for name in names)

    def _take_best(self, folder: Path) -> bool:
        """Take the average of the best checkpoint, and return whether it has one."""
        path = folder / self.side_file
        if not path.exists():
            logger.warning("%s holds no average: it was evaluated with its own weights, and these stay.", folder)
            return False
        self._load(load_state(path))
        return True

    # ---- an end that nobody planned ----

    def _run_epoch_of(self, trainer: Any) -> Callable[..., Any]:
        run_epoch = trainer._run_epoch

        def run_epoch_until_stopped(*args: Any, **kwargs: Any) -> Any:
            try:
                return run_epoch(*args, **kwargs)
            except (KeyboardInterrupt, SystemExit):
                self._stopped(trainer.args, trainer.state)
                raise
            except BaseException:
                self._leave_trainer()
                raise

        return run_epoch_until_stopped

    def _stopped(self, args: TrainingArguments, state: TrainerState) -> None:
        if is_fsdp2():
            logger.warning("Interrupted: the average was not saved, since the shards of all processes make it.")
        elif self._average.count:
            with self._average_lent():
                self._save_at_end(args, state)
            logger.warning("Interrupted: the average %s is in %r.", self._of_what(), self.folder)
        self._end(args, state)

    # ---- files ----

    def _of_what(self) -> str:
        if self._steps:
            first, last = self._steps[0], self._steps[-1]
            return f"after updates {self._steps}" if len(self._steps) <= 12 else f"after updates {first} to {last}"
        return f"of {self._average.count} snapshots"

    def _save_at_end(self, args: TrainingArguments, state: TrainerState) -> None:
        """Save the weights that the model holds now as the average of the run."""
        whole = whole_state(self._model) if is_fsdp2() else None
        if args.should_save:
            save_aside(
                run_folder(args, state) / self.folder,
                lambda folder: self._save(folder, self._average, self._steps, whole),
            )

    def _save(self, folder: Path, average: Average, steps: list[int], whole: dict[str, Any] | None = None) -> None:
        folder.mkdir()
        model = self._model
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder, **({} if whole is None else {"state_dict": whole}))
        else:
            torch.save(model.state_dict() if whole is None else whole, folder / "pytorch_model.bin")
        if hasattr(self._processing, "save_pretrained"):
            self._processing.save_pretrained(folder)
        save_json(folder / DESCRIPTION, self._description(average, steps), indent=1)

    # ---- refusals ----

    def _check(self, args: TrainingArguments, state: TrainerState, trainer: Any) -> None:
        name = type(self).__name__
        if sharding_engine(args) and not is_fsdp2():
            raise RefusedError(
                f"{name} reads whole weights, which DeepSpeed, FSDP 1 and tensor parallelism keep in shards. Train "
                "with DDP, FSDP2 or on one device, or average what was saved: average_checkpoints."
            )
        if is_fsdp2() and self.save_with_checkpoints:
            raise RefusedError(
                "save_with_checkpoints=True would gather the whole weights at each checkpoint, which a push does on "
                "one process alone. Leave it at False under FSDP2: the average is saved at the end, and its shards in "
                "each checkpoint."
            )
        if self.swap_in and args.load_best_model_at_end and not self._judged_by_average(args, trainer):
            raise RefusedError(
                "swap_in=True and load_best_model_at_end=True both say what the model holds at the end. Set one to "
                f"False; the average is in {self.folder!r} either way. Or let the average be judged: "
                'evaluate_on="average", or "both" with metric_for_best_model="averaged_loss".'
            )
        if self.evaluate_on != "live" and trainer is None:
            raise RefusedError(
                f"evaluate_on={self.evaluate_on!r} needs a Trainer, and none has called {name}. Give the callback to "
                "a Trainer, or leave evaluate_on at 'live'."
            )
        if self.evaluate_on != "live" and getattr(args, "use_vllm", False):
            raise RefusedError(
                f"evaluate_on={self.evaluate_on!r} exchanges the weights of the model, but use_vllm=True generates "
                "with those that vLLM holds. Leave evaluate_on at 'live', or evaluate the saved average afterwards."
            )
        folder = run_folder(args, state) / self.folder
        if folder.exists() and not (folder / DESCRIPTION).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"{folder} exists and holds no average, and would be replaced by one. Choose another folder=, or move "
                "it."
            )
