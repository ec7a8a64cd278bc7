"""`AdaLoRACallback`: moves AdaLoRA's ranks on a stock Trainer, which never does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._files import load_state
from ..errors import BrokenFileError, RefusedError
from ..functional import metrics
from ..functional.kept_arguments import keeps_arguments
from ._engines import sharding_engine
from ._side_file import SideFileCallback
from ._turns import LAST, WRITE, TurnCallback, in_turn
from .owners import Role
from .probing import outside_probes, trained_steps, trained_total

STATE_FILE = "effi_adalora.pt"
#: what `RankAllocator` accumulates over the budgeting phase
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class AdaLoRACallback(TurnCallback, SideFileCallback):
    """
    Call PEFT's `update_and_allocate` after every update, so that AdaLoRA reaches its rank budget.

    Update `t = 1, 2, ...` keeps the full budget up to `tinit`, then lowers it by the cubic schedule of the paper
    (equation 12), and holds `target_r` a matrix from update `total_step - tfinal` on. transformers, TRL and accelerate
    make this call nowhere: without it AdaLoRA is a plain adapter of rank `init_r`.

    While training runs, checkpoints hold the matrices at full size, with zeros where a rank is gone: PEFT's compact
    form cannot be loaded back into the model that is being trained. The pattern returns to the config when training
    ends, so that `save_model` then writes the compact adapter.

    Args:
        set_total_step (`bool`, *optional*, defaults to `False`): Write the run's number of updates into the
            `AdaLoraConfig`, instead of raising when its `total_step` differs.

    Raises:
        ValueError: `init_r` does not exceed `target_r`, or `total_step` is not the length of the run.
        RefusedError: the model has no trainable AdaLoRA adapter that is new, or a gradient is missing or sharded
            (DeepSpeed, FSDP).
        BrokenFileError: a checkpoint has no state of this callback.

    Example:
    ```python
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=12, target_r=8, tinit=200, tfinal=500, deltaT=10, total_step=3000)
    Trainer(get_peft_model(model, config), args, train_dataset=rows, callbacks=[AdaLoRACallback()]).train()
    ```
    """

    role = Role("AdaLoRA ranks", "Two callbacks want to move the ranks of AdaLoRA", "Keep one.")
    side_file = STATE_FILE

    @keeps_arguments
    def __init__(self, set_total_step: bool = False) -> None:
        if not isinstance(set_total_step, bool):
            raise ValueError(
                f"set_total_step={set_total_step!r} must be True or False; the length itself is the Trainer's."
            )
        self.set_total_step = set_total_step
        self._adapter: AdaLoraModel | None = None
        self._pattern: dict[str, list[bool]] | None = None
        self._plan_is_checked = False

    def ranks(self) -> dict[str, int]:
        """Return the rank that each adapted matrix has been given, by module name; empty before training."""
        if self._adapter is None:
            return {}
        return {
            name.partition(".lora_E.")[0]: values.numel() if self._pattern is None else sum(self._pattern[name])
            for name, values in self._singular_values().items()
        }

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if sharding_engine(args):
            raise RefusedError(
                "AdaLoRACallback reads gradients after the update, and DeepSpeed, FSDP and tensor parallelism have "
                "freed or sharded them by then. Train with DDP or on one device."
            )
        super().on_train_begin(args, state, control, **kwargs)
        self._adapter, self._plan_is_checked = adalora_of(kwargs["model"]), False
        self._config.rank_pattern = self._pattern = None
        self._allocator.reset_ipt()
        if state.global_step > 0:
            self._restore(self.side_path(args, state))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._plan_is_checked:  # and not in on_train_begin, where another callback may still announce probes
            check_plan(self._adapter, trained_total(state), self.set_total_step)
            self._plan_is_checked = True

    @in_turn(WRITE)
    @outside_probes
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = trained_steps(state) + 1  # the Trainer counts this update only after the event
        if step < self._config.total_step - self._config.tfinal:
            if getattr(kwargs["optimizer"], "step_was_skipped", False):
                return  # an fp16 overflow: its gradients would stay in the averages for good
            check_gradients(self._adapter)
        self._config.rank_pattern = self._pattern
        self._adapter.update_and_allocate(step)
        self._pattern, self._config.rank_pattern = self._config.rank_pattern, None

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            total = sum(self.ranks().values())
            kwargs["logs"][metrics.ADALORA_RANK] = state.log_history[-1][metrics.ADALORA_RANK] = total

    def side_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        if not args.should_save:
            return None
        return {**{name: getattr(self._allocator, name) for name in _AVERAGES}, "pattern": self._pattern}

    @in_turn(LAST)
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._pattern is not None:
            # From the weights, not from the last allocation: the run may have stopped early or gone back to its best.
            self._pattern = {name: (e != 0).view(-1).tolist() for name, e in self._singular_values().items()}
            self._config.rank_pattern = dict(self._pattern)

    # ---- helpers ----

    @property
    def _allocator(self) -> Any:
        return self._adapter.rankallocator

    @property
    def _config(self) -> Any:
        return self._adapter.peft_config[self._adapter.trainable_adapter_name]

    def _singular_values(self) -> dict[str, torch.Tensor]:
        mark = f".lora_E.{self._adapter.trainable_adapter_name}"
        return {name: values for name, values in self._adapter.model.named_parameters() if name.endswith(mark)}

    def _restore(self, path: Path) -> None:
        if not path.exists():
            raise BrokenFileError(
                f"{path} is missing: the checkpoint lies elsewhere or was made without AdaLoRACallback. Resume from a "
                "folder in output_dir, or start a new run."
            )
        device = next(self._adapter.model.parameters()).device
        stored = load_state(path, device)
        if not isinstance(stored, dict) or stored.keys() != {*_AVERAGES, "pattern"}:
            raise BrokenFileError(f"{path} is not a state of AdaLoRACallback. Resume from another checkpoint.")
        self._pattern = stored.pop("pattern")
        for name, averages in stored.items():
            setattr(self._allocator, name, averages)
        # The current sensitivity is rewritten at every update; PEFT reads its keys to know that averages exist.
        self._allocator.ipt = dict(self._allocator.exp_avg_ipt)


def adalora_of(model: Any) -> AdaLoraModel:
    """Return the AdaLoRA part of a PEFT model, or raise naming what the model is instead."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, AdaLoraModel):
        method = (
            f"a PEFT model of type {base.__class__.__name__}" if hasattr(model, "peft_config") else "no PEFT model"
        )
        raise RefusedError(
            f"AdaLoRACallback found {method} in {type(model).__name__}. Wrap the model with "
            "get_peft_model(model, AdaLoraConfig(...)), or drop the callback."
        )
    if not hasattr(base, "rankallocator"):
        raise RefusedError(
            "The AdaLoRA adapter is frozen (inference_mode). Load it with is_trainable=True, or drop the callback."
        )
    return base


def check_plan(adapter: AdaLoraModel, max_steps: int, set_total_step: bool) -> None:
    """Check the config against the length of the run; with `set_total_step` write it there first."""
    config = adapter.peft_config[adapter.trainable_adapter_name]
    allocator = adapter.rankallocator
    present = sum(p.size(0) for n, p in adapter.model.named_parameters() if f"lora_A.{allocator.adapter_name}" in n)
    if present != allocator.init_bgt:
        raise RefusedError(
            f"The adapter holds {present} ranks and its config starts from {allocator.init_bgt}: it has been reduced "
            "already. Start from a new AdaLoraConfig, or train it further without AdaLoRACallback."
        )
    if config.init_r <= config.target_r:
        raise ValueError(
            f"init_r={config.init_r} must exceed target_r={config.target_r}: AdaLoRA only takes ranks away. The paper "
            "starts from 1.5 times the target."
        )
    if set_total_step:
        config.total_step = max_steps
    if config.total_step != max_steps:
        raise ValueError(
            f"AdaLoraConfig has total_step={config.total_step} and the run has {max_steps} updates of training. Set "
            f"total_step={max_steps}, or pass AdaLoRACallback(set_total_step=True)."
        )
    if config.tinit >= config.total_step - config.tfinal:
        raise ValueError(
            f"tinit={config.tinit} and tfinal={config.tfinal} leave none of the {config.total_step} updates to lower "
            "the rank in. Decrease them."
        )


def check_gradients(adapter: AdaLoraModel) -> None:
    """Raise, with its name, on the first adapter weight whose whole gradient is not here."""
    mark = f".{adapter.trainable_adapter_name}"
    for name, weight in adapter.model.named_parameters():
        if "lora_" in name and mark in name and (weight.grad is None or isinstance(weight.grad, DTensor)):
            state = "no gradient" if weight.grad is None else "a sharded gradient"
            raise RefusedError(
                f"{name} has {state} after the update, so AdaLoRA cannot score it. With DeepSpeed or FSDP use DDP "
                "instead; otherwise leave modules that the forward pass does not use out of target_modules."
            )
