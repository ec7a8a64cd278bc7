"""`OSFProjectionCallback`: keeps AdamW's updates of PEFT's OSF out of the directions that are to stay."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.osf import OSFLayer
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional.kept_arguments import keeps_arguments
from ._engines import sharding_engine
from ._turns import WRITE, TurnCallback, in_turn
from .owners import Role


class OSFProjectionCallback(TurnCallback):
    """
    After each update, take out of the trained directions of PEFT's OSF what leaked into the kept ones.

    Formula: `U_low <- U_low - U_high U_high^T U_low`, and `V_low` likewise. PEFT projects gradients; AdamW then
    divides them element by element, and its result is no longer orthogonal to what is kept. With plain SGD there is
    nothing to take out beyond rounding. The optimizer's moments stay as they are. Paper: 2504.07097.

    Raises:
        RefusedError: no OSF layer; DeepSpeed, FSDP and tensor parallelism, which train other tensors than these.

    Example:
    ```python
    model = get_peft_model(model, OSFConfig(target_modules="all-linear"))
    Trainer(model, args, train_dataset=rows, callbacks=[OSFProjectionCallback()]).train()
    ```
    """

    role = Role("OSF projection", "Two callbacks project one adapter", "Keep one.")

    @keeps_arguments
    def __init__(self) -> None:
        self._layers: list[OSFLayer] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if engine := sharding_engine(args):
            raise RefusedError(
                f"OSFProjectionCallback writes whole weights, and {engine} trains others. Train with DDP or on one "
                "device."
            )
        super().on_train_begin(args, state, control, **kwargs)
        self._layers = [module for module in kwargs["model"].modules() if isinstance(module, OSFLayer)]
        if not self._layers:
            raise RefusedError("OSFProjectionCallback finds no OSF layer. Make one with OSFConfig, or take it out.")

    @in_turn(WRITE)
    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in self._layers:
            for trained in layer.osf_svd_params.values():
                project(layer, trained)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._layers = []


def project(layer: OSFLayer, trained: Any) -> None:
    """Take out of `U_low` and `V_low` of an adapter what lies in the kept directions of its layer."""
    (adapter,) = [name for name, one in layer.osf_svd_params.items() if one is trained]
    for name, kept, low in (
        ("U_low", layer._osf_U_high, layer._osf_U_low_init),
        ("V_low", layer._osf_V_high, layer._osf_V_low_init),
    ):
        weight = trained[name].data if name == "U_low" else trained[name].data.T
        # PEFT stores the kept directions only where those of the start do not tell them.
        basis = kept[adapter] if adapter in kept else low[adapter]
        basis = basis if name == "U_low" else basis.T
        inside = basis @ (basis.T @ weight)
        weight.copy_(weight - inside if adapter in kept else inside)
