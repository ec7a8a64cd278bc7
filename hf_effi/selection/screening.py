"""Two-stage generation: a few rollouts of many prompts, the rest for those that can teach something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..functional.data import check_count, check_number
from ..functional.rollouts import (
    check_screening_band,
    check_success_at,
    qualifies,
    screen,
    screening_shares,
    successes_of,
)

if TYPE_CHECKING:
    from ..protocols import RolloutGroups


@dataclass(frozen=True)
class Screening:
    """
    SPEED ([2506.09016](https://huggingface.co/papers/2506.09016)), with fresh rollouts in both stages.

    Of each prompt wanted, `candidates` are sampled `initial` times. Those whose pass rate lies strictly between `low`
    and `high` get the rest of their completions, so that their groups have `num_generations` completions from one
    policy. Which ones fill up where too few qualify is said at [`~hf_effi.functional.rollouts.screen`].

    Args:
        initial (`int`): Screening rollouts of a prompt, >= 1 and below `num_generations`. The paper uses 4 to 8.
        low, high (`float`, *optional*, default to 0 and 1): Band of pass rates, its ends outside.
        candidates (`float`, *optional*, defaults to 2): Prompts screened for each that is wanted, in [1, 64].
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be 0
            or 1.

    Example:
    ```python
    >>> screening = Screening(initial=4, candidates=2.0)
    >>> screening.prompts(wanted=8), screening.continuation(group_size=16)
    (16, 12)
    ```
    """

    initial: int
    low: float = 0.0
    high: float = 1.0
    candidates: float = 2.0
    success_at: float | None = None

    def __post_init__(self) -> None:
        check_count("initial", self.initial)
        check_screening_band(self.low, self.high)
        check_number("candidates", self.candidates, 1, 64)
        check_success_at(self.success_at)

    def prompts(self, wanted: int) -> int:
        """Return how many prompts the first stage samples: `ceil(candidates * wanted)`."""
        return screening_shares(wanted, self.initial + 1, self.initial, self.candidates)[0]

    def continuation(self, group_size: int) -> int:
        """
        Return how many completions a chosen prompt still gets: `group_size - initial`.

        Raises:
            ValueError: none would be left.
        """
        return screening_shares(1, group_size, self.initial, self.candidates)[1]

    def choose(self, groups: RolloutGroups, wanted: int) -> list[int]:
        """
        Return the indices of `wanted` groups of the first stage that go on, ascending.

        Args:
            groups ([`~hf_effi.protocols.RolloutGroups`]): Of the first stage, `initial` completions each.
            wanted (`int`): Prompts that are trained on.

        Raises:
            ValueError: it cannot be told which completions are right: set `success_at`.
        """
        return screen(*successes_of(groups, self.success_at), self.low, self.high, wanted)

    def qualified(self, groups: RolloutGroups) -> int:
        """Return how many groups of the first stage qualify, for the log."""
        return int(qualifies(*successes_of(groups, self.success_at), self.low, self.high).sum())
