"""Callbacks that decide what each decoder layer keeps for the backward pass, on any Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import RefusedError
from ..functional.kept_arguments import keeps_arguments
from ..functional.layer_plan import plan_layer_modes
from ..memory.layer_modes import LayerModes, decoder_layers
from ..memory.layer_profile import LayerProbe, measure_copy_bandwidth
from ..patching import sharded_by_zero3
from .owners import OwningCallback, Role

logger = logging.get_logger(__name__)


class _LayerModesCallback(OwningCallback):
    """Puts modes on the layers when training begins and takes them off when it ends."""

    role = Role(
        "layer modes",
        "Two callbacks want to decide what the layers keep",
        "Use one callback for the modes of all layers: MemoryBudgetCallback mixes keeping, selecting, checkpointing "
        "and offloading.",
    )

    def __init__(self) -> None:
        self.layer_modes: LayerModes | None = None

    def _make(self, model: torch.nn.Module) -> LayerModes:
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_other_offload(args)
        super().on_train_begin(args, state, control, **kwargs)
        self._take_off()  # left by a run that failed
        self.layer_modes = self._make(kwargs["model"]).apply()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._take_off()

    def _take_off(self) -> None:
        if self.layer_modes is not None:
            self.layer_modes.undo()


def _refuse_other_offload(args: TrainingArguments) -> None:
    if getattr(args, "activation_offloading", False):
        raise RefusedError(
            "activation_offloading=True (TRL) takes every saved tensor to the host itself. Set it to False, or drop "
            "this callback."
        )


class ActivationOffloadCallback(_LayerModesCallback):
    """
    Hold the inputs of checkpointed layers in host memory, on any Trainer; gradients are equal to the bit.

    Checkpointing keeps `layers x tokens x hidden_size` values on the device. This moves them to pinned host buffers on
    a stream of their own and brings each back one layer before it is needed.

    ALST, arXiv:2506.13996.

    Args:
        keep_last (`int`, *optional*, defaults to `1`): This many of the last layers stay on the device: the backward
            pass needs them at once.

    Raises:
        RefusedError: gradient checkpointing is off or reentrant, or something else offloads already.
        ValueError: `keep_last` is not below the number of layers.

    Example:
    ```python
    args = TrainingArguments("out", activation_checkpointing=True)
    Trainer(model, args, train_dataset=rows, callbacks=[ActivationOffloadCallback()]).train()
    ```
    """

    @keeps_arguments
    def __init__(self, keep_last: int = 1) -> None:
        super().__init__()
        if not isinstance(keep_last, int) or isinstance(keep_last, bool) or keep_last < 0:
            raise ValueError(f"keep_last={keep_last!r} must be an integer of at least 0.")
        self.keep_last = keep_last

    def _make(self, model: torch.nn.Module) -> LayerModes:
        count = len(decoder_layers(model))
        if self.keep_last >= count:
            raise ValueError(
                f"keep_last={self.keep_last} leaves none of the {count} layers to offload. Allowed: 0 to {count - 1}."
            )
        return LayerModes(model, ["offload"] * (count - self.keep_last) + ["checkpoint"] * self.keep_last)

    @property
    def stats(self) -> dict[str, int]:
        """What was moved in the last run: see [`~hf_effi.memory.offload.OffloadStats`]."""
        if self.layer_modes is None:
            raise RuntimeError("there is nothing to report before training has begun.")
        return self.layer_modes.offloader.stats.as_dict()


class SelectiveCheckpointCallback(_LayerModesCallback):
    """
    Keep the attention outputs and recompute the rest of each layer, on any Trainer.

    Attention grows with the square of the length and its output with the length only: on long sequences keeping one
    more hidden-state-sized tensor a layer avoids most of the cost of checkpointing. Saved are SDPA, flash-attn and
    torch's varlen operator; see `torch.utils.checkpoint.create_selective_checkpoint_contexts`.

    Args:
        save_ops (`Iterable`, *optional*, defaults to `()`): Further operators to save, such as
            `torch.ops.aten.mm.default`.

    Raises:
        RefusedError: gradient checkpointing is off or reentrant, or sets a `context_fn` of its own.

    Example:
    ```python
    args = GRPOConfig("out", activation_checkpointing=True)
    GRPOTrainer(model, reward, args, train_dataset=rows, callbacks=[SelectiveCheckpointCallback()]).train()
    ```
    """

    @keeps_arguments
    def __init__(self, save_ops: Iterable[Any] = ()) -> None:
        super().__init__()
        self.save_ops = tuple(save_ops)

    def _make(self, model: torch.nn.Module) -> LayerModes:
        return LayerModes(model, "selective", self.save_ops)


class MemoryBudgetCallback(_LayerModesCallback):
    """
    Keep as many activations as fit: the fastest mix of keep, selective, checkpoint and offload under a budget.

    The first micro-batch runs under plain checkpointing and measures each layer; then the plan of
    [`~hf_effi.functional.layer_plan.plan_layer_modes`] holds. All ranks take the largest measurement of any rank, and
    so make the same plan. Gradients are equal for every plan.

    Args:
        budget_gib (`float`): Memory for the activations of all layers, in GiB: what they keep, and what recomputing
            one layer takes.
        max_tokens (`int`, *optional*): Tokens of the largest micro-batch (padding included), where the first one may
            be smaller. Bytes grow in proportion, masks of SDPA with the square.
        offload (`bool`, *optional*, defaults to `False`): Whether layers may be offloaded to the host. Measures the
            bandwidth first.

    Raises:
        RefusedError: gradient checkpointing is off or reentrant; parameters are sharded (FSDP, ZeRO-3), so that a
            layer cannot be run on its own.
        ValueError: no plan fits; the message says how much the smallest one needs.

    Example:
    ```python
    args = TrainingArguments("out", activation_checkpointing=True)
    callback = MemoryBudgetCallback(budget_gib=40)
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    print(callback.modes)
    ```
    """

    @keeps_arguments
    def __init__(self, budget_gib: float, *, max_tokens: int | None = None, offload: bool = False) -> None:
        super().__init__()
        if not isinstance(budget_gib, (int, float)) or isinstance(budget_gib, bool) or not budget_gib > 0:
            raise ValueError(f"budget_gib={budget_gib!r} must be a positive number of GiB.")
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise ValueError(f"max_tokens={max_tokens!r} must be a positive integer or None.")
        self.budget_gib, self.max_tokens, self.offload = budget_gib, max_tokens, offload
        #: one mode per layer, once the first micro-batch is done
        self.modes: Sequence[str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weights = list(kwargs["model"].parameters())
        if any(isinstance(p, DTensor) for p in weights) or sharded_by_zero3(weights):
            raise RefusedError(
                "MemoryBudgetCallback runs single layers to measure them, which sharded parameters (FSDP, ZeRO-3, "
                "tensor parallelism) do not allow. Use ActivationOffloadCallback or SelectiveCheckpointCallback."
            )
        self.modes = None
        super().on_train_begin(args, state, control, **kwargs)

    def _make(self, model: torch.nn.Module) -> LayerModes:
        return LayerProbe(model)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._plan(kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._plan(kwargs["model"])

    def _plan(self, model: torch.nn.Module) -> None:
        probe = self.layer_modes
        if self.modes is not None or not isinstance(probe, LayerProbe) or not probe.complete:
            return
        device = next(probe.layers[0].parameters()).device
        bandwidth = measure_copy_bandwidth(device) if self.offload else None
        probe.measured, probe.tokens, bandwidth = _largest_of_ranks(probe.measured, probe.tokens, bandwidth, device)
        tokens = max(self.max_tokens or 0, probe.tokens)
        self.modes = plan_layer_modes(probe.costs(bandwidth, tokens), round(self.budget_gib * 2**30))
        self._take_off()
        self.layer_modes = LayerModes(model, self.modes).apply()
        logger.info(f"activation plan for {tokens} tokens in {self.budget_gib} GiB: {', '.join(self.modes)}")


def _largest_of_ranks(
    measured: dict[int, dict[str, float]], tokens: int, bandwidth: float | None, device: torch.device
) -> tuple[dict[int, dict[str, float]], int, float | None]:
    """Return the largest measurement of any rank (for the bandwidth: the smallest); unchanged on one rank."""
    if not torch.distributed.is_initialized():
        return measured, tokens, bandwidth
    names = list(measured[0])
    rows = [[measured[layer][name] for name in names] for layer in range(len(measured))]
    flat = torch.tensor([*(v for row in rows for v in row), tokens, -(bandwidth or 0.0)], dtype=torch.float64)
    flat = flat.to(device)
    torch.distributed.all_reduce(flat, torch.distributed.ReduceOp.MAX)
    *values, tokens, negative = flat.tolist()
    layers = [values[i : i + len(names)] for i in range(0, len(values), len(names))]
    return (
        {layer: dict(zip(names, row, strict=True)) for layer, row in enumerate(layers)},
        int(tokens),
        None if bandwidth is None else -negative,
    )
