"""What `CausesCallback` reads in a probed update: the gradients before clipping, the hidden states, the weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from ..functional import metrics
from ..functional.causes import (
    Outliers,
    count_outliers,
    frobenius_norm,
    mean_absolute_difference,
    root_of_squares,
    spectral_norm,
    unclipped_factor,
)
from ..functional.probes import is_probed
from ..functional.weight_norms import WeightNorm
from ..optim.layer_parts import LayerWeight, layer_modules


@dataclass(frozen=True)
class WeightGradient:
    """
    The gradient of one weight, before clipping.

    Args:
        name, layer, part (`str`): See [`~hf_effi.optim.layer_parts.LayerWeight`].
        frobenius (`float`): Its norm; 0 where none arrived.
        spectral (`float`, *optional*): Its largest singular value, from below; `None` for what is no matrix.
    """

    name: str
    layer: str
    part: str
    frobenius: float
    spectral: float | None


class ClipWatch:
    """
    Stands around `clip_grad_norm_` of an accelerator for one update, and keeps what the gradients were divided by.

    It is the norm that the call returns anyway: what the call does stays the same to the bit.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator, self._stock = accelerator, accelerator.clip_grad_norm_
        self._had_own = "clip_grad_norm_" in vars(accelerator)
        self._calls: list[tuple[Any, float]] = []
        accelerator.clip_grad_norm_ = self

    def __call__(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norm = self._stock(parameters, max_norm, norm_type)
        self._calls.append((norm, float(max_norm)))
        return norm

    def close(self) -> None:
        if vars(self._accelerator).get("clip_grad_norm_") is not self:
            return
        if self._had_own:
            self._accelerator.clip_grad_norm_ = self._stock
        else:
            del self._accelerator.clip_grad_norm_

    def factor(self) -> float:
        """Return what the gradients must be multiplied by to be those before clipping."""
        found = 1.0
        for norm, most in self._calls:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if math.isfinite(most) and math.isfinite(value := float(whole)):
                found *= unclipped_factor(value, most)
        return found

    @property
    def seen(self) -> bool:
        return bool(self._calls)


class LayerWatch:
    """
    Counts outliers behind every layer, in forwards that have gradients, until [`close`].

    Padding is left out where the model is given an attention mask of the shape of its tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(layer_modules(model))
        self._counts: dict[str, list[Tensor]] = {label: [] for label in self.layers}
        self._mask: Tensor | None = None
        self._hooks = [model.register_forward_pre_hook(self._see_mask, with_kwargs=True)]
        self._hooks += [
            layer.register_forward_hook(self._counting(label)) for label, layer in layer_modules(model).items()
        ]
        self.error: Exception | None = None

    def _see_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) else None

    def _counting(self, label: str) -> Any:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            # Generation, evaluation and reference models have no gradient.
            if self.error is not None or not torch.is_grad_enabled() or is_probed(module):
                return
            try:
                hidden = output[0] if isinstance(output, (tuple, list)) else output
                self._counts[label].append(count_outliers(hidden, self._mask))
            except Exception as error:  # whatever a layer returns: who watches must not end the run
                self.error = error

        return count

    def take(self) -> list[list[float]]:
        """Return one row of five numbers for each layer, joined over the micro-batches; zeros for one without any."""
        rows = []
        for label in self.layers:
            counts = self._counts[label]
            if not counts:
                rows.append([0.0] * 5)
                continue
            every = torch.stack([count.to(counts[0].device) for count in counts])
            joined = every.sum(0)
            joined[3] = every[:, 3].amax()
            rows.append(joined.tolist())
        return rows

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def read_gradients(weights: Sequence[LayerWeight], factor: float) -> list[WeightGradient]:
    """
    Return the gradients of weights, times `factor`. The device is waited for once.

    Raises:
        RefusedError: no weight has one.
    """
    if all(weight.parameter.grad is None for weight in weights):
        raise RefusedError(
            "no weight has a gradient before the optimizer's step, as with optimizers that update inside of the "
            "backward pass; pass gradients=False"
        )
    norms: list[Tensor] = []
    for weight in weights:
        gradient = weight.parameter.grad
        if gradient is not None:
            norms.append(frobenius_norm(gradient))
            if weight.is_matrix:
                norms.append(spectral_norm(gradient))
    numbers = iter(_to_numbers(norms))
    found = []
    for weight in weights:
        has_one = weight.parameter.grad is not None
        size = next(numbers) * factor if has_one else 0.0
        largest = (next(numbers) * factor if has_one else 0.0) if weight.is_matrix else None
        found.append(WeightGradient(weight.name, weight.layer, weight.part, size, largest))
    return found


def read_weight_norms(weights: Iterable[LayerWeight]) -> dict[str, float]:
    """Return name -> Frobenius norm of the matrices inside of the layers; not of adapters, which begin at 0."""
    matrices = [weight for weight in weights if weight.is_matrix and weight.role != "adapter"]
    norms = _to_numbers([frobenius_norm(weight.parameter) for weight in matrices])
    return {weight.name: norm for weight, norm in zip(matrices, norms, strict=True)}


def _to_numbers(scalars: Sequence[Tensor]) -> list[float]:
    return torch.stack([value.to(scalars[0].device) for value in scalars]).tolist() if scalars else []


# --- numbers for the log -------------------------------------------------------------------------------------------


def gradient_metrics(gradients: Sequence[WeightGradient]) -> dict[str, float]:
    """Return what is logged of the gradients: by layer, by part, outside of the layers."""
    layers: dict[str, list[WeightGradient]] = {}
    parts: dict[str, dict[str, list[float]]] = {}
    outer: dict[str, list[float]] = {}
    for gradient in gradients:
        if not gradient.layer:
            outer.setdefault(gradient.part, []).append(gradient.frobenius)
            continue
        layers.setdefault(gradient.layer, []).append(gradient)
        if gradient.spectral is not None:
            parts.setdefault(gradient.part, {}).setdefault(gradient.layer, []).append(gradient.frobenius)
    sizes = {layer: root_of_squares([one.frobenius for one in own]) for layer, own in layers.items()}
    found = {f"{metrics.CAUSE_LAYER_GRADIENT}{layer}": size for layer, size in sizes.items()}
    for layer, own in layers.items():
        largest = [one.spectral for one in own if one.spectral is not None]
        if largest:
            found[f"{metrics.CAUSE_LAYER_SPECTRAL}{layer}"] = max(largest)
    for part, by_layer in parts.items():
        squares = [root_of_squares(values) ** 2 for values in by_layer.values()]
        found[f"{metrics.CAUSE_PART_GRADIENT}{part}"] = math.sqrt(statistics.fmean(squares))
    found |= {f"{metrics.CAUSE_OUTER_GRADIENT}{part}": root_of_squares(values) for part, values in outer.items()}
    mean = statistics.fmean(sizes.values()) if sizes else 0.0
    if mean > 0:
        found[metrics.CAUSE_GRADIENT_UNEVENNESS] = mean_absolute_difference([*sizes.values()]) / mean
    return found


def outlier_metrics(outliers: Mapping[str, Outliers]) -> dict[str, float]:
    """Return what is logged of the hidden states behind each layer."""
    found = {}
    for layer, own in outliers.items():
        if own.tokens:
            found[f"{metrics.CAUSE_KURTOSIS}{layer}"] = own.kurtosis
            found[f"{metrics.CAUSE_OUTLIER_RATIO}{layer}"] = own.ratio
            found[f"{metrics.CAUSE_MASSIVE_TOKENS}{layer}"] = own.massive
    return found


def weight_metrics(
    weights: Iterable[LayerWeight], now: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, float]:
    """Return what is logged of the weights: each layer's norm over that at the start, and the median LR factor."""
    layers: dict[str, list[str]] = {}
    for weight in weights:
        if weight.name in now and weight.name in reference:
            layers.setdefault(weight.layer, []).append(weight.name)
    ratios = {
        layer: WeightNorm(
            layer, root_of_squares([now[n] for n in names]), root_of_squares([reference[n] for n in names])
        )
        for layer, names in layers.items()
    }
    ratios = {layer: norm for layer, norm in ratios.items() if norm.reference > 0 and norm.norm > 0}
    found = {f"{metrics.CAUSE_WEIGHT_NORM}{layer}": norm.ratio for layer, norm in ratios.items()}
    if ratios:
        found[metrics.CAUSE_EFFECTIVE_LR] = statistics.median(norm.effective_lr_factor for norm in ratios.values())
    return found
