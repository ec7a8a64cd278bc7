"""One case for each public callback, on a model so small that every pair of them can train together."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import hf_effi
from hf_effi import samplers
from hf_effi.callbacks import EMACallback, FastForwardCallback, ReptileCallback
from hf_effi.checkpoint.log_window import KEY as LOG_WINDOW
from hf_effi.functional.probes import stored_plan
from hf_effi.functional.schedules import wsd
from hf_effi.hub import callback as hub_callback
from hf_effi.trainers.mixins.sequence_length import SequenceLengthMixin
from tests.helpers.public import public_objects

from .compare import VOLATILE_KEYS, VOLATILE_PARTS
from .pairs_model import (
    STEPS,
    TOKENS,
    SameBlock,
    adalora_model,
    osf_model,
    plain_model,
)

BASE_LR, LENGTH = 1e-2, 8


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


@dataclass
class PairsArguments(TrainingArguments):
    """The fields by which `GRPODoctor` knows a GRPO config."""

    max_completion_length: int = 8
    beta: float = 0.1
    num_iterations: int = 1


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """
    How a callback is run beside others.

    Args:
        make: Returns the callback. The Trainer is given for those that need it.
        settings: Training arguments that it needs.
        model: Makes the model that it needs.
        trains: Whether it changes what is trained; otherwise its run is the run without it, to the bit.
        look: Its state between two updates, for comparison.
    """

    make: Callable[[Any], TrainerCallback]
    settings: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = plain_model
    trains: bool = False
    look: Callable[[Any], Any] = lambda callback: None


def _grid() -> Any:
    return hf_effi.data.Multigrid(LENGTH, long_cycle=(2, 1), short_cycle=(2, 1), final_share=0.2)


def _no_patch(model: nn.Module) -> Any:
    return SimpleNamespace(revert=lambda: None)


def _quiet(sentence: str) -> None:
    pass


def _hub(trainer: Any) -> TrainerCallback:
    return hf_effi.HubCallback(trainer, "me/pairs")


_CHECKPOINTING = {"activation_checkpointing": True}
_EVERY_TEN = {"save_strategy": "steps", "save_steps": 10}
_EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
_ACCURACY = {"window": 1, "quiet": 1, "threshold": 10.0, "greater_is_better": False}


def _average_state(callback: Any) -> Any:
    return {"mean": callback._average.mean, **callback._average.state_dict()}


def _adalora_state(callback: Any) -> Any:
    allocator = callback._allocator
    return callback.ranks(), callback._pattern, dict(allocator.exp_avg_ipt), dict(allocator.exp_avg_unc)


CASES: dict[str, Case] = {
    "AccuracyGradientCallback": Case(
        lambda trainer: hf_effi.callbacks.AccuracyGradientCallback("eval_loss", **_ACCURACY),
        _EVALUATED,
        trains=True,
        look=lambda callback: callback.rule.state_dict(),
    ),
    "ActivationOffloadCallback": Case(lambda trainer: hf_effi.ActivationOffloadCallback(), _CHECKPOINTING),
    "AdaLoRACallback": Case(
        lambda trainer: hf_effi.callbacks.AdaLoRACallback(set_total_step=True),
        model=adalora_model,
        trains=True,
        look=_adalora_state,
    ),
    "AutoLRSCallback": Case(
        lambda trainer: hf_effi.callbacks.AutoLRSCallback(1e-3, 5.0, 4, 2, 4, validation=False),
        trains=True,
        look=lambda callback: callback.progress,
    ),
    "CausesCallback": Case(
        lambda trainer: hf_effi.callbacks.CausesCallback(4),
        look=lambda callback: (callback._reference, callback._pending),
    ),
    "EMACallback": Case(lambda trainer: EMACallback(0.9, every_steps=2, start_step=1), look=_average_state),
    "FastForwardCallback": Case(lambda trainer: FastForwardCallback(3, rows=4), look=lambda one: [*one.walks]),
    "GRPODoctor": Case(
        lambda trainer: hf_effi.GRPODoctor(say=_quiet), look=lambda callback: list(map(str, callback.findings))
    ),
    "GradientSNRCallback": Case(
        lambda trainer: hf_effi.callbacks.GradientSNRCallback(),
        {"gradient_accumulation_steps": 3},
        trains=True,
        look=lambda callback: callback.rule.state_dict(),
    ),
    "HubCallback": Case(_hub, _EVERY_TEN, look=lambda callback: callback.uploader.pushed),
    "HypergradientCallback": Case(
        lambda trainer: hf_effi.callbacks.HypergradientCallback(kappa=0.2),
        trains=True,
        look=lambda callback: (callback.rule.state_dict(), callback._update),
    ),
    "KernelPatchCallback": Case(lambda trainer: hf_effi.KernelPatchCallback({"*.block": SameBlock})),
    "LRScheduleCallback": Case(
        lambda trainer: hf_effi.LRScheduleCallback(wsd(warmup_steps=3, decay_steps=10, floor=0.3)),
        trains=True,
        look=lambda callback: callback.current.spec(),
    ),
    "MIGUCallback": Case(lambda trainer: hf_effi.callbacks.MIGUCallback(0.5, "hard"), trains=True),
    "MemoryBudgetCallback": Case(lambda trainer: hf_effi.MemoryBudgetCallback(1.0), _CHECKPOINTING),
    "MultigridLRCallback": Case(
        lambda trainer: hf_effi.callbacks.MultigridLRCallback(_grid()), {"sequence_length": _grid()}, trains=True
    ),
    "OSFProjectionCallback": Case(
        lambda trainer: hf_effi.callbacks.OSFProjectionCallback(), model=osf_model, trains=True
    ),
    "PassRateHistoryCallback": Case(lambda trainer: hf_effi.callbacks.PassRateHistoryCallback()),
    "PatchCallback": Case(lambda trainer: hf_effi.PatchCallback(_no_patch)),
    "RandomLTDCallback": Case(
        lambda trainer: hf_effi.callbacks.RandomLTDCallback(4, LENGTH, multiple=2),
        trains=True,
        look=lambda callback: (
            callback._consumed,
            callback.dropping.layer_tokens,
            callback.dropping.full_layer_tokens,
        ),
    ),
    "ReptileCallback": Case(
        lambda trainer: ReptileCallback(3, 0.5, last_partial=True),
        trains=True,
        look=lambda callback: dict(callback._references),
    ),
    "RewindCallback": Case(
        lambda trainer: hf_effi.callbacks.RewindCallback(), look=lambda callback: (callback.rewinds, callback._losses)
    ),
    "RunRecordCallback": Case(lambda trainer: hf_effi.RunRecordCallback()),
    "SafeCheckpointCallback": Case(lambda trainer: hf_effi.callbacks.SafeCheckpointCallback()),
    "SamplerCallback": Case(
        lambda trainer: hf_effi.SamplerCallback(samplers.ShuffledSampler(64, seed=5)), trains=True
    ),
    "SelectiveCheckpointCallback": Case(lambda trainer: hf_effi.SelectiveCheckpointCallback(), _CHECKPOINTING),
    "StabilityGapCallback": Case(
        lambda trainer: hf_effi.callbacks.StabilityGapCallback("eval_loss", None, say=_quiet),
        _EVALUATED,
        look=lambda callback: dict(callback.gaps),
    ),
    "TrainDoctor": Case(
        lambda trainer: hf_effi.TrainDoctor(say=_quiet), look=lambda callback: list(map(str, callback.findings))
    ),
    "WeightAveragingCallback": Case(
        lambda trainer: hf_effi.WeightAveragingCallback(3, every_steps=2, kind="uniform"),
        look=_average_state,
    ),
}

#: callbacks that have nothing to keep outside of GRPO, and say so; `tests/training/test_label_free.py` resumes one
NOTHING_TO_KEEP = {"PassRateHistoryCallback"}
#: callbacks that one process alone is refused; they are tested in tests/distributed
NEEDS_PROCESSES = {"StragglerCallback"}
#: callbacks that refuse a trainer that is not one of GRPO; `tests/training/test_length_budget.py` and
#: `test_grpo_schedules.py` train with them
NEEDS_SCHEDULE_FREE = {"ScheduleFreeCallback"}  # refuses any other optimizer; `tests/training/test_schedule_free.py`
#: callbacks that refuse a model without attention; `tests/training/test_qk_clip.py` trains with them
NEEDS_ATTENTION = {"QKClipCallback"}
NEEDS_GRPO = {"BudgetPromptCallback", "GRPOScheduleCallback", "GenerationCapCallback"}

#: pairs that refuse each other, and words of the message
REFUSED: dict[frozenset[str], str] = {
    frozenset({"EMACallback", "WeightAveragingCallback"}): "Two averages of the weights",
    frozenset({"AdaLoRACallback", "MIGUCallback"}): "finds no trained nn.Linear",
    frozenset({"OSFProjectionCallback", "MIGUCallback"}): "finds no trained nn.Linear",
    frozenset({"OSFProjectionCallback", "AdaLoRACallback"}): "OSF",
    frozenset({"AutoLRSCallback", "LRScheduleCallback"}): "Two schedules want to set the LR",
    **{
        frozenset({one, other}): "Use one callback for the modes of all layers"
        for one in ("ActivationOffloadCallback", "MemoryBudgetCallback", "SelectiveCheckpointCallback")
        for other in ("ActivationOffloadCallback", "MemoryBudgetCallback", "SelectiveCheckpointCallback")
        if one != other
    },
}


def public_callbacks() -> list[str]:
    """Return the names of all callbacks that the package offers: by its front door, or from a public module."""
    found = {name for name, value in public_objects().items() if _is_callback(value)}
    for module in _public_modules():
        found |= {
            name
            for name, value in vars(module).items()
            if _is_callback(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }
    return sorted(
        found - NEEDS_PROCESSES - NEEDS_GRPO - NEEDS_SCHEDULE_FREE - NEEDS_ATTENTION - {"OwningCallback"}
    )  # a base, which decides nothing by itself


def _public_modules() -> Iterable[Any]:
    import importlib
    import pkgutil

    for part in ("callbacks", "hub", "trainers"):
        package = importlib.import_module(f"hf_effi.{part}")
        for info in pkgutil.iter_modules(package.__path__):
            if not info.name.startswith("_"):
                yield importlib.import_module(f"hf_effi.{part}.{info.name}")


def _is_callback(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, TrainerCallback) and value is not TrainerCallback


# --- one run ---------------------------------------------------------------------------------------------------------


class Trace(TrainerCallback):
    """What the run looks like between updates, when every callback has done what it does: all to be compared."""

    def __init__(self, looks: dict[str, Callable[[], Any]]) -> None:
        self.looks = looks
        self.weights: dict[int, torch.Tensor] = {}
        self.states: dict[int, dict[str, Any]] = {}
        self.lrs: dict[int, float] = {}
        self.trainable = torch.empty(0, dtype=torch.bool)

    def _note(self, state: Any, model: nn.Module) -> None:
        self.trainable = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
        self.weights[state.global_step] = flat(model)
        self.states[state.global_step] = {name: copy.deepcopy(look()) for name, look in self.looks.items()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(state, kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lrs[state.global_step + 1] = float(kwargs["optimizer"].param_groups[0]["lr"])


class StopAt(TrainerCallback):
    """Saves and stops after this update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class _Uploads:
    """Stands in for the Hub: notes what would be uploaded."""

    repo_id = "me/pairs"

    def __init__(self) -> None:
        self.pushed: list[str] = []

    def create_repo(self) -> None:
        pass

    def wait(self) -> None:
        pass


def without_network(monkeypatch: Any) -> None:
    """Let `HubCallback` note its uploads."""
    monkeypatch.setattr(hub_callback, "uploader_for", lambda *args: _Uploads())
    monkeypatch.setattr(hub_callback, "write_section", lambda *args: None)
    monkeypatch.setattr(
        hub_callback, "push_checkpoint", lambda uploader, folder, checkpoint, message: uploader.pushed.append(message)
    )


class PairsTrainer(SequenceLengthMixin, Trainer):
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass
class Result:
    """What a run left; `trace` has the weights and the states of its callbacks after each update."""

    trace: Trace
    end: torch.Tensor
    state: dict[str, Any]
    logs: list[dict[str, Any]]
    average: dict[str, torch.Tensor] | None
    events: list[dict[str, Any]] | None

    @property
    def probes(self) -> Any:
        return stored_plan(self.state)

    def everything(self) -> dict[str, Any]:
        """Return all that two equal runs have in common."""
        trace = {name: getattr(self.trace, name) for name in ("weights", "states", "lrs")}
        events = None if self.events is None else [(event["step"], event["values"]) for event in self.events]
        kept = ("end", "state", "logs", "average")
        return {**trace, **{name: getattr(self, name) for name in kept}, "events": events}


def settings_of(names: Sequence[str]) -> tuple[dict[str, Any], Callable[[], nn.Module]]:
    """Return the training arguments that all of these callbacks need, and the model."""
    merged: dict[str, Any] = {}
    for name in names:
        merged |= CASES[name].settings
    models = [CASES[name].model for name in names if CASES[name].model is not plain_model]
    return merged, models[0] if models else plain_model


def train(
    folder: Path,
    names: Sequence[str],
    settings: dict[str, Any],
    model: Callable[[], nn.Module],
    stop: int | None = None,
    resume: int | None = None,
) -> Result:
    """Train 30 updates with these callbacks, in this order; `stop` ends after an update with a checkpoint."""
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": BASE_LR,
        "lr_scheduler_type": "constant",
        "logging_steps": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        **settings,
    }
    if stop is not None or resume is not None:
        settings |= {"save_strategy": "steps", "save_steps": settings.get("save_steps", 1000)}
    lengths = settings.pop("sequence_length", None)
    trainer = PairsTrainer(
        model=model(),
        args=PairsArguments(**settings),
        train_dataset=rows(),
        eval_dataset=rows(4),
        sequence_length=lengths,
    )
    trainer.remove_callback(PrinterCallback)
    made = {name: CASES[name].make(trainer) for name in names}
    for callback in made.values():
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        trainer.add_callback(callback)
    looks = {name: lambda name=name: CASES[name].look(made[name]) for name in names}
    trace = Trace(looks)
    trainer.add_callback(trace)
    if stop is not None:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return Result(
        trace,
        flat(trainer.model),
        _plain_state(trainer.state.stateful_callbacks),
        [steady(entry) for entry in trainer.state.log_history],
        _saved_average(folder) if {"EMACallback", "WeightAveragingCallback"} & set(names) else None,
        _events(folder) if "RunRecordCallback" in names else None,
    )


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]).clone()


def steady(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a log entry without what measures time."""
    return {
        key: value
        for key, value in entry.items()
        if key not in VOLATILE_KEYS and not any(part in key for part in VOLATILE_PARTS)
    }


def _plain_state(stored: dict[str, Any]) -> dict[str, Any]:
    """The states of callbacks; where the window of a log began is the business of who saves."""
    stored = {key: value for key, value in stored.items() if key != LOG_WINDOW}
    return json.loads(json.dumps({key: value for key, value in stored.items() if key != "TrainerControl"}))


def _saved_average(folder: Path) -> dict[str, torch.Tensor] | None:
    from safetensors.torch import load_file

    files = sorted((folder / "averaged").glob("*.safetensors"))
    return load_file(files[0]) if files else None


def _events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "effi" / "effi_events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "log"]
    return [{"step": event["step"], "values": steady(event["values"])} for event in events]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return where two nested values differ, to the bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one))} and {sorted(map(str, other))}"]
        return [found for key in one for found in differences(one[key], other[key], f"{where}[{key}]")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} of them"]
        return [
            found
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for found in differences(a, b, f"{where}[{i}]")
        ]
    return [] if one == other or (one != one and other != other) else [f"{where}: {one!r} and {other!r}"]
