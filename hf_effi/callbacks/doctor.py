"""`TrainDoctor` and `GRPODoctor`: say in one sentence what is wrong with a run, while it runs, on stock trainers."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional.data import ContaminationReport
from ..functional.doctor import TRAIN_RULES, diagnose
from ..functional.doctor_grpo import GRPO_RULES
from ..functional.doctor_loader import WAIT_FRACTION, WAIT_SECONDS, LoaderClock
from ..functional.findings import Finding, GRPOLimits, Rule, RunFacts, TrainLimits
from ..functional.kept_arguments import keeps_arguments
from ._engines import sharding_engine
from ._forward_watch import ForwardWatch
from ._outside import TimesTheLoader, seconds_outside
from ._scheduler_plan import scheduler_plan
from ._turns import READ, in_turn
from .observer import describe, only_observes
from .owners import OwningCallback, Role
from .probing import in_probe, plan_of

logger = logging.getLogger(__name__)
_METRIC_DRIVEN = ("ReduceLROnPlateau", "GreedyLR")


class TrainDoctor(TimesTheLoader, OwningCallback):
    """
    Watch a run of any Trainer and say what is wrong, once, with the step and what to try.

    It reads logs, scheduler and optimizer, counts padding and labels in front of the model, and with packed batches
    measures on eight tokens whether documents see each other. It changes nothing: weights and random numbers are those
    of the run without it, and if it fails, it says so and the run goes on. See `docs/doctors.md` for the table of
    symptoms and thresholds.

    Args:
        limits ([`TrainLimits`], *optional*): Thresholds.
        say (`Callable[[str], None]`, *optional*): Receives each sentence, and the summary at the end. By default they
            are logged as warnings. Only the first process speaks.

    Attributes:
        findings (`list[Finding]`): What was found so far, in order; also kept over a resume.

    Example:
    ```python
    doctor = TrainDoctor()
    Trainer(model, args, train_dataset=rows, callbacks=[doctor]).train()
    print([finding.rule for finding in doctor.findings])
    ```
    """

    rules: tuple[Rule, ...] = TRAIN_RULES
    limits_class: type[TrainLimits] = TrainLimits

    @keeps_arguments
    def __init__(self, limits: TrainLimits | None = None, say: Callable[[str], None] = logger.warning) -> None:
        limits = self.limits_class() if limits is None else limits
        if not isinstance(limits, self.limits_class):
            raise ValueError(f"limits={limits!r} must be {self.limits_class.__name__}(...).")
        if not callable(say):
            raise ValueError(f"say={say!r} must be a function that takes a sentence, such as print.")
        self.limits, self.say = limits, say
        self.findings: list[Finding] = []
        self._said: set[str] = set()
        self._trace: list[dict[str, Any]] = []
        self._facts = RunFacts(max_steps=0)
        self._watch: ForwardWatch | None = None
        self._used_lr: float | None = None
        self._clock = LoaderClock()
        self._measures_packing, self._failed = True, False

    @property
    def role(self) -> Role:
        """One doctor of each class: a second one would overwrite the findings of the first in the checkpoint."""
        return Role(self._state_key, "Two doctors want to keep their findings in one place", "Keep one.")

    def check(self, args: Any) -> None:
        """Raise where the rules are not for this trainer."""

    def facts(self, args: Any, state: TrainerState, optimizer: Any, scheduler: Any) -> RunFacts:
        """Return what is known when training begins."""
        processes, accumulation = args.world_size, args.gradient_accumulation_steps
        return RunFacts(
            max_steps=state.max_steps,
            start_step=state.global_step,
            start_probes=plan_of(state).probes(state.global_step),
            max_grad_norm=args.max_grad_norm or 0.0,
            scheduler_start=scheduler_steps(scheduler),
            optimizer_steps=optimizer_steps(optimizer),
            weight_decay=max((group.get("weight_decay") or 0.0 for group in optimizer.param_groups), default=None),
            factors=(accumulation, processes, accumulation * processes),
            entropies=_first_entropies(state),
        )

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.check(args)
        self._begin(args, state, **kwargs)

    @only_observes
    def _begin(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        self._facts = dataclasses.replace(
            self.facts(args, state, kwargs["optimizer"], kwargs["lr_scheduler"]),
            passes=data_passes(args, state, kwargs.get("train_dataloader")),
            trained_share=_trained_share(kwargs["model"]),
        )
        stored = state.stateful_callbacks.get(self._state_key, []) if state.global_step > 0 else []
        self.findings, self._trace = [Finding(**finding) for finding in stored], []
        # Each resume can go wrong anew.
        self._said = {finding.rule for finding in self.findings} - {"optimizer_restarted"}
        self._forget_model()
        self._failed, self._clock = False, LoaderClock()
        if state.is_world_process_zero:
            self._watch = ForwardWatch(kwargs["model"])
            # The model of DeepSpeed or FSDP can only be called by all processes together.
            self._measures_packing = sharding_engine(args) is None
            self._look(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._clock.begin_step(seconds_outside(state))

    @only_observes
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._clock.end_step(seconds_outside(state))
        if self._watch is None or state.global_step != self._facts.start_step + 1:
            return
        self._facts = _with_plan(self._facts, _inner(kwargs["lr_scheduler"]), state.global_step)
        self._measure_packing(kwargs["model"])
        self._look(state)
        self._facts = dataclasses.replace(self._facts, plan=None)  # looked at once
        self._clock.mark(seconds_outside(state))

    @only_observes
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Of the update that was made: when it is logged, the scheduler has written the next one.
        self._used_lr = float(kwargs["optimizer"].param_groups[0]["lr"])

    @in_turn(READ)
    @only_observes
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        self._clock.mark(seconds_outside(state))
        if self._watch is None or "loss" not in logs:
            return
        entry = {**logs, "step": state.global_step, "scheduler_steps": scheduler_steps(kwargs["lr_scheduler"])}
        entry |= group_lrs(kwargs["optimizer"], kwargs["lr_scheduler"])
        entry["optimizer_lr"] = self._used_lr
        entry["pad_ratio"] = self._watch.take_pad_ratio()
        entry["labels_in_loss"] = self._watch.take_label_ratio()
        if (waited := self._clock.take()) is not None:
            entry |= {WAIT_FRACTION: waited.fraction, WAIT_SECONDS: waited.seconds}
        if in_probe(state):
            return  # an LR that is only tried, and the losses that it gives, are no symptoms
        self._trace.append(entry)
        self._measure_packing(kwargs["model"])
        self._look(state)
        self._clock.mark(seconds_outside(state))

    @only_observes
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last_look(args, state, **kwargs)
        self._forget_model()
        if state.is_world_process_zero:
            name, lines = type(self).__name__, [str(finding) for finding in self.findings]
            head = f"{name}: {len(lines) or 'no'} finding{'s' * (len(lines) != 1)} in {state.global_step} updates."
            head += " It stopped watching before the end." * self._failed
            self.say("\n- ".join([head, *lines]))

    # ---- helpers ----

    @property
    def _state_key(self) -> str:
        return f"hf_effi.{type(self).__name__}"

    def _measure_packing(self, model: torch.nn.Module) -> None:
        """Measure once, after the first packed batch; it is looked for at the first update and at every log entry."""
        packed = self._watch.take_packed() if self._watch is not None and self._measures_packing else None
        if packed is not None:
            self._facts = dataclasses.replace(self._facts, leak=document_leak(model, packed))

    def _last_look(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """What is looked at once more when training is over."""

    def _look(self, state: TrainerState) -> None:
        for finding in diagnose(self._trace, self._facts, self.limits, self.rules, tuple(self._said)):
            self._said.add(finding.rule)
            self.findings.append(finding)
            self.say(f"{type(self).__name__}, {finding}")
        state.stateful_callbacks[self._state_key] = [dataclasses.asdict(finding) for finding in self.findings]

    def stop_observing(self, error: Exception) -> None:
        """Say that the watching is over, and let go of the model."""
        self._forget_model()
        if not self._failed:
            logger.warning(f"{type(self).__name__} stopped watching, and the run goes on: {describe(error)}")
        self._failed = True

    def _forget_model(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None


class GRPODoctor(TrainDoctor):
    """
    [`TrainDoctor`] with the rules of GRPO, for a stock `trl.GRPOTrainer` or an `EffiGRPOTrainer`.

    Args:
        limits ([`GRPOLimits`], *optional*): Thresholds.
        say (`Callable[[str], None]`, *optional*): As in [`TrainDoctor`].
        probe (`Callable`, *optional*): Called with the model after training, on the first process; returns a
            [`~hf_effi.functional.data.ContaminationReport`], as [`~hf_effi.data.ContaminationProbe`] does. It costs
            two answers for each of its prompts. Not called under DeepSpeed or FSDP, whose model one process alone
            cannot run: that is said once.

    Attributes:
        contamination ([`~hf_effi.functional.data.ContaminationReport`], *optional*): What the probe found.

    Raises:
        RefusedError: the trainer is not one of GRPO.
        ValueError: `probe` cannot be called.

    Example:
    ```python
    doctor = GRPODoctor(GRPOLimits(truncated=0.8))
    GRPOTrainer(model, reward, args, train_dataset=prompts, callbacks=[doctor]).train()
    ```
    """

    rules = GRPO_RULES
    limits_class = GRPOLimits

    @keeps_arguments
    def __init__(
        self,
        limits: GRPOLimits | None = None,
        say: Callable[[str], None] = logger.warning,
        probe: Callable[[Any], ContaminationReport] | None = None,
    ) -> None:
        super().__init__(limits, say)
        if probe is not None and not callable(probe):
            raise ValueError(f"probe={probe!r} must be called with a model, as ContaminationProbe(...) can be.")
        self.probe = probe
        self.contamination: ContaminationReport | None = None

    @only_observes
    def _last_look(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        if self.probe is None or self._failed or not state.is_world_process_zero:
            return
        if (engine := sharding_engine(args)) is not None:
            logger.warning(f"GRPODoctor: the probe is left out, as {engine} shards the model. Run it afterwards.")
            return
        self.contamination = self.probe(kwargs["model"])
        self._facts = dataclasses.replace(self._facts, contamination=self.contamination)
        self._look(state)

    def check(self, args: Any) -> None:
        if not hasattr(args, "max_completion_length") or not hasattr(args, "beta"):
            raise RefusedError(
                f"GRPODoctor found a {type(args).__name__}, which is no GRPO config. Use TrainDoctor() with this "
                "trainer."
            )

    def facts(self, args: Any, state: TrainerState, optimizer: Any, scheduler: Any) -> RunFacts:
        return dataclasses.replace(
            super().facts(args, state, optimizer, scheduler),
            max_completion_length=args.max_completion_length,
            beta=args.beta,
            num_iterations=args.num_iterations,
            mask_truncated=getattr(args, "mask_truncated_completions", False),
        )


@torch.no_grad()
def document_leak(model: torch.nn.Module, like: Mapping[str, Any]) -> float | None:
    """
    Return by how much a packed document's logits change, relative to their size, when its neighbour changes.

    Args:
        model: Called twice on two documents of four tokens, in evaluation mode; modes are put back.
        like (`Mapping`): Arguments of a training batch, see `ForwardWatch.packed`. An attention mask, sequence
            boundaries and `use_cache` are passed here where they were passed there.

    Returns:
        `None` where the model returns no logits.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().num_embeddings
    inputs: dict[str, Any] = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)}
    if like.get("attention_mask") is not None:
        inputs["attention_mask"] = torch.ones_like(inputs["position_ids"])
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    inputs |= {name: bounds for name in ("cu_seq_lens_q", "cu_seq_lens_k") if like.get(name) is not None}
    inputs |= {name: 4 for name in ("max_length_q", "max_length_k") if like.get(name) is not None}
    if "use_cache" in like:
        inputs["use_cache"] = like["use_cache"]
    modes = [module.training for module in model.modules()]
    model.eval()
    try:
        logits = []
        for first in (range(4), range(4, 8)):
            tokens = torch.tensor([[*first, *range(8, 12)]], device=device) % vocabulary
            logits.append(getattr(model(input_ids=tokens, **inputs), "logits", None))
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    if any(value is None for value in logits):
        return None
    one, two = (value[0, 4:].float() for value in logits)
    return float((one - two).abs().max() / one.abs().max().clamp_min(1e-12))


def _inner(scheduler: Any) -> Any:
    """Return the scheduler inside accelerate's wrapper."""
    return getattr(scheduler, "scheduler", scheduler)


def scheduler_steps(scheduler: Any) -> int | None:
    """Return the scheduler's own count; `None` where it counts no updates."""
    inner = _inner(scheduler)
    if type(inner).__name__ in _METRIC_DRIVEN:
        return None
    return getattr(inner, "last_epoch", None)


def group_lrs(optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """
    Return the LR that the optimizer uses and the one that the scheduler set last, of each group with weights to train.
    """
    used = {
        place: float(group["lr"])
        for place, group in enumerate(optimizer.param_groups)
        if any(weight.requires_grad and weight.numel() for weight in group["params"])
    }
    found: dict[str, Any] = {"optimizer_lr": float(optimizer.param_groups[0]["lr"]), "optimizer_lrs": used}
    if hasattr(_inner(scheduler), "get_last_lr"):
        planned = enumerate(_inner(scheduler).get_last_lr())
        found["scheduler_lrs"] = {place: float(lr) for place, lr in planned if place in used}
    return found


def _with_plan(facts: RunFacts, scheduler: Any, done_steps: int) -> RunFacts:
    """Add the scheduler's plan, and leave the factors out to which it cannot be followed."""
    plan = None if type(scheduler).__name__ in _METRIC_DRIVEN else scheduler_plan(scheduler, done_steps)
    if plan is None or plan.reach is None:
        return dataclasses.replace(facts, plan=plan)
    near = tuple(factor for factor in facts.factors if 1.25 * factor * facts.max_steps <= plan.reach)
    return dataclasses.replace(facts, plan=plan, factors=near)


def _first_entropies(state: TrainerState) -> tuple[float, ...]:
    """Return the first three entropies that the run logged before it was resumed."""
    values = [entry.get("entropy") for entry in state.log_history if "loss" in entry] if state.global_step else []
    return tuple(float(value) for value in values if isinstance(value, (int, float)))[:3]


def data_passes(args: Any, state: TrainerState, loader: Any) -> float | None:
    """
    Return how many times the whole run goes over its training rows.

    `None` where the loader has no length, and where the trainer generates what it trains on, so that a prompt that
    comes again brings another text.
    """
    if loader is None or hasattr(args, "max_completion_length") or not hasattr(loader, "dataset"):
        return None
    if not hasattr(loader.dataset, "__len__"):
        return None
    updates = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
    return state.max_steps / updates


def _trained_share(model: torch.nn.Module) -> float:
    # ZeRO-3 keeps an empty tensor in the place of each weight, and its size beside it.
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trained in sizes if trained) / max(sum(size for size, _ in sizes), 1)


def optimizer_steps(optimizer: Any) -> int | None:
    """Return the updates that an optimizer has counted: 0 where its memory is empty, `None` where it keeps none."""
    inner = getattr(optimizer, "optimizer", optimizer)
    counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
    if counts:
        return max(counts)
    group = inner.param_groups[0]
    remembers = "betas" in group or "beta1" in group or group.get("momentum", 0) > 0
    return 0 if remembers and not any(inner.state.values()) else None
