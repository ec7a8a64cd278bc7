"""Orders for trainers that repeat every prompt, such as GRPO."""

from __future__ import annotations

from torch import Tensor

from ..rollouts.layout import GenerationLayout
from ._checks import check_count


def repeat_layout(order: Tensor, mini_repeat_count: int, batch_size: int = 1, repeat_count: int = 1) -> Tensor:
    """
    Lay out an order of prompts as TRL's `RepeatSampler` does.

    The order is cut into chunks of `batch_size` prompts (an incomplete last chunk is dropped); within a chunk each
    prompt comes `mini_repeat_count` times in a row, and the chunk is given `repeat_count` times.

    Args:
        order (`torch.Tensor`): Row numbers, shape `(num_prompts,)`.
        mini_repeat_count (`int`): Completions a prompt, `num_generations`.
        batch_size (`int`, *optional*, defaults to 1): Distinct prompts of one generation.
        repeat_count (`int`, *optional*, defaults to 1): Passes over one generation.

    Returns:
        `torch.Tensor`: Shape `(num_prompts // batch_size * batch_size * mini_repeat_count * repeat_count,)`.

    Raises:
        ValueError: a count below 1.

    Example:
    ```python
    >>> repeat_layout(torch.tensor([4, 3, 0, 1, 2]), mini_repeat_count=2, batch_size=2, repeat_count=2).tolist()
    [4, 4, 3, 3, 4, 4, 3, 3, 0, 0, 1, 1, 0, 0, 1, 1]
    ```
    """
    check_count("mini_repeat_count", mini_repeat_count)
    check_count("batch_size", batch_size)
    check_count("repeat_count", repeat_count)
    rows = mini_repeat_count * batch_size
    return GenerationLayout(rows, mini_repeat_count, num_iterations=repeat_count).order(order)
