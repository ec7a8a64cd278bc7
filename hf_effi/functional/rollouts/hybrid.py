"""Which groups learn from their own completions, which from a demonstration, and which from neither."""

from __future__ import annotations

import torch
from torch import Tensor

#: a group that is trained on its completions
REINFORCED = 0
#: a group that is trained on its demonstration
DEMONSTRATED = 1
#: a group that is not trained on
DROPPED = 2


def gate_groups(
    successes: Tensor, unknown: Tensor, demonstrated: Tensor, gamma: int = 0, upper: int | None = None
) -> Tensor:
    """
    Divide groups between reinforcement learning and demonstrations, by how many completions are right.

    With `n = successes + unknown`: `n <= gamma` takes the demonstration, `gamma < n <= upper` takes nothing, the
    others take their completions. Completions whose answer could not be checked count as right, so that no group is
    given up for them. A group without a demonstration always takes its completions.

    Paper: [Towards a Unified View of LLM Post-Training](https://huggingface.co/papers/2509.04419).

    Args:
        successes (`torch.Tensor`): Right completions, shape `(num_groups,)`.
        unknown (`torch.Tensor`): Completions without a reward, same shape.
        demonstrated (`torch.Tensor`): Whether there is a demonstration, boolean, same shape.
        gamma (`int`, *optional*, defaults to 0): Most right completions of a hopeless group; -1 for none.
        upper (`int`, *optional*): Most right completions of a group that is dropped; defaults to `gamma`.

    Returns:
        `torch.Tensor`: int64, same shape: 0 completions, 1 demonstration, 2 neither.

    Example:
    ```python
    >>> right, unknown = torch.tensor([0, 0, 0, 1, 2, 3]), torch.tensor([0, 1, 0, 0, 0, 0])
    >>> demonstrated = torch.tensor([True, True, False, True, True, True])
    >>> gate_groups(right, unknown, demonstrated).tolist()
    [1, 0, 0, 0, 0, 0]
    >>> gate_groups(right, unknown, demonstrated, gamma=1, upper=2).tolist()
    [1, 1, 0, 1, 2, 0]
    ```
    """
    at_most = successes + unknown
    verdict = torch.where(at_most <= gamma, DEMONSTRATED, REINFORCED)
    if upper is not None:
        verdict = torch.where((at_most > gamma) & (at_most <= upper), DROPPED, verdict)
    return torch.where(demonstrated, verdict, REINFORCED)
