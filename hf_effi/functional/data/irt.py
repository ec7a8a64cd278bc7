"""Item response theory with one parameter: difficulty of items, ability of a model, on one scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_count, check_number


def _responses(values: Tensor, ndim: int, name: str) -> Tensor:
    values = torch.as_tensor(values).detach().cpu().double()
    answered = values[~values.isnan()]
    if values.ndim != ndim or answered.numel() == 0 or not bool(((answered == 0) | (answered == 1)).all()):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; it needs {ndim} dimension(s), entries 0, 1 or NaN (not "
            "answered), and at least one answer."
        )
    return values


def rasch_ability(
    responses: Tensor, difficulty: Tensor, *, prior_std: float | None = 1.0, max_steps: int = 100
) -> float:
    """
    Return the ability under the Rasch model `p(y=1) = sigmoid(theta - b)`, by Newton's method.

    The maximum of `sum_i [y_i ln p_i + (1 - y_i) ln(1 - p_i)] + ln N(theta; 0, prior_std)`.

    Args:
        responses (`torch.Tensor`): 0, 1 or NaN (not answered), shape `(num_items,)`.
        difficulty (`torch.Tensor`): `b`, shape `(num_items,)`.
        prior_std (`float` or `None`, *optional*, defaults to 1.0): Width of the normal prior. `None` is maximum
            likelihood, which is infinite when all answers agree: that raises.
        max_steps (`int`, *optional*, defaults to 100): Newton steps at most.

    Raises:
        ValueError: shapes differ, entries other than 0, 1, NaN, or no finite maximum.

    Example:
    ```python
    >>> b, y = torch.tensor([-3.0, -2, -2, -1, -3]), torch.tensor([1.0, 0, 1, 1, 0])
    >>> round(rasch_ability(y, b), 6), round(rasch_ability(y, b, prior_std=None), 6)
    (-0.848772, -1.749786)
    ```
    """
    answers = _responses(responses, 1, "responses")
    items = torch.as_tensor(difficulty).detach().cpu().double()
    if items.shape != answers.shape or not bool(torch.isfinite(items).all()):
        raise ValueError(
            f"difficulty {tuple(items.shape)} must be finite and have the shape of responses {tuple(answers.shape)}."
        )
    seen = ~answers.isnan()
    answers, items = answers[seen], items[seen]
    precision = 0.0
    if prior_std is not None:
        precision = check_number("prior_std", prior_std, 0, open_low=True) ** -2
    elif bool((answers == answers[0]).all()):
        raise ValueError(
            "All answers agree, so the likelihood has no maximum. Use prior_std=1.0 or more varied items."
        )
    theta = 0.0
    for _ in range(check_count("max_steps", max_steps)):
        p = torch.sigmoid(theta - items)
        gradient = float((answers - p).sum()) - precision * theta
        curvature = float((p * (1 - p)).sum()) + precision
        # The step is bounded: far from the items the likelihood is almost linear, and Newton would overshoot.
        step = min(max(gradient / max(curvature, 1e-12), -2.0), 2.0)
        theta += step
        if abs(step) < 1e-12:
            break
    return theta


def fit_rasch(
    responses: Tensor, *, prior_std: float = 1.0, max_rounds: int = 500, tolerance: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """
    Fit difficulties and abilities to a response matrix: the joint MAP, with normal priors, by alternating Newton
    steps.

    Args:
        responses (`torch.Tensor`): 0, 1 or NaN (not answered), shape `(num_examinees, num_items)`.
        prior_std (`float`, *optional*, defaults to 1.0): Width of both priors; keeps items that all or none solve
            finite.
        max_rounds (`int`, *optional*, defaults to 500): Rounds at most.
        tolerance (`float`, *optional*, defaults to 1e-8): Largest change of a parameter at which to stop.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Difficulty `(num_items,)` and ability `(num_examinees,)`, float64.

    Raises:
        ValueError: entries other than 0, 1, NaN, or an argument out of range.

    Example:
    ```python
    >>> difficulty, ability = fit_rasch(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    >>> bool(difficulty[0] < difficulty[1]), ability.argsort().tolist()
    (True, [2, 0, 1])
    ```
    """
    answers = _responses(responses, 2, "responses")
    precision = check_number("prior_std", prior_std, 0, open_low=True) ** -2
    seen = (~answers.isnan()).double()
    answers = answers.nan_to_num(0.0)
    ability = torch.zeros(answers.shape[0], dtype=torch.float64)
    difficulty = torch.zeros(answers.shape[1], dtype=torch.float64)
    for _ in range(check_count("max_rounds", max_rounds)):
        largest = 0.0
        for vector, axis, sign in ((ability, 1, 1.0), (difficulty, 0, -1.0)):
            p = torch.sigmoid(ability[:, None] - difficulty[None, :])
            gradient = sign * ((answers - p) * seen).sum(axis) - precision * vector
            step = (gradient / ((p * (1 - p) * seen).sum(axis) + precision)).clamp(-1.0, 1.0)
            vector += step
            largest = max(largest, float(step.abs().max()))
        if largest < tolerance:
            break
    return difficulty, ability


def within_ability(
    difficulty: Tensor, ability: float, *, lower: float = -float("inf"), upper: float = 0.0, min_rows: int = 1
) -> Tensor:
    """
    Return which items have `ability + lower <= b <= ability + upper`; the `min_rows` easiest if these are too few.

    Example:
    ```python
    >>> within_ability(torch.tensor([-1.0, 0.0, 1.0]), 0.2).tolist()
    [True, True, False]
    >>> within_ability(torch.tensor([2.0, 1.0, 3.0]), 0.0).tolist()
    [False, True, False]
    ```

    Raises:
        ValueError: `lower > upper`, or `min_rows` out of range.
    """
    if not lower <= upper:
        raise ValueError(f"lower={lower} exceeds upper={upper}. The band is [ability + lower, ability + upper].")
    items = torch.as_tensor(difficulty).double()
    if check_count("min_rows", min_rows) > items.numel():
        raise ValueError(f"min_rows={min_rows} exceeds the {items.numel()} items.")
    mask = (items >= ability + lower) & (items <= ability + upper)
    if int(mask.sum()) < min_rows:
        mask = torch.zeros_like(mask)
        mask[torch.sort(items, stable=True).indices[:min_rows]] = True
    return mask
