"""Orthogonal subspace fine-tuning of PEFT: ranks by importance, and the step between two tasks (2504.07097)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.osf import OSFConfig, OSFLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import RefusedError
from ..functional.osf import likeness, retained_shares


@torch.no_grad()
def osf_rank_pattern(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], minimum: float = 0.1, target: float = 0.8
) -> dict[str, float]:
    """
    Return a `rank_pattern` for PEFT's `OSFConfig`: layers that change their input little keep more directions.

    The importance of a layer is the mean cosine similarity of its input and its output over all tokens that are no
    padding, divided by the mean over layers ([`~hf_effi.functional.osf.retained_shares`]). PEFT's `effective_rank` is
    what is kept and not trained, so a share of 0.8 trains the lowest fifth of the singular directions. Modules outside
    of the layers have no pattern and take `effective_rank`.

    Args:
        model (`torch.nn.Module`): The model before `get_peft_model`. Runs in evaluation mode, which is put back.
        batches (`Iterable[Mapping[str, Tensor]]`): Inputs of the model, such as some batches of a `DataLoader`.
        minimum (`float`, *optional*, defaults to 0.1): Least share kept. The default is from memory of the paper.
        target (`float`, *optional*, defaults to 0.8): Share kept at mean importance. From memory likewise.

    Returns:
        `dict[str, float]`: Regular expression of the names in a layer -> share of the smaller dimension.

    Raises:
        ValueError: no batch, or a share out of range.
        RefusedError: the model has no list of layers that are seen here.

    Example:
    ```python
    pattern = osf_rank_pattern(model, batches)
    model = get_peft_model(model, OSFConfig(target_modules="all-linear", rank_pattern=pattern))
    ```
    """
    retained_shares([1.0], minimum, target)  # checks the ranges
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise RefusedError(
            f"{type(model).__name__} has no GradientCheckpointingLayer (transformers' base of decoder layers), so its "
            "layers are not known. Use a model of transformers, or write the rank_pattern yourself."
        )
    names = {id(module): name for name, module in model.named_modules()}
    totals, tokens = [0.0] * len(layers), 0
    real: Tensor | None = None

    def watch(number: int) -> Any:
        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            totals[number] += float(likeness(given, output[0] if isinstance(output, tuple) else output, real))

        return add

    handles = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            device = next(model.parameters()).device
            given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            real = given.get("attention_mask")
            tokens += int(given["input_ids"].numel() if real is None else real.ne(0).sum())
            model(**given)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("batches has no token, so the importance of the layers is not known.")
    shares = retained_shares([total / tokens for total in totals], minimum, target)
    return {
        rf"(?:^|\.){re.escape(names[id(layer)])}\..*": round(share, 4)
        for layer, share in zip(layers, shares, strict=True)
    }


@torch.no_grad()
def osf_next_task(model: PeftModel, config: OSFConfig | None = None) -> list[str]:
    """
    Fold what was learned into the weights and decompose them anew: the step between two tasks.

    PEFT's `merge` changes the weights for good and leaves the layer switched off, and its `unmerge` raises. Here each
    layer is merged, decomposed again and goes on being trained; what the model computes stays the same to rounding.
    The parameters are new ones: make the next Trainer, and so the next optimizer, after this call. The adapter alone
    no longer continues the base checkpoint: save the whole model (`model.merge_and_unload().save_pretrained(...)`).

    Args:
        model (`peft.PeftModel`): With OSF adapters, one of them active.
        config (`peft.OSFConfig`, *optional*): With a new `rank_pattern` or `effective_rank`; the present ranks if
            `None`. Names are looked up as PEFT does.

    Returns:
        `list[str]`: The layers that were decomposed.

    Raises:
        RefusedError: no OSF layer, several adapters, weights that are sharded, or layers that are merged already.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, OSFLayer)}
    if not layers:
        raise RefusedError("The model has no OSF layer. Make it with get_peft_model(model, OSFConfig(...)).")
    for name, layer in layers.items():
        if len(layer.osf_svd_params) != 1 or layer.merged:
            raise RefusedError(
                f"{name} has {len(layer.osf_svd_params)} adapters, merged: {layer.merged}. Exactly one is needed that "
                "is not merged."
            )
        if isinstance(layer.get_base_layer().weight, DTensor):
            raise RefusedError(
                f"{name} is sharded by FSDP2, and its weight cannot be decomposed in parts. Unwrap first."
            )
    for name, layer in layers.items():
        (adapter,) = layer.osf_svd_params
        settings = cast(OSFConfig, model.peft_config[adapter]) if config is None else config
        rank = layer.effective_rank[adapter]
        if config is not None:
            rank = _rank(name, min(cast(Tensor, layer.get_base_layer().weight).shape), config)
        # As PEFT made them: its base weights stay, so the change is written where it belongs.
        layer.merge(True, [adapter])  # checks that it is finite
        layer.merged_adapters.clear()
        for handle in layer.hook_handles:
            handle.remove()
        layer.hook_handles.clear()
        layer.update_layer(adapter, rank, settings)
    return list(layers)


def _rank(name: str, smaller: int, config: OSFConfig) -> int:
    """Return the rank that PEFT's config means for a layer."""
    found = next((value for key, value in (config.rank_pattern or {}).items() if re.search(key, name)), None)
    value = config.effective_rank if found is None else found
    if value is None:
        return smaller // 2
    return min(smaller, int(smaller * value) if isinstance(value, float) and 0 < value <= 1 else int(value))
