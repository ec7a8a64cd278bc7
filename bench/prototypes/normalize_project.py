"""Normalise-and-project without the normalisation: matrices go back to their first norm after every update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Projection:
    """
    `W <- W |W_0| / |W|` for the chosen matrices.

    The function of the model is the same before and after only where scaling the matrix does not change it: the query
    and key projections of a model that normalises queries and keys.
    """

    def __init__(self, model: nn.Module, chosen: Callable[[str], bool]) -> None:
        self.weights = {n: w for n, w in model.named_parameters() if w.dim() >= 2 and chosen(n)}
        if not self.weights:
            raise ValueError("No matrix of the model is chosen.")
        self.norms = {name: weight.detach().norm() for name, weight in self.weights.items()}

    @torch.no_grad()
    def project(self) -> None:
        for name, weight in self.weights.items():
            norm = weight.norm()
            if norm > 0:
                weight.mul_(self.norms[name] / norm)


def is_query_or_key(name: str) -> bool:
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def is_matrix_of_a_layer(name: str) -> bool:
    return ".layers." in name
