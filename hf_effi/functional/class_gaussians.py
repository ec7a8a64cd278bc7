"""Classifier alignment of SLCA: classes as Gaussians of their features, and a loss on normalised logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedules._checks import check_number


def class_gaussian(features: Tensor, shrinkage: float = 0.0) -> tuple[Tensor, Tensor]:
    """
    Return mean and covariance of the features of one class.

    Formula: `mu = mean(x)`, `S = mean((x - mu)(x - mu)^T)`, `Sigma = (1 - shrinkage) S + shrinkage (tr S / d) I`. With
    fewer rows than features `S` is singular; shrinkage gives it width in every direction.

    Args:
        features (`torch.Tensor`): Shape `(rows, d)`, at least one row. Computed in fp64.
        shrinkage (`float`, *optional*, defaults to 0.0): In `[0, 1]`; the paper has none.

    Returns:
        `tuple`: Mean `(d,)` and covariance `(d, d)`, fp64.

    Raises:
        ValueError: no row, another shape, a value that is not finite, or a shrinkage out of range.

    Example:
    ```python
    >>> mean, covariance = class_gaussian(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), shrinkage=0.5)
    >>> mean.tolist(), covariance.tolist()
    ([1.0, 1.0], [[0.75, 0.0], [0.0, 0.25]])
    ```
    """
    check_number("shrinkage", shrinkage, 0.0, 1.0)
    if features.dim() != 2 or not features.shape[0]:
        raise ValueError(f"features have shape {tuple(features.shape)}; (rows, d) with at least one row is needed.")
    features = features.detach().double()
    if not features.isfinite().all():
        raise ValueError("features have values that are not finite. Look at the model that computed them.")
    mean = features.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / features.shape[0]
    width = covariance.diagonal().mean()
    eye = torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
    return mean, (1 - shrinkage) * covariance + shrinkage * width * eye


def sample_gaussian(mean: Tensor, covariance: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """
    Draw features of a class.

    Formula: `x = mu + z sqrt(Lambda) Q^T` with `Sigma = Q Lambda Q^T` and standard normal `z`, so that a singular
    covariance will do: a class of one row gives its mean.

    Args:
        mean (`torch.Tensor`): Shape `(d,)`.
        covariance (`torch.Tensor`): Shape `(d, d)`, symmetric, without negative eigenvalues beyond rounding.
        rows (`int`): How many.
        generator (`torch.Generator`): A generator of the CPU.

    Returns:
        `torch.Tensor`: Shape `(rows, d)`, fp64.

    Example:
    ```python
    >>> sample_gaussian(torch.tensor([1.0, 2.0]), torch.zeros(2, 2), 2, torch.Generator()).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    ```
    """
    mean, covariance = mean.double().cpu(), covariance.double().cpu()
    values, directions = torch.linalg.eigh(covariance)
    noise = torch.randn(rows, mean.numel(), generator=generator, dtype=torch.float64)
    return mean + (noise * values.clamp(min=0).sqrt()) @ directions.T


def normalized_logits(logits: Tensor, temperature: float = 0.1) -> Tensor:
    """
    Return logits whose size says nothing, so that training cannot grow confident by scaling them.

    Formula: `l / (temperature |l|)`, with the L2 norm of each row; a row of zeros stays one.

    Args:
        logits (`torch.Tensor`): Shape `(rows, classes)`.
        temperature (`float`, *optional*, defaults to 0.1): Above 0.

    Example:
    ```python
    >>> normalized_logits(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 0.5)
    tensor([[1.2000, 1.6000],
            [0.0000, 0.0000]])
    ```
    """
    check_number("temperature", temperature, 0.0, float("inf"), low_open=True)
    norm = logits.norm(dim=-1, keepdim=True)
    return logits / (temperature * norm.clamp(min=torch.finfo(logits.dtype).tiny))
