"""How many completions each prompt of a generation gets: variance-informed and by the knapsack."""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor

#: policy-gradient estimators whose variance [`gradient_variance`] knows
ESTIMATORS = ("dr_grpo", "rloo")
#: totals that differ by less, relative to the largest value, count as equal
_EQUAL = 1e-12


def gradient_variance(pass_rates: Tensor, sizes: Tensor, estimator: str = "dr_grpo") -> Tensor:
    """
    VIP: variance of the projected policy gradient of a group of `n` completions, up to the factor `sigma^2`.

    Dr. GRPO: `4 p (1 - p) (n - 1) / n^2`; RLOO: `4 p (1 - p) / (n - 1)`.

    Paper: [Adaptive Rollout Allocation for Online Reinforcement Learning with Verifiable
    Rewards](https://huggingface.co/papers/2602.01601).

    Args:
        pass_rates (`torch.Tensor`): In [0, 1], shape `(num_prompts,)`.
        sizes (`torch.Tensor`): Numbers of completions, >= 2, shape `(num_sizes,)`.
        estimator (`str`, *optional*, defaults to `"dr_grpo"`): `"dr_grpo"` or `"rloo"`.

    Returns:
        `torch.Tensor`: float64, shape `(num_prompts, num_sizes)`.

    Example:
    ```python
    >>> gradient_variance(torch.tensor([0.5, 0.0]), torch.tensor([2, 4])).tolist()
    [[0.25, 0.1875], [0.0, 0.0]]
    >>> gradient_variance(torch.tensor([0.5]), torch.tensor([2, 3]), "rloo").tolist()
    [[1.0, 0.5]]
    ```
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}.")
    p, n = pass_rates.to(torch.float64).unsqueeze(1), sizes.to(torch.float64).unsqueeze(0)
    return 4 * p * (1 - p) * ((n - 1) / n**2 if estimator == "dr_grpo" else 1 / (n - 1))


def knapsack_values(pass_rates: Tensor, sizes: Tensor) -> Tensor:
    """
    Knapsack RL: what `N` completions of a prompt are worth, `[1 - p^N - (1 - p)^N] * p (1 - p)^2`.

    The first factor is the probability that the group has a gradient; the second is what an update of a prompt with
    this pass rate is expected to bring.

    Paper: [Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget
    Allocation](https://huggingface.co/papers/2509.25849).

    Args:
        pass_rates (`torch.Tensor`): In [0, 1], shape `(num_prompts,)`.
        sizes (`torch.Tensor`): Numbers of completions, shape `(num_sizes,)`.

    Returns:
        `torch.Tensor`: float64, shape `(num_prompts, num_sizes)`.

    Example:
    ```python
    >>> knapsack_values(torch.tensor([0.5]), torch.tensor([2, 3])).tolist()
    [[0.0625, 0.09375]]
    ```
    """
    p, n = pass_rates.to(torch.float64).unsqueeze(1), sizes.to(torch.float64).unsqueeze(0)
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def relaxed_sizes(pass_rates: Tensor, budget: int, low: int, high: int, estimator: str = "dr_grpo") -> Tensor:
    """
    VIP's continuous relaxation: sizes in `[low, high]` that sum to `budget` and have the smallest total variance.

    At the optimum every prompt that is not at a bound has the same slope `-dVar/dn = lambda`; `lambda` is found by
    bisection. RLOO: `n = 1 + sqrt(4 p (1 - p) / lambda)`; Dr. GRPO: the root `n >= 3` of
    `4 p (1 - p) (n - 2) / n^3 = lambda`, where the variance is convex, or `low` where the slope is flatter.

    Args:
        pass_rates (`torch.Tensor`): In [0, 1], shape `(num_prompts,)`.
        budget (`int`): Completions of all prompts, in `[num_prompts * low, num_prompts * high]`.
        low, high (`int`): Bounds of a size, `2 <= low <= high`.
        estimator (`str`, *optional*, defaults to `"dr_grpo"`): As in [`gradient_variance`].

    Returns:
        `torch.Tensor`: float64, shape `(num_prompts,)`. Their sum is `budget` where prompts that are neither right nor
        wrong for sure can take it.

    Example:
    ```python
    >>> [round(n, 3) for n in relaxed_sizes(torch.tensor([0.5, 0.1]), 18, 2, 16, "rloo").tolist()]
    [11.0, 7.0]
    ```
    """
    check_budget(len(pass_rates), budget, low, high)
    worth = 4 * pass_rates.to(torch.float64) * (1 - pass_rates.to(torch.float64))
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}.")

    def sizes(slope: float) -> Tensor:
        if estimator == "rloo":
            return (1 + torch.sqrt(worth / slope)).clamp(low, high)
        start, end = torch.full_like(worth, max(3.0, low)), torch.full_like(worth, max(3.0, high))
        for _ in range(60):  # the slope of the variance falls between `start` and `end`
            middle = (start + end) / 2
            steeper = worth * (middle - 2) / middle**3 > slope
            start, end = torch.where(steeper, middle, start), torch.where(steeper, end, middle)
        return torch.where(worth * (start - 2) / start**3 < slope * (1 - 1e-9), low, start).clamp(low, high)

    small, large = 1e-18, 4.0  # at `small` everybody has `high`, at `large` everybody has `low`
    for _ in range(64):  # as many halvings as change a float
        slope = math.sqrt(small * large)
        small, large = (slope, large) if float(sizes(slope).sum()) > budget else (small, slope)
    return sizes(large)


def round_sizes(relaxed: Tensor, values: Tensor, budget: int, low: int) -> list[int]:
    """
    VIP's greedy rounding: relaxed sizes are cut to whole numbers, and each completion that is left goes where its
    value rises most; of equal rises to the prompt with fewer completions, then to the lower index.

    Args:
        relaxed (`torch.Tensor`): From [`relaxed_sizes`], shape `(num_prompts,)`.
        values (`torch.Tensor`): As in [`divide_budget`], shape `(num_prompts, num_sizes)`.
        budget (`int`): Completions of all prompts.
        low (`int`): Completions that the first column of `values` stands for.

    Returns:
        `list[int]`: One number per prompt; their sum is `budget`.

    Example:
    ```python
    >>> values = -gradient_variance(torch.tensor([0.5, 0.1]), torch.arange(2, 9), "rloo")
    >>> round_sizes(torch.tensor([4.6, 3.4]), values, budget=8, low=2)
    [5, 3]
    ```
    """
    rows = values.to("cpu", torch.float64).tolist()
    check_budget(len(rows), budget, low, low + values.size(1) - 1)
    sizes = [int(size + _EQUAL) for size in relaxed.tolist()]

    def entry(prompt: int) -> tuple[float, int, int]:
        at = sizes[prompt] - low
        return (rows[prompt][at] - rows[prompt][at + 1], sizes[prompt], prompt)

    heap = [entry(prompt) for prompt, size in enumerate(sizes) if size - low + 1 < len(rows[prompt])]
    heapq.heapify(heap)
    for _ in range(budget - sum(sizes)):
        prompt = heapq.heappop(heap)[2]
        sizes[prompt] += 1
        if sizes[prompt] - low + 1 < len(rows[prompt]):
            heapq.heappush(heap, entry(prompt))
    return sizes


def divide_budget(values: Tensor, budget: int, low: int = 0) -> list[int]:
    """
    Divide a budget so that the values of the parts add up to the most: a multiple-choice knapsack, solved exactly.

    `argmax sum_q values[q, n_q - low]`, with `sum_q n_q = budget`, by dynamic programming over the prompts and those
    sizes that a best division can have. Of values with falling rises few are left; in the worst case it is
    `O(num_prompts * (budget - num_prompts * low) * num_sizes)`. Of equally good divisions the most even one.

    Args:
        values (`torch.Tensor`): `values[q, i]` is what `low + i` parts of prompt `q` are worth, finite, shape
            `(num_prompts, num_sizes)`.
        budget (`int`): In `[num_prompts * low, num_prompts * (low + num_sizes - 1)]`.
        low (`int`, *optional*, defaults to 0): Fewest parts of a prompt.

    Returns:
        `list[int]`: One number per prompt; their sum is `budget`.

    Raises:
        ValueError: the budget cannot be divided so.

    Example:
    ```python
    >>> divide_budget(torch.tensor([[0.0, 1.0, 1.5], [0.0, 3.0, 3.1]]), budget=2)
    [1, 1]
    >>> divide_budget(torch.zeros(3, 9), budget=7, low=2)
    [3, 2, 2]
    ```
    """
    values = values.detach().to("cpu", torch.float64)
    prompts, widths = values.shape
    check_budget(prompts, budget, low, low + widths - 1)
    rest = budget - prompts * low
    values = values[:, : rest + 1]
    margin = _EQUAL * max(1e-300, float(values.abs().max()))
    first, last = _worth_trying(values, rest, margin)
    even, left = rest / max(prompts, 1), rest - sum(first)
    # best[b] is the most that the prompts so far make of b parts above `first`; spread[b] is how uneven they are
    best = torch.full((left + 1,), -math.inf, dtype=torch.float64)
    best[0], spread = 0.0, torch.zeros(left + 1, dtype=torch.float64)
    choices = []
    for prompt, (least, most) in enumerate(zip(first, last, strict=True)):
        width = min(most - least, left) + 1
        uneven = (torch.arange(least, least + width, dtype=torch.float64) - even) ** 2
        # window[b, i] is about b - i parts for the prompts before, and i for this one
        window = _windows(best, width, -math.inf) + values[prompt, least : least + width]
        best = window.amax(1)
        tied = window >= (best - margin).unsqueeze(1)
        rank = torch.where(tied, _windows(spread, width, 0.0) + uneven, math.inf)
        spread, choice = rank.min(1)
        choice = (rank <= spread.unsqueeze(1) * (1 + _EQUAL)).int().argmax(1)
        choices.append(choice)
    sizes = [0] * prompts
    for prompt in range(prompts - 1, -1, -1):
        part = int(choices[prompt][left])
        sizes[prompt], left = low + first[prompt] + part, left - part
    return sizes


def _worth_trying(values: Tensor, budget: int, margin: float) -> tuple[list[int], list[int]]:
    """
    Return the fewest and the most parts of each prompt that a best division can have.

    With a price `c` of a part no division is worth more than `U = sum_q max_i (v_qi - c i) + c budget`, and one in
    which prompt `q` has `i` parts falls short of that by what `v_qi - c i` falls short of its maximum. A division that
    is at hand is worth `L`, so that a choice which falls short by more than `U - L` is in no best one.

    Args:
        values (`torch.Tensor`): float64, shape `(prompts, sizes)`.
        budget (`int`): Parts of all prompts.
        margin (`float`): Totals that differ by less count as equal, at each prompt.
    """
    prompts, widths = values.shape
    if widths == 1:
        return [0] * prompts, [0] * prompts
    parts = torch.arange(widths, dtype=torch.float64)

    dear = float((values[:, 1:] - values[:, :-1]).abs().max())
    cheap = -dear  # at `cheap` the parts that are wanted can exceed the budget, at `dear` they do not
    fewer, more = torch.zeros(prompts, dtype=torch.int64), torch.full((prompts,), widths - 1)
    for _ in range(40):
        price = (cheap + dear) / 2
        least, most = int(fewer.min()), int(more.max()) + 1  # the dearer a part, the fewer are wanted
        wanted = (values[:, least:most] - price * parts[least:most]).argmax(1) + least
        if int(wanted.sum()) > budget:
            cheap, more = price, wanted
        else:
            dear, fewer = price, wanted
    reduced = values - dear * parts
    top = reduced.amax(1, keepdim=True)
    at_hand = _filled(values, fewer.tolist(), more.tolist(), budget)
    if at_hand is None:
        return [0] * prompts, [widths - 1] * prompts
    worth = float(values[torch.arange(prompts), torch.tensor(at_hand)].sum())
    gap = max(0.0, float(top.sum()) + dear * budget - worth)
    good = (top - reduced <= gap + 4 * (prompts + 1) * margin).int()
    return good.argmax(1).tolist(), (widths - 1 - good.flip(1).argmax(1)).tolist()


def _filled(values: Tensor, fewer: list[int], more: list[int], budget: int) -> list[int] | None:
    """Return a good division of the whole budget, between two that use less and more of it, where there is one."""
    sizes, left = list(fewer), budget - sum(fewer)
    for prompt, size in enumerate(more):
        if 0 < size - sizes[prompt] <= left:
            left -= size - sizes[prompt]
            sizes[prompt] = size
    rows, most = values.tolist() if left else [], values.size(1) - 1
    heap = [
        (row[size] - row[size + 1], i) for i, (row, size) in enumerate(zip(rows, sizes, strict=False)) if size < most
    ]
    heapq.heapify(heap)
    while left > 0 and heap:
        prompt = heapq.heappop(heap)[1]
        sizes[prompt], left = sizes[prompt] + 1, left - 1
        if sizes[prompt] < most:
            row, size = rows[prompt], sizes[prompt]
            heapq.heappush(heap, (row[size] - row[size + 1], prompt))
    return sizes if left == 0 else None


def _windows(values: Tensor, width: int, before: float) -> Tensor:
    """Return `out[b, i] = values[b - i]`, and `before` where there is none; shape `(len(values), width)`."""
    padded = torch.cat([values.new_full((width - 1,), before), values])
    return padded.unfold(0, width, 1).flip(1)


def check_budget(prompts: int, budget: int, low: int, high: int) -> None:
    """Raise `ValueError` unless so many completions can be divided over the prompts within the bounds."""
    if not prompts * low <= budget <= prompts * high or prompts < 1:
        raise ValueError(
            f"{budget} completions cannot be divided over {prompts} prompts with {low} to {high} of each: that takes "
            f"{prompts * low} to {prompts * high}. Change the bounds `low` and `high`, or num_generations."
        )
