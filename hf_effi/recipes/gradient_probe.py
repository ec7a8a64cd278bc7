"""The gradient of single rows, matrix by matrix, with exact singular values: how evenly a model learns from data."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.snapshot import restore_rng, take_rng
from ..errors import RefusedError
from ..functional.causes import mean_absolute_difference
from ..functional.probes import probing_model
from ..optim.layer_parts import LayerWeight, layer_weights

#: numbers of one gradient
MEASURES = ("frobenius", "nuclear", "largest", "smallest", "mean", "maximum", "minimum")


@dataclasses.dataclass(frozen=True)
class MatrixGradient:
    """
    The gradient of one matrix, as means over the rows.

    Args:
        name, layer, part (`str`): See [`~hf_effi.optim.layer_parts.LayerWeight`].
        frobenius (`float`): Root of the sum of squares.
        nuclear, largest, smallest (`float`): Sum, largest and smallest of the singular values.
        mean, maximum, minimum (`float`): Of the entries.
    """

    name: str
    layer: str
    part: str
    frobenius: float
    nuclear: float
    largest: float
    smallest: float
    mean: float
    maximum: float
    minimum: float


@dataclasses.dataclass(frozen=True)
class GradientProbe:
    """
    What [`probe_gradients`] returns; `print` it for a table of the parts.

    Args:
        matrices (`tuple[MatrixGradient, ...]`): In the order of the model.
        rows (`int`): How many rows they are means of.
    """

    matrices: tuple[MatrixGradient, ...]
    rows: int

    @property
    def parts(self) -> list[str]:
        """The modules inside of the layers, such as `self_attn.q_proj`, in order."""
        return list(dict.fromkeys(matrix.part for matrix in self.matrices))

    def curve(self, part: str, measure: str = "nuclear") -> list[float]:
        """
        Return one number for each layer that has the part, in order.

        Raises:
            ValueError: no such part or measure.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r} must be one of {', '.join(MEASURES)}.")
        found = [getattr(matrix, measure) for matrix in self.matrices if matrix.part == part]
        if not found:
            raise ValueError(f"part={part!r} is not in this model. It has: {', '.join(self.parts)}.")
        return found

    def unevenness(self, part: str, measure: str = "nuclear") -> float:
        """Return the mean absolute difference (MAD) of [`curve`] from layer to layer."""
        return mean_absolute_difference(self.curve(part, measure))

    def relative_unevenness(self, part: str, measure: str = "nuclear") -> float:
        """Return [`unevenness`] over the mean of the curve; 0 where that is 0."""
        mean = statistics.fmean(self.curve(part, measure))
        return self.unevenness(part, measure) / mean if mean else 0.0

    def __str__(self) -> str:
        width = max((len(part) for part in self.parts), default=4)
        head = f"{'part':<{width}}  nuclear, first to last layer"
        lines = [head]
        for part in self.parts:
            curve = " ".join(f"{value:.3g}" for value in self.curve(part))
            lines.append(
                f"{part:<{width}}  {curve}  (MAD {self.unevenness(part):.3g}, relative "
                f"{self.relative_unevenness(part):.2f})"
            )
        return "\n".join(lines)


def probe_gradients(model: nn.Module, rows: Iterable[Mapping[str, Any]]) -> GradientProbe:
    """
    Return the gradient of the loss of each row alone, matrix by matrix, averaged over the rows.

    One row at a time, in evaluation mode. Only tokens whose label is not -100 count: put -100 on the prompt to see
    what an answer teaches. Nothing is changed: gradients, mode and random numbers are left as they were.

    Formula, for the singular values `s_i` of a gradient: `nuclear = sum_i s_i`. From What Happened in LLMs Layers when
    Trained for Fast vs. Slow Thinking (2410.23743): answers without their working give larger gradients, and more
    uneven ones from layer to layer.

    Args:
        model (`torch.nn.Module`): Returns a `loss` for `input_ids` and `labels`, as those of transformers do. Its
            trained matrices inside of the layers are read; it must fit on its device with the gradients of all.
        rows (`Iterable[Mapping]`): Each with `input_ids` and `labels` of one dimension; what else they hold is passed
            on.

    Raises:
        ValueError: no rows, no trained matrix in a layer, or a row without labels.
        RefusedError: sharded weights, or a model that returns no loss.

    Example:
    ```python
    >>> from hf_effi.demo import toy
    >>> probe = probe_gradients(toy().model, [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}])
    >>> probe.parts[:2], probe.rows, len(probe.curve("self_attn.q_proj"))
    (['self_attn.q_proj', 'self_attn.k_proj'], 1, 2)

    ```
    """
    weights = [weight for weight in layer_weights(model) if weight.is_matrix]
    if not weights:
        raise ValueError("The model has no trained matrix inside of its layers. Unfreeze some, or pass another model.")
    if any(hasattr(w.parameter, "ds_id") or hasattr(w.parameter, "full_tensor") for w in weights):
        raise RefusedError(
            "probe_gradients takes singular values of whole gradients, and the weights of this model are sharded. "
            "Load the saved weights into a plain model and pass that."
        )
    sums, count = torch.zeros(len(weights), len(MEASURES), dtype=torch.float64), 0
    rng, modes = take_rng(), {module: module.training for module in model.modules()}
    try:
        model.eval()
        with probing_model(model), torch.enable_grad():
            for row in rows:
                sums += _of_row(model, weights, row)
                count += 1
    finally:
        restore_rng(rng)
        for module, training in modes.items():
            module.training = training
    if not count:
        raise ValueError("rows is empty. Pass at least one row with input_ids and labels.")
    means = (sums / count).tolist()
    found = [
        MatrixGradient(weight.name, weight.layer, weight.part, *numbers)
        for weight, numbers in zip(weights, means, strict=True)
    ]
    return GradientProbe(tuple(found), count)


def _of_row(model: nn.Module, weights: list[LayerWeight], row: Mapping[str, Any]) -> torch.Tensor:
    if "labels" not in row or all(int(label) == -100 for label in row["labels"]):
        raise ValueError("A row has no label that is learned. Give each row labels, with -100 on its prompt only.")
    device = weights[0].parameter.device
    batch = {name: torch.as_tensor(value).unsqueeze(0).to(device) for name, value in row.items()}
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise RefusedError(f"{type(model).__name__} returns no loss for labels. Pass a model with a language head.")
    gradients = torch.autograd.grad(loss, [weight.parameter for weight in weights], allow_unused=True)
    found = []
    for weight, gradient in zip(weights, gradients, strict=True):
        found.append(_measures(torch.zeros_like(weight.parameter) if gradient is None else gradient))
    return torch.stack(found).cpu().double()


def _measures(gradient: torch.Tensor) -> torch.Tensor:
    """Return the numbers of one gradient, in the order of [`MEASURES`]."""
    matrix = gradient.detach().float()
    values = torch.linalg.svdvals(matrix)
    return torch.stack(
        [
            torch.linalg.vector_norm(matrix), values.sum(), values.max(), values.min(),
            matrix.mean(), matrix.max(), matrix.min(),
        ]
    )  # fmt: skip
