"""What predicts the pass rate of a prompt: from its own past, or from that of prompts like it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MismatchError
from ..functional.data import check_count, check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.rollouts import GaussianRates, median_distance, rbf_kernel

if TYPE_CHECKING:
    from ..protocols import SelectionContext

#: most rows of a Gaussian process
LARGEST = 32_768


class BetaRates:
    """
    A Beta posterior for each prompt: `p = (a + s) / (a + b + n)` after `s` right of `n` completions.

    Args:
        prior (`tuple[float, float]`, *optional*, defaults to `(1, 1)`): `a` and `b`, > 0.
        forget (`float`, *optional*, defaults to 0): Share of the counts of a prompt that is forgotten when it is
            generated again, in [0, 1]. The policy changes, and so do its pass rates.

    Example:
    ```python
    >>> from types import SimpleNamespace
    >>> rates = BetaRates()
    >>> rates.attach(SimpleNamespace(size=4))
    >>> rates.update([2], torch.tensor([3.0]), torch.tensor([4.0]))
    >>> [round(p, 3) for p in rates.predict([0, 2]).tolist()]
    [0.5, 0.667]
    ```
    """

    @keeps_arguments
    def __init__(self, prior: Sequence[float] = (1.0, 1.0), forget: float = 0.0) -> None:
        if not isinstance(prior, (list, tuple)) or len(prior) != 2:
            raise ValueError(f"prior must be two numbers > 0, got {prior!r}.")
        self.prior = tuple(check_number("prior", value, 0, open_low=True) for value in prior)
        self.forget = check_number("forget", forget, 0, 1)
        self._counts: Tensor | None = None  # right and wrong completions, shape (size, 2)

    def attach(self, context: SelectionContext) -> None:
        """Learn how many rows the dataset has."""
        self._counts = torch.zeros(context.size, 2, dtype=torch.float64)

    def predict(self, rows: Sequence[int]) -> Tensor:
        """Return the predicted pass rates, float64, shape `(len(rows),)`."""
        posterior = _attached(self._counts, self)[list(rows)] + torch.tensor(self.prior, dtype=torch.float64)
        return posterior[:, 0] / posterior.sum(1)

    def update(self, rows: Sequence[int], successes: Tensor, counts: Tensor) -> None:
        """Take right completions and scorable completions of each row, shape `(len(rows),)` each."""
        table = _attached(self._counts, self)
        for row, right, scored in zip(rows, successes.tolist(), counts.tolist(), strict=True):
            if scored:
                table[row] *= 1 - self.forget
                table[row] += torch.tensor([right, scored - right], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": _attached(self._counts, self).clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: the state belongs to a dataset of another size.
        """
        self._counts = _fitting(state["counts"], _attached(self._counts, self)).clone()


class EmbeddingRates:
    """
    VIP's predictor: a Gaussian process over the embeddings of the prompts, so that a prompt that was never generated
    is predicted from those like it.

    `p = sigmoid(f)`, `f ~ GP(logit(prior), RBF)`, with the median distance as bandwidth. After each generation the
    posterior becomes the next prior, see [`~hf_effi.functional.rollouts.GaussianRates`].

    Args:
        embeddings (`str` or `Callable`): Column of the training dataset that holds one vector per row, or a function
            that is given the [`~hf_effi.protocols.SelectionContext`] and returns them, shape `(size, width)`. It must
            return the same on every rank. The paper uses MiniLM embeddings of 384 numbers.
        variance (`float`, *optional*, defaults to 4): Prior variance of `f`, > 0.
        prior (`float`, *optional*, defaults to 0.5): Pass rate of a prompt about which nothing is known, in (0, 1).
        max_rows (`int`, *optional*, defaults to 4096): Largest dataset, at most 32768. The posterior holds
            `size ** 2` numbers of 8 bytes, also in each checkpoint.

    Example:
    ```python
    >>> from types import SimpleNamespace
    >>> rates = EmbeddingRates(lambda context: torch.tensor([[0.0], [0.1], [5.0]]))
    >>> rates.attach(SimpleNamespace(size=3))
    >>> rates.update([0], torch.tensor([8.0]), torch.tensor([8.0]))
    >>> [round(p, 2) for p in rates.predict([0, 1, 2]).tolist()]
    [0.86, 0.86, 0.75]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        embeddings: str | Callable[[SelectionContext], Any],
        variance: float = 4.0,
        prior: float = 0.5,
        max_rows: int = 4096,
    ) -> None:
        if not isinstance(embeddings, str) and not callable(embeddings):
            raise ValueError(f"embeddings must be the name of a column or a function, got {embeddings!r}.")
        self.embeddings = embeddings
        self.variance = check_number("variance", variance, 0, open_low=True)
        self.prior = check_number("prior", prior, 0, 1, open_low=True, open_high=True)
        self.max_rows = check_count("max_rows", max_rows)
        if max_rows > LARGEST:
            raise ValueError(f"max_rows={max_rows} is above {LARGEST}, whose posterior takes 8 GiB. Use BetaRates.")
        self._posterior: GaussianRates | None = None

    def attach(self, context: SelectionContext) -> None:
        """Read the embeddings and make the prior."""
        if context.size > self.max_rows:
            raise ValueError(
                f"EmbeddingRates would hold {context.size} x {context.size} numbers, and max_rows={self.max_rows}. "
                "Raise max_rows if there is memory for them, or use BetaRates."
            )
        named = isinstance(self.embeddings, str)
        vectors = context.column(self.embeddings) if named else self.embeddings(context)  # type: ignore[arg-type, operator]
        points = torch.as_tensor(vectors, dtype=torch.float64).cpu()
        if points.ndim != 2 or len(points) != context.size or not bool(torch.isfinite(points).all()):
            raise ValueError(
                f"embeddings must be finite numbers of shape ({context.size}, width), one row per row of the dataset, "
                f"got shape {tuple(points.shape)}."
            )
        kernel = self.variance * rbf_kernel(points, median_distance(points))
        mean = torch.full((len(points),), math.log(self.prior / (1 - self.prior)), dtype=torch.float64)
        self._posterior = GaussianRates(mean, kernel)

    def predict(self, rows: Sequence[int]) -> Tensor:
        """Return the predicted pass rates, float64, shape `(len(rows),)`."""
        return torch.sigmoid(_attached(self._posterior, self).mean[list(rows)])

    def update(self, rows: Sequence[int], successes: Tensor, counts: Tensor) -> None:
        """Take right completions and scorable completions of each row, shape `(len(rows),)` each."""
        posterior = _attached(self._posterior, self)
        known = counts > 0
        picked = [row for row, there in zip(rows, known.tolist(), strict=True) if there]
        if picked:
            self._posterior = posterior.updated(picked, successes[known], counts[known])

    def state_dict(self) -> dict[str, Any]:
        posterior = _attached(self._posterior, self)
        return {"mean": posterior.mean.clone(), "covariance": posterior.covariance.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where `state` stopped.

        Raises:
            MismatchError: the state belongs to a dataset of another size.
        """
        now = _attached(self._posterior, self)
        mean, covariance = _fitting(state["mean"], now.mean), _fitting(state["covariance"], now.covariance)
        self._posterior = GaussianRates(mean.clone(), covariance.clone())


def _attached(value: Any, owner: object) -> Any:
    if value is None:
        raise ValueError(
            f"{type(owner).__name__} does not know the dataset yet. Pass it to an allocator, or call attach(context) "
            "first."
        )
    return value


def _fitting(saved: Tensor, now: Tensor) -> Tensor:
    if saved.shape != now.shape:
        raise MismatchError(
            f"the checkpoint's pass rates have shape {tuple(saved.shape)}, this dataset needs {tuple(now.shape)}. "
            "Resume with the same dataset, or start a new run from the checkpoint's weights."
        )
    return saved
