"""How far the norms of a model's matrices have moved, and what that does to the step that a learning rate means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightNorm:
    """
    One matrix.

    Args:
        name (`str`): Of the parameter.
        norm, reference (`float`): Frobenius norms, now and of the reference.
    """

    name: str
    norm: float
    reference: float

    @property
    def ratio(self) -> float:
        """`|W| / |W_0|`; infinite where the reference is 0 and the matrix is not, 1 where both are 0."""
        if self.reference == 0:
            return 1.0 if self.norm == 0 else math.inf
        return self.norm / self.reference

    @property
    def effective_lr_factor(self) -> float:
        """
        `(|W_0| / |W|)^2`: what a gradient step is worth now, as a share of what it was, where scaling the matrix does
        not change the function (its output is normalised right after). The gradient then falls as `1 / |W|`, and so
        does what a step turns.
        """
        return self.update_factor**2

    @property
    def update_factor(self) -> float:
        """
        `|W_0| / |W|`: the same for updates whose size does not depend on the gradient's, as with Adam, Muon and signs.
        """
        return math.inf if self.ratio == 0 else 1 / self.ratio


@dataclass(frozen=True)
class WeightNormReport:
    """
    What [`weight_norm_report`] returns; `print` it for a table.

    Args:
        matrices (`tuple[WeightNorm, ...]`): In the order of the model.
    """

    matrices: tuple[WeightNorm, ...]

    def __str__(self) -> str:
        width = max((len(matrix.name) for matrix in self.matrices), default=6)
        head = f"{'matrix':<{width}}   norm now  reference    ratio  LR factor  with Adam"
        rows = [
            f"{m.name:<{width}}  {m.norm:9.4g}  {m.reference:9.4g}  {m.ratio:7.3f}  {m.effective_lr_factor:9.3f}  "
            f"{m.update_factor:9.3f}"
            for m in self.matrices
        ]
        return "\n".join([head, *rows])

    @property
    def furthest(self) -> WeightNorm | None:
        """The matrix whose norm changed by the largest factor, up or down; `None` for a model without matrices."""
        return max(self.matrices, key=lambda m: abs(math.log(m.ratio)) if m.ratio > 0 else math.inf, default=None)


@torch.no_grad()
def weight_norms(model: torch.nn.Module) -> dict[str, float]:
    """
    Return the Frobenius norm of every parameter of two or more dimensions, computed in fp32.

    Keep it at the beginning of a run as the reference of [`weight_norm_report`], in place of a copy of the weights.
    Under FSDP2 a norm is that of the whole matrix, and every rank has to call this.

    Args:
        model (`torch.nn.Module`): Tied weights are listed once.

    Raises:
        ValueError: a parameter is empty, as under ZeRO-3, whose shards only the engine can gather.

    Example:
    ```python
    >>> layer = torch.nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> weight_norms(layer)
    {'weight': 5.0}
    ```
    """
    found = {}
    for name, weight in model.named_parameters():
        if hasattr(weight, "ds_id") or weight.numel() == 0:
            raise ValueError(
                f"{name} is empty here, as it is under ZeRO-3. Load the saved weights into a plain model and ask for "
                "the report of that."
            )
        if weight.dim() >= 2:
            found[name] = _whole(torch.linalg.vector_norm(weight.detach().float()))
    return found


def weight_norm_report(model: torch.nn.Module, reference: torch.nn.Module | Mapping[str, float]) -> WeightNormReport:
    """
    Compare the norms of a model's matrices with those of a reference, usually the model that training began with.

    From Normalization and effective learning rates in reinforcement learning (Lyle and others, 2024): where a layer's
    output is normalised, a growing norm lowers the learning rate without anybody's asking. The paper's cure,
    projecting every matrix back, was measured for pre-trained models and rejected
    (`docs/methods/normalize_and_project.md`); this is its diagnosis.

    Args:
        model (`torch.nn.Module`): Now.
        reference (`torch.nn.Module` or `Mapping[str, float]`): The other model, or what [`weight_norms`] returned
            earlier, with the same matrices.

    Raises:
        ValueError: the two have other matrices, or see [`weight_norms`].

    Example:
    ```python
    >>> layer = torch.nn.Linear(2, 2)
    >>> before = weight_norms(layer)
    >>> _ = layer.weight.data.mul_(2)
    >>> matrix = weight_norm_report(layer, before).matrices[0]
    >>> round(matrix.ratio, 4), round(matrix.effective_lr_factor, 4), round(matrix.update_factor, 4)
    (2.0, 0.25, 0.5)
    ```
    """
    now = weight_norms(model)
    before = weight_norms(reference) if isinstance(reference, torch.nn.Module) else dict(reference)
    if now.keys() != before.keys():
        odd = sorted(now.keys() ^ before.keys())
        raise ValueError(
            f"model and reference have other matrices, such as {odd[0]}. Compare two states of one model."
        )
    return WeightNormReport(tuple(WeightNorm(name, norm, float(before[name])) for name, norm in now.items()))


def _whole(norm: torch.Tensor) -> float:
    """A norm of a sharded matrix is known on all ranks together."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
