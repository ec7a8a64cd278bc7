"""Callbacks that multiply the scheduled LR by what the run itself says: hypergradient, accuracy, gradient SNR."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._files import load_state
from ..errors import RefusedError
from ..functional.kept_arguments import keeps_arguments
from ..functional.schedules._checks import check_number
from ..functional.schedules.adaptive import AccuracyGradient, GradientSNR, Hypergradient
from ._engines import sharding_engine
from ._lr_factors import LRFactorCallback
from ._side_file import SideFileCallback
from ._turns import MEASURE, in_turn
from .lr_schedule import check_scheduler
from .probing import in_probe, outside_probes

logger = logging.getLogger(__name__)


class _RuleCallback(LRFactorCallback):
    """
    Multiplies the scheduled LR by what a rule says, whose state is in the checkpoint. Probes are not shown to the
    rule.
    """

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self._fresh = copy.deepcopy(rule.state_dict())

    @property
    def key(self) -> str:
        """Key of the rule's state in `TrainerState.stateful_callbacks`."""
        return f"hf_effi.{self.factor}"

    def multiplier(self, state: TrainerState, scheduler: LambdaLR) -> float:
        return self.rule.multiplier

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_scheduler(kwargs.get("lr_scheduler"), type(self).__name__)
        super().on_train_begin(args, state, control, **kwargs)
        # A callback may train again, as in a search, and then knows nothing of the last run.
        stored = state.stateful_callbacks.get(self.key) if state.global_step > 0 else None
        self.rule.load_state_dict(copy.deepcopy(self._fresh if stored is None else stored))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        state.stateful_callbacks[self.key] = self.rule.state_dict()


class HypergradientCallback(SideFileCallback, _RuleCallback):
    """
    [`Hypergradient`] on a stock Trainer: one more copy of the parameters and of their last update.

    Args:
        kappa, limit, step_limit: See [`Hypergradient`].

    Raises:
        ValueError: parameters are sharded (FSDP, DeepSpeed), where a rank sees only a part of the update.
    """

    factor = "hypergradient"
    side_file = "hf_effi_hypergradient.pt"

    @keeps_arguments
    def __init__(self, kappa: float = 0.1, limit: float = 10.0, step_limit: float = 1.1) -> None:
        super().__init__(Hypergradient(kappa, limit, step_limit))
        self._before: list[torch.Tensor] = []
        self._update: list[torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_sharded(args, "HypergradientCallback")
        super().on_train_begin(args, state, control, **kwargs)
        self._parameters = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self._update = None
        if state.global_step > 0 and self.key in state.stateful_callbacks:
            self._restore(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self._before = [] if in_probe(state, 1) else [p.detach().clone() for p in self._parameters]

    @in_turn(MEASURE)
    @outside_probes
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        update = [(p.detach() - old).float() for p, old in zip(self._parameters, self._before, strict=True)]
        self._before = []
        size = sum(float(u.square().sum()) for u in update) ** 0.5
        if self._update is not None and size > 0:
            last = sum(float(u.square().sum()) for u in self._update) ** 0.5
            inner = sum(float((a * b).sum()) for a, b in zip(update, self._update, strict=True))
            self.rule.push(inner / (size * last))
        if size > 0:
            self._update = update

    def side_state(self, args: TrainingArguments, state: TrainerState) -> list[torch.Tensor] | None:
        return self._update if args.should_save else None

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        path = self.side_path(args, state)
        if path.is_file():
            self._update = load_state(path, args.device)
        elif args.process_index == 0:
            logger.warning(
                "%s is missing: the checkpoint lies elsewhere, was copied in part, or nothing had moved the weights "
                "before it. The first update after the resume does not change the learning rate.",
                path,
            )


class AccuracyGradientCallback(_RuleCallback):
    """
    [`AccuracyGradient`] on a stock Trainer: acts after each evaluation.

    Args:
        metric (`str`, *optional*, defaults to `"eval_accuracy"`): Name of the metric in the evaluation's output.
        min_lr (`float`, *optional*, defaults to 1e-6): Lowest LR.
        kwargs: See [`AccuracyGradient`].

    Raises:
        RefusedError: no evaluation is set up.
        ValueError: an evaluation has no such metric.
    """

    factor = "accuracy_gradient"

    @keeps_arguments
    def __init__(self, metric: str = "eval_accuracy", min_lr: float = 1e-6, **kwargs: Any) -> None:
        check_number("min_lr", min_lr, 0.0, math.inf)
        if not isinstance(metric, str):
            raise ValueError(f"metric={metric!r} is not a name. Pass that of an evaluation's output: 'eval_accuracy'.")
        super().__init__(AccuracyGradient(**kwargs))
        self.metric, self.min_lr = metric, min_lr

    @property
    def lowest_lr(self) -> float:
        return self.min_lr

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise RefusedError("AccuracyGradientCallback acts on evaluations. Set eval_strategy='steps' or 'epoch'.")
        super().on_train_begin(args, state, control, **kwargs)

    @outside_probes
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if self.metric not in metrics:
            raise ValueError(f"The evaluation has no {self.metric!r}. It has: {', '.join(sorted(metrics))}.")
        self.rule.push(float(metrics[self.metric]))
        state.stateful_callbacks[self.key] = self.rule.state_dict()


class GradientSNRCallback(_RuleCallback):
    """
    [`GradientSNR`] on a stock Trainer, from the micro-batches of gradient accumulation.

    The first 2h of n micro-batches (`h = (n-1)//2`) make the two halves: the last one is only seen after clipping.
    With several processes signal and noise are averaged over them.

    Args:
        memory, lowest: See [`GradientSNR`].

    Raises:
        RefusedError: `gradient_accumulation_steps` below 3; sharded gradients (FSDP, DeepSpeed).
    """

    factor = "gradient_snr"

    @keeps_arguments
    def __init__(self, memory: float = 0.95, lowest: float = 0.1) -> None:
        super().__init__(GradientSNR(memory, lowest))
        self._seen = 0
        self._first: list[torch.Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_sharded(args, "GradientSNRCallback")
        if args.gradient_accumulation_steps < 3:
            raise RefusedError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} gives no two halves of a batch. "
                "GradientSNRCallback needs at least 3 micro-batches."
            )
        super().on_train_begin(args, state, control, **kwargs)
        self._parameters = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self._seen, self._first = 0, []

    @outside_probes
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        half = (args.gradient_accumulation_steps - 1) // 2
        self._seen += 1
        if self._seen not in (half, 2 * half):
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self._parameters]
        if self._seen == half:
            self._first = [g.float().clone() for g in gradients]
            return
        second = [g.float() - f for g, f in zip(gradients, self._first, strict=True)]
        signal = sum(float((a * b).sum()) for a, b in zip(self._first, second, strict=True))
        spread = sum(float((a - b).square().sum()) for a, b in zip(self._first, second, strict=True)) / 4
        self._first = []
        noise = spread * 2 * half / args.gradient_accumulation_steps
        both = torch.tensor([signal, noise / max(1, args.world_size)], device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(both)
            both /= args.world_size
        self.rule.push(*both.tolist())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen, self._first = 0, []
        super().on_step_end(args, state, control, **kwargs)


def refuse_sharded(args: TrainingArguments, who: str) -> None:
    """
    Refuse a run in which a rank holds only a part of the parameters.

    Raises:
        RefusedError: FSDP, DeepSpeed or tensor parallelism is on.
    """
    if engine := sharding_engine(args):
        raise RefusedError(f"{who} needs whole parameters on each rank, not the shards of {engine}. Use DDP.")
