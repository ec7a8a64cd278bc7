"""Pass rates of prompts that resemble each other: an exact Gaussian process with a sigmoid link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def median_distance(points: Tensor) -> float:
    """
    The median distance between two different points, the usual bandwidth of an RBF kernel; 1 where all are the same.

    Args:
        points (`torch.Tensor`): Shape `(num_points, width)`.

    Example:
    ```python
    >>> median_distance(torch.tensor([[0.0], [1.0], [4.0]]))
    3.0
    ```
    """
    distances = torch.pdist(points)
    distances = distances[distances > 0]
    return float(distances.median()) if len(distances) else 1.0


def rbf_kernel(points: Tensor, bandwidth: float) -> Tensor:
    """
    `k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))`, shape `(num_points, num_points)`.

    Example:
    ```python
    >>> rbf_kernel(torch.tensor([[0.0], [2.0]], dtype=torch.float64), 2.0).tolist()
    [[1.0, 0.6065306597126334], [0.6065306597126334, 1.0]]
    ```
    """
    squares = (points * points).sum(1)
    distances = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * points @ points.T).clamp(min=0)
    distances.fill_diagonal_(0)
    return torch.exp(-distances / (2 * bandwidth * bandwidth))


@dataclass(frozen=True)
class GaussianRates:
    """
    A Gaussian belief over the logits `f` of all pass rates, `p = sigmoid(f)`.

    Args:
        mean (`torch.Tensor`): Of the logits, float64, shape `(size,)`.
        covariance (`torch.Tensor`): Of the logits, float64, shape `(size, size)`.

    Example:
    ```python
    >>> prior = GaussianRates(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    >>> after = prior.updated([0], torch.tensor([3.0]), torch.tensor([4.0]))
    >>> [round(value, 3) for value in torch.sigmoid(after.mean).tolist()]
    [0.607, 0.5]
    ```
    """

    mean: Tensor
    covariance: Tensor

    def updated(self, rows: Sequence[int], successes: Tensor, counts: Tensor) -> GaussianRates:
        """
        Return the belief after `successes[i]` right of `counts[i]` completions of row `rows[i]`.

        The binomial likelihood is replaced by a Gaussian one on the logit, `y = log((s + 1/2) / (n - s + 1/2))` with
        the variance `1 / (s + 1/2) + 1 / (n - s + 1/2)` (the empirical logit), so that the update is exact:
        `K' = K - K_B (K_BB + R)^-1 K_B^T`. Rows may come several times.

        Args:
            rows (`Sequence[int]`): Row numbers, at least one.
            successes, counts (`torch.Tensor`): Shape `(len(rows),)`, `0 <= successes <= counts`, `counts > 0`.
        """
        right = successes.to(torch.float64) + 0.5
        wrong = counts.to(torch.float64) - successes.to(torch.float64) + 0.5
        seen = torch.log(right / wrong)
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        across = self.covariance[:, index]
        factor = torch.linalg.cholesky(across[index] + torch.diag(1 / right + 1 / wrong))
        mean = self.mean + across @ torch.cholesky_solve((seen - self.mean[index]).unsqueeze(1), factor).squeeze(1)
        half = torch.linalg.solve_triangular(factor, across.T, upper=False)
        return GaussianRates(mean, self.covariance - half.T @ half)
