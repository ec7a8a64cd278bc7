"""A gate between reinforcement learning and demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..functional.data import check_number
from ..functional.rollouts import check_success_at, gate_groups, successes_of

if TYPE_CHECKING:
    from ..protocols import RolloutGroups


@dataclass(frozen=True)
class HybridGate:
    """
    HPT: a prompt that the policy cannot answer is learned from a demonstration, the others from its own completions.

    Of a group with at most `gamma` right completions none is trained on; in their place the negative log-likelihood of
    one demonstration is: `L = L_RL + sft_coef * mean over the tokens of all demonstrations of -log pi`. The two terms
    have token counts of their own. Groups with more than `gamma` and at most `upper` right ones are not trained on at
    all. See [`~hf_effi.functional.rollouts.gate_groups`]. Paper:
    [2509.04419](https://huggingface.co/papers/2509.04419).

    Args:
        column (`str`, *optional*, defaults to `"demonstration"`): Column of the training dataset: the answer as a
            text, or as a list of messages; `None` where a row has none, whose group always learns from its
            completions.
        gamma (`int`, *optional*, defaults to 0): The paper has 0 for Qwen2.5-Math and 2 of 8 for Llama-3.1-8B. -1
            turns the gate off.
        upper (`int`, *optional*): Over `gamma`; without it no group is dropped.
        sft_coef (`float`, *optional*, defaults to 1.0): Over 0. The paper has 1.0, and 0.3 for Qwen2.5-Math-1.5B.
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be 0
            or 1.

    Raises:
        ValueError: a setting is out of range.

    Example:
    ```python
    >>> HybridGate(gamma=2).on, HybridGate(gamma=-1).on
    (True, False)
    ```
    """

    column: str = "demonstration"
    gamma: int = 0
    upper: int | None = None
    sft_coef: float = 1.0
    success_at: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise ValueError(f"column={self.column!r} must be the name of a column of the dataset.")
        if not isinstance(self.gamma, int) or isinstance(self.gamma, bool) or self.gamma < -1:
            raise ValueError(f"gamma={self.gamma!r} must be an integer of at least 0, or -1 for no demonstrations.")
        upper = self.upper
        if upper is not None and (not isinstance(upper, int) or isinstance(upper, bool) or upper <= self.gamma):
            raise ValueError(f"upper={upper!r} must be an integer over gamma={self.gamma}, or None.")
        check_number("sft_coef", self.sft_coef, 0.0, open_low=True)
        check_success_at(self.success_at)

    @property
    def on(self) -> bool:
        """Whether any group can be gated."""
        return self.gamma >= 0 or self.upper is not None

    def decide(self, groups: RolloutGroups, demonstrations: Sequence[Any]) -> Tensor:
        """
        Return what each group is trained on, shape `(num_groups,)`: 0 completions, 1 demonstration, 2 neither.

        Args:
            groups ([`~hf_effi.protocols.RolloutGroups`]): Of one generation.
            demonstrations (`Sequence`): Of each group, `None` = none.
        """
        successes, scorable = successes_of(groups, self.success_at)
        unknown = cast(Tensor, groups.present).sum(1) - scorable
        there = torch.tensor([one is not None for one in demonstrations], dtype=torch.bool)
        return gate_groups(successes, unknown, there, self.gamma, self.upper)
