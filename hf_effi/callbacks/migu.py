"""`MIGUCallback`: update only the rows whose outputs are large, against forgetting, without old data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from ..errors import RefusedError
from ..functional import metrics
from ..functional.kept_arguments import keeps_arguments
from ..functional.migu import local_part, migu_mask, output_magnitude, random_magnitude
from ..functional.options import refuse_idle
from ..functional.schedules._checks import check_number
from ._engines import is_fsdp2, sharding_engine
from ._turns import WRITE, TurnCallback, in_turn
from .kernel_patch import refuse_data_parallel
from .owners import Role
from .probing import trained_steps

logger = logging.getLogger(__name__)
MODES, CHOICES = ("gradient", "hard"), ("magnitude", "random")


class _Layer:
    """One linear layer: what its outputs summed up to in this update, and which of its rows stay."""

    def __init__(self, name: str, module: nn.Module, parts: list[int] | None) -> None:
        self.name, self.module, self.parts = name, module, parts
        #: dimension of the weight that counts the outputs
        self.dim = 1 if isinstance(module, Conv1D) else 0
        self.outputs = module.weight.shape[self.dim]
        self.total = torch.zeros(self.outputs, dtype=torch.float64)
        self.calls = 0

    def add(self, magnitude: torch.Tensor) -> None:
        self.total += magnitude.to(self.total.device)
        self.calls += 1

    def clear(self) -> None:
        self.total.zero_()
        self.calls = 0

    def tensors(self, mask: torch.Tensor) -> list[tuple[nn.Parameter, int, torch.Tensor]]:
        """Return weight and bias that are trained, each with its dimension of outputs and its part of the mask."""
        found = []
        for parameter, dim in ((self.module.weight, self.dim), (getattr(self.module, "bias", None), 0)):
            if parameter is not None and parameter.requires_grad:
                found.append((parameter, dim, local_part(mask, _placements(parameter, dim))))
        return found


class MIGUCallback(TurnCallback):
    """
    Update only the rows of linear layers whose outputs were large in this update's batch: MIGU.

    Formula: `a_j = sum over tokens |y_j|`, over all micro-batches and processes of the update, without padding; rows
    with `a_j < quantile(a, threshold)` get no gradient, and neither do their biases. In LoRA `A` and `B` are layers
    like any other: rows of `A` by `|x A^T|`, rows of `B` by what `B` returns. An output counts when its gradient
    is computed, once, so that recomputing it in a checkpointed layer does not count again. Paper: Du et al.,
    2406.17245.

    The mask acts after clipping and after the norm of the gradient is taken, so the logged `grad_norm` is that of the
    whole gradient. Logs `effi/migu/updated_rows`.

    Args:
        threshold (`float`, *optional*, defaults to 0.7): Share of the rows of each layer that is not updated, in
            `[0, 1]`. With 0 the run is the stock one, to the bit.
        mode (`str`, *optional*, defaults to `"gradient"`): `"gradient"` masks gradients, as the paper does: momentum
            and weight decay of the optimizer still move masked rows. `"hard"` puts those rows back after the update.
        choice (`str`, *optional*, defaults to `"magnitude"`): `"random"` masks as many rows, drawn by `seed`: the
            control that tells whether magnitudes matter.
        seed (`int`, *optional*, defaults to 0): Of `choice="random"`.
        start_update (`int`, *optional*, defaults to 0): Finished updates of training before the first mask. The
            paper's first task is trained without one.
        modules (`Sequence[str]`, *optional*): Names of layers, or what stands between dots of their names: `"q_proj"`,
            with its LoRA too, or `"layers.0"`. By default every trained `nn.Linear` and `Conv1D`, but not the output
            head.
        parts (`Mapping[str, int or Sequence[int]]`, *optional*): For fused projections, by the end of their name: into
            how many equal parts the outputs fall, or their sizes. Each part then has a quantile of its own:
            `{"c_attn": 3}`. Without it all outputs of one layer are ranked together.

    Attributes:
        report (`str`): Which layers are masked and which trained matrices are not; known once training has begun.

    Raises:
        ValueError: an argument out of range; a name that no trained linear layer has.
        RefusedError: no trained linear layer; DeepSpeed, whose update is done before a callback sees the gradients;
            FSDP1 and tensor parallelism; an encoder-decoder; `torch.compile`; reentrant checkpointing; a weight that
            two modules share; a layer that has a gradient although it was never called.

    Example:
    ```python
    Trainer(model, args, train_dataset=second_task, callbacks=[MIGUCallback(threshold=0.7)]).train()
    ```
    """

    role = Role("MIGU", "Two masks of gradients want to choose the rows", "Keep one.")

    @keeps_arguments
    def __init__(
        self,
        threshold: float = 0.7,
        mode: str = "gradient",
        *,
        choice: str = "magnitude",
        seed: int = 0,
        start_update: int = 0,
        modules: Sequence[str] | None = None,
        parts: Mapping[str, int | Sequence[int]] | None = None,
    ) -> None:
        check_number("threshold", threshold, 0.0, 1.0)
        for name, value, allowed in (("mode", mode, MODES), ("choice", choice, CHOICES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}.")
        for name, number in (("seed", seed), ("start_update", start_update)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name}={number!r} must be an integer of at least 0.")
        if isinstance(modules, str) or (modules is not None and not modules):
            raise ValueError(f"modules={modules!r} must be a list of names with at least one in it, or None.")
        refuse_idle("seed", seed, 0, choice == "random", 'with choice="random"')
        self.threshold, self.mode, self.choice, self.seed = float(threshold), mode, choice, seed
        self.start_update, self.modules, self.parts = start_update, modules, parts
        self.report = ""
        self._forget()

    def _forget(self) -> None:
        self._layers: list[_Layer] = []
        self._handles: list[Any] = []
        self._real: torch.Tensor | None = None
        self._tail: int | None = None
        self._held: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = []
        self._updated: list[float] = []

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._let_go()
        self._forget()
        model = kwargs["model"]
        _refuse(args, model)
        self._layers = find_layers(model, self.modules, self.parts)
        for layer in self._layers:
            layer.total = layer.total.to(args.device)
        self.report = _report(model, self._layers)
        logger.info(self.report)
        if self.threshold == 0:
            return  # every row stays: nothing to measure
        self._handles = [model.register_forward_pre_hook(self._note_padding, with_kwargs=True)]
        self._handles += [layer.module.register_forward_hook(self._measure(layer)) for layer in self._layers]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        for layer in self._layers:
            layer.clear()

    @in_turn(WRITE)
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._held = []
        if not self._handles or trained_steps(state) < self.start_update:
            return
        self._add_up(args.world_size)
        kept = 0
        for number, layer in enumerate(self._layers):
            magnitude = layer.total
            if self.choice == "random":
                magnitude = random_magnitude(layer.outputs, self.seed, state.global_step, number).to(magnitude.device)
            mask = migu_mask(magnitude, self.threshold, layer.parts)
            kept = kept + mask.sum()
            for parameter, dim, part in layer.tensors(mask):
                self._mask(parameter, dim, part)
        self._updated.append(float(kept) / sum(layer.outputs for layer in self._layers))

    @in_turn(WRITE)
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for weight, dim, rows, values in self._held:
            weight.index_copy_(dim, rows, values)
        self._held = []

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"] and self._updated:
            share = sum(self._updated) / len(self._updated)
            self._updated = []
            kwargs["logs"][metrics.MIGU_ROWS] = state.log_history[-1][metrics.MIGU_ROWS] = share

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()
        self._forget()

    # ---- what the layers return ----

    def _note_padding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, keep = kwargs.get("attention_mask"), kwargs.get("logits_to_keep")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise RefusedError(
                "MIGUCallback leaves padding out by an attention mask of shape (rows, tokens), and this model is "
                "given one of another form. Pass such a mask, or none where no token is padding."
            )
        self._real = mask
        self._tail = keep if isinstance(keep, int) and keep > 0 else None

    def _measure(self, layer: _Layer) -> Any:
        def measure(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not torch.is_grad_enabled() or not output.requires_grad:
                return
            magnitude = output_magnitude(output, self._padding_of(layer, output))
            # The gradient of an output comes once, also where a checkpointed layer computed the output twice.
            output.register_hook(lambda gradient: layer.add(magnitude))

        return measure

    def _padding_of(self, layer: _Layer, output: torch.Tensor) -> torch.Tensor | None:
        real, shape = self._real, output.shape[:-1]
        if real is None or len(shape) == 1 and shape[0] == real.shape[0] != real.numel():
            return None  # one vector for each row: pooled
        if shape == real.shape:
            return real
        if shape.numel() == real.numel():
            return real.reshape(shape)
        if self._tail is not None and shape == (real.shape[0], min(self._tail, real.shape[1])):
            return real[:, -self._tail :]
        if bool(real.ne(0).all()):
            return None
        raise RefusedError(
            f"MIGUCallback cannot tell which outputs of {layer.name} are padding: they have shape "
            f"{tuple(output.shape)}, and the attention mask {tuple(real.shape)}. Leave that layer out by modules=..., "
            "or train without padding."
        )

    def _add_up(self, processes: int) -> None:
        """Sum over all processes, in one collective, and raise for a layer that works without being called."""
        calls = torch.tensor([layer.calls for layer in self._layers], dtype=torch.float64)
        packed = torch.cat([*(layer.total for layer in self._layers), calls.to(self._layers[0].total.device)])
        if processes > 1:
            torch.distributed.all_reduce(packed)
        *totals, calls = packed.split([*(layer.outputs for layer in self._layers), len(self._layers)])
        for layer, total, count in zip(self._layers, totals, calls.tolist(), strict=True):
            layer.total.copy_(total)
            gradient = layer.module.weight.grad
            if not count and gradient is not None and bool(_shard(gradient).ne(0).any()):
                raise RefusedError(
                    f"{layer.name} has a gradient although it was not called in this update, so its outputs are not "
                    "known: a fused layer or loss reads its weight. Switch that off, or leave the layer out by "
                    "modules=..."
                )

    @torch.no_grad()
    def _mask(self, parameter: nn.Parameter, dim: int, mask: torch.Tensor) -> None:
        weight = _shard(parameter)
        rows = mask.to(weight.device).logical_not().nonzero().flatten()
        if parameter.grad is not None:
            _shard(parameter.grad).index_fill_(dim, rows, 0.0)
        if self.mode == "hard":
            self._held.append((weight, dim, rows, weight.index_select(dim, rows)))

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def find_layers(
    model: nn.Module,
    modules: Sequence[str] | None = None,
    parts: Mapping[str, int | Sequence[int]] | None = None,
) -> list[_Layer]:
    """
    Return the layers that [`MIGUCallback`] masks, in the order of the model.

    Raises:
        ValueError: a name that no trained linear layer has, or `parts` that do not fit.
        RefusedError: no trained linear layer, or a weight that another module has too.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.requires_grad
    }
    if modules is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        named = {name: module for name, module in linear.items() if module is not head}
    else:
        for wanted in modules:
            if not any(_contains(name, wanted) for name in linear):
                raise ValueError(
                    f"modules: no trained nn.Linear or Conv1D has {wanted!r} in its name. There are: "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in linear})) or 'none'}."
                )
        named = {n: module for n, module in linear.items() if any(_contains(n, wanted) for wanted in modules)}
    if not named:
        raise RefusedError(
            "MIGUCallback finds no trained nn.Linear or Conv1D beside the output head. Train one, or take the "
            "callback out."
        )
    for wanted in parts or {}:
        if not any(_ends_with(name, wanted) for name in named):
            raise ValueError(f"parts: no masked layer has a name that ends with {wanted!r}.")
    _refuse_shared(model, named)
    return [_Layer(name, module, _sizes(name, module, parts or {})) for name, module in named.items()]


def _ends_with(name: str, wanted: str) -> bool:
    return f".{name}".endswith(f".{wanted}")


def _contains(name: str, wanted: str) -> bool:
    return f".{wanted}." in f".{name}."


def _sizes(name: str, module: nn.Module, parts: Mapping[str, int | Sequence[int]]) -> list[int] | None:
    found = next((value for wanted, value in parts.items() if _ends_with(name, wanted)), None)
    if found is None:
        return None
    outputs = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
    sizes = [outputs // found] * found if isinstance(found, int) and found > 0 else found
    if isinstance(sizes, int) or sum(sizes) != outputs or min(sizes) < 1:
        raise ValueError(f"parts: {found!r} does not divide the {outputs} outputs of {name}.")
    return list(sizes)


def _refuse_shared(model: nn.Module, named: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name or type(module).__name__)
    for name, module in named.items():
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None and len(owners[id(parameter)]) > 1:
                raise RefusedError(
                    f"{' and '.join(owners[id(parameter)])} share one weight, and a mask by the outputs of {name} "
                    "would hold back the other's gradient too. Leave it out by modules=..."
                )


def _refuse(args: TrainingArguments, model: nn.Module) -> None:
    engine = sharding_engine(args)
    if engine is not None and not is_fsdp2():
        raise RefusedError(
            f"MIGUCallback masks gradients between the backward and the update, and {engine} has no whole ones there: "
            "DeepSpeed has updated already, FSDP1 flattens weights, tensor parallelism cuts outputs. Train with DDP, "
            "FSDP2, or on one device."
        )
    refuse_data_parallel(args)
    if args.torch_compile:
        raise RefusedError("MIGUCallback watches what layers return, which torch.compile leaves out. Set it to False.")
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise RefusedError(
            "Reentrant checkpointing computes layers when the padding of their batch is no longer known. Pass "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RefusedError(
            "MIGUCallback knows one attention mask, and an encoder-decoder has a second padding in its decoder. Train "
            "a model with one stack."
        )


def _report(model: nn.Module, layers: Sequence[_Layer]) -> str:
    masked = {id(parameter) for layer in layers for parameter in layer.module.parameters(recurse=False)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    left = [name for name, p in trained.items() if id(p) not in masked and p.dim() > 1]
    share = sum(p.numel() for p in trained.values() if id(p) in masked) / sum(p.numel() for p in trained.values())
    return (
        f"MIGU masks {len(layers)} layers with {share:.0%} of the trained parameters. Matrices that it leaves alone: "
        f"{', '.join(left) or 'none'}."
    )


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _placements(parameter: torch.Tensor, dim: int) -> list[tuple[bool, int, int]]:
    """Return for each dimension of the mesh whether it cuts `dim`, into how many parts, and which one is here."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    here = mesh.get_coordinate()
    return [
        (isinstance(placement, Shard) and placement.dim == dim, mesh.size(place), here[place])
        for place, placement in enumerate(parameter.placements)
    ]
