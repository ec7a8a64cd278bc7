"""Updates of a Trainer's own, tried and undone: what `lr_range_test` does with a Trainer."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..callbacks._engines import sharding_engine
from ..callbacks._lr_search import mean_over_ranks
from ..checkpoint.snapshot import restore_rng, take_rng
from ..errors import RefusedError
from ..functional.probes import probing_model
from ..functional.schedules.range_curve import RangeCurve
from ..optim.report import innermost
from ..patching import is_sharded, out_of_reach

#: what the arguments of a sweep are, where the Trainer's have such a field: nothing but updates at the sweep's rates
_QUIET = {
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "lr_schedule": None,
    "lr_schedule_kwargs": None,
    "lr_schedule_on_mismatch": "error",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "auto_find_batch_size": False,
    "push_to_hub": False,
}
#: attributes that hold what a pass over the data moves; a sweep gets copies
_MOVED = ("data_collator", "train_sampler", "batch_transform", "sequence_length")
#: containers that only hold rows, and may be large
_ROWS = ("train_dataset", "eval_dataset", "_eval_dataloaders")


def check_trainer(trainer: Trainer) -> None:
    """
    Refuse a Trainer whose updates cannot be undone, or whose loss says nothing about the learning rate.

    Raises:
        RefusedError: DeepSpeed, FSDP or tensor parallelism; GRPO and other trainers with rewards; an optimizer that
            steps in the backward; a stream that may be read once only; a Trainer that is training.
    """
    name = type(trainer).__name__
    engine, model = sharding_engine(trainer.args), model_of(trainer)
    if engine is not None or is_sharded(model) or out_of_reach(model):
        raise RefusedError(
            f"lr_range_test puts whole weights back after it has tried updates, but {engine or 'an engine'} has them "
            f"in parts. Run it on a {name} of one device or with DDP; the rate is that of the same batch size."
        )
    if hasattr(trainer, "reward_funcs") or hasattr(trainer, "_generate_and_score_completions"):
        raise RefusedError(
            f"lr_range_test reads the training loss, and that of {name} does not fall while it learns: advantages "
            "of a group have mean 0. Compare short runs by their reward instead, or test the rate of SFT."
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optim or "layerwise" in optim:
        raise RefusedError(
            f"optim={optim!r} steps in the backward, before lr_range_test can set the LR of the update. Use an "
            "optimizer that steps after it, such as 'adamw_torch'."
        )
    data = trainer.train_dataset
    if isinstance(data, IterableDataset) and not hasattr(data, "set_epoch"):
        raise RefusedError(
            f"train_dataset is a {type(data).__name__}, a stream of which lr_range_test cannot know whether it begins "
            "anew. Pass a dataset with a length, or a datasets.IterableDataset."
        )
    if trainer.is_in_train:
        raise RefusedError("lr_range_test was called while the Trainer trains. Call it before trainer.train().")


def model_of(trainer: Trainer) -> torch.nn.Module:
    """Return the model of a Trainer that has been built, which always has one."""
    model: Any = trainer.model
    return model


class _Sweep(TrainerCallback):
    """Set the LR of each update, and read its loss."""

    def __init__(self, trainer: Trainer, low: float, high: float, steps: int, curve: RangeCurve) -> None:
        self.low, self.high, self.steps, self.curve = low, high, steps, curve
        self._micro: list[torch.Tensor] = []
        self._ratios: list[float] = []
        self._step = trainer.training_step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self._step(*args, **kwargs)
        self._micro.append(loss.detach())
        return loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.max_steps < self.steps:
            raise ValueError(
                f"steps={self.steps} is more than the {state.max_steps} updates of the run. Ask for at most "
                f"{state.max_steps}, or make the run longer."
            )
        rates = [group.get("initial_lr", group.get("lr")) for group in kwargs["optimizer"].param_groups]
        if any(rate is None for rate in rates) or not any(float(rate) > 0 for rate in rates):
            raise RefusedError(
                f"The groups of {type(innermost(kwargs['optimizer'])).__name__} have the learning rates {rates}: none "
                "is above 0. Give the optimizer a learning rate."
            )
        first = next(float(rate) for rate in rates if float(rate) > 0)
        self._ratios = [float(rate) / first for rate in rates]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for group, ratio in zip(kwargs["optimizer"].param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self._rate * ratio)
            else:
                group["lr"] = self._rate * ratio

    @property
    def _rate(self) -> float:
        done = len(self.curve.losses)
        return self.low * (self.high / self.low) ** (done / (self.steps - 1))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # As the Trainer logs it: the sum over the micro-batches, the mean over the processes, so that all agree.
        loss = mean_over_ranks(float(torch.stack(self._micro).sum()), args.device)
        self._micro = []
        goes_on = self.curve.push(self._rate, loss)
        control.should_training_stop = not goes_on or len(self.curve.losses) >= self.steps


def sweep_trainer(trainer: Trainer, curve: RangeCurve, low: float, high: float, steps: int, seed: int | None) -> None:
    """
    Train for `steps` updates at rising rates, then put everything back, to the bit.

    Args:
        trainer (`Trainer`): Checked by [`check_trainer`].
        curve ([`RangeCurve`]): Filled.
        low, high (`float`), steps (`int`): `lr_t = low (high/low)^(t/(steps-1))`.
        seed (`int`, *optional*): Of the random numbers of this sweep; `None` draws what a run would draw now.
    """
    with _undone(trainer):
        sweep = _Sweep(trainer, low, high, steps, curve)
        trainer.callback_handler.callbacks = [sweep]
        vars(trainer)["training_step"] = sweep.training_step
        if seed is not None:
            torch.manual_seed(seed)
        trainer.train()


@contextlib.contextmanager
def _undone(trainer: Trainer) -> Iterator[None]:
    """Let a Trainer train without its callbacks, and without a trace."""
    model = model_of(trainer)
    with contextlib.ExitStack() as kept:
        kept.callback(gc.collect)  # last of all, so that no wrapper of DDP is left with hooks on the parameters
        kept.callback(restore_rng, take_rng())
        kept.enter_context(_same_weights(model))
        kept.enter_context(_same_attributes(model))
        kept.enter_context(_same_attributes(trainer.accelerator))
        kept.enter_context(_same_attributes(trainer.accelerator.gradient_state))
        if (scaler := trainer.accelerator.scaler) is not None:
            kept.callback(scaler.load_state_dict, copy.deepcopy(scaler.state_dict()))
        if trainer.optimizer is not None:
            kept.enter_context(_on_copied_state(trainer.optimizer))
        kept.enter_context(_same_attributes(trainer))
        for name, value in list(vars(trainer).items()):
            if name not in _ROWS:
                vars(trainer)[name] = copy.deepcopy(value) if name in _MOVED else _copy_containers(value)
        args = trainer.args = copy.copy(trainer.args)
        for name, value in _QUIET.items():
            if hasattr(args, name):
                setattr(args, name, value)
        trainer.callback_handler = copy.copy(trainer.callback_handler)
        trainer.control = TrainerControl()
        vars(trainer).update(lr_scheduler=None, model_init=None)
        kept.enter_context(probing_model(model))
        yield


@contextlib.contextmanager
def _same_attributes(thing: Any) -> Iterator[None]:
    """Give an object its attributes back as they were; what they point to is not looked into."""
    before = dict(vars(thing))
    try:
        yield
    finally:
        now = vars(thing)
        for name in [name for name in now if name not in before]:
            del now[name]
        now.update(before)


@contextlib.contextmanager
def _same_weights(model: torch.nn.Module) -> Iterator[None]:
    """Put back what an update changes: trained parameters, buffers, gradients, and the mode of each module."""
    places = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    tensors = [(one, one.data) for one in (*model.parameters(), *model.buffers())]
    # A parameter that is not trained may be given another storage, but its values stay.
    copies = [(data, data.clone()) for one, data in tensors if one.requires_grad or not _is_parameter(one)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, parameters, buffers in places:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for data, before in copies:
            data.copy_(before)
        for parameter, _ in gradients:
            parameter.grad = None  # of the sweep; its device may differ
        for one, data in tensors:
            one.data = data
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


@contextlib.contextmanager
def _on_copied_state(optimizer: Any) -> Iterator[None]:
    """Let an optimizer, and those inside of it, step on copies of their state and groups."""
    copies: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if id(value) not in copies:
            copies[id(value)] = (value, _copy_state(value))
        return copies[id(value)][1]

    with contextlib.ExitStack() as kept:
        for inner in _with_parts(optimizer, set()):
            kept.enter_context(_same_attributes(inner))
            if "state" in vars(inner):
                inner.state = copied(inner.state)
            if "param_groups" in vars(inner):
                inner.param_groups = [copied(group) for group in inner.param_groups]
        yield


def _with_parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield an optimizer, what wraps it, and the optimizers that it is made of."""
    if isinstance(value, torch.optim.Optimizer):
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            for part in list(vars(value).values()):
                yield from _with_parts(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _with_parts(part, seen)


def _copy_state(value: Any) -> Any:
    """Copy containers and tensors of an optimizer's state; parameters, which are keys or of a group, stay the same."""
    if isinstance(value, torch.nn.Parameter):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, {key: _copy_state(one) for key, one in value.items()})
    if isinstance(value, dict):
        return type(value)({key: _copy_state(one) for key, one in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_copy_state(one) for one in value)
    return value


def _copy_containers(value: Any) -> Any:
    """Copy lists, dicts, sets and deques, however deep, and nothing else."""
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, {key: _copy_containers(one) for key, one in value.items()})
    if type(value) is dict:
        return {key: _copy_containers(one) for key, one in value.items()}
    if type(value) is list:
        return [_copy_containers(one) for one in value]
    if type(value) is deque:
        return deque((_copy_containers(one) for one in value), value.maxlen)
    return set(value) if type(value) is set else value
