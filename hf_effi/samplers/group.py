"""Any sampler's order in the layout that GRPO needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional.data import check_count
from ..functional.rollouts import GenerationLayout
from .base import EffiSampler


class GroupSampler(EffiSampler):
    """
    Give each index of another sampler `mini_repeat_count` times, in the layout of TRL's `RepeatSampler`.

    Args:
        sampler ([`EffiSampler`]): Orders the prompts.
        mini_repeat_count (`int`): `num_generations`.
        batch_size (`int`, *optional*, defaults to 1): Distinct prompts of a generation,
            `generation_batch_size // num_generations`.
        repeat_count (`int`, *optional*, defaults to 1): `num_iterations * steps_per_generation`.

    Raises:
        ValueError: an epoch of `sampler` has fewer prompts than one generation needs, or a count below 1.
    """

    learns = True  # as far as anybody can tell: what the sampler inside has learned is its state

    def __init__(
        self, sampler: EffiSampler, mini_repeat_count: int, batch_size: int = 1, repeat_count: int = 1
    ) -> None:
        super().__init__(sampler.num_rows, sampler.seed)
        self.sampler = sampler
        self.mini_repeat_count = check_count("mini_repeat_count", mini_repeat_count)
        self.batch_size = check_count("batch_size", batch_size)
        self.repeat_count = check_count("repeat_count", repeat_count)
        # A chunk of `batch_size` prompts, given `repeat_count` times, is one generation of so many micro-steps.
        self.layout = GenerationLayout(mini_repeat_count * batch_size, mini_repeat_count, num_iterations=repeat_count)
        if len(sampler) < batch_size:
            raise ValueError(
                f"{type(sampler).__name__} gives {len(sampler)} prompts per epoch, but one generation needs "
                f"{batch_size}. Add prompts, or lower per_device_train_batch_size or steps_per_generation."
            )

    def __len__(self) -> int:
        return self.layout.rows_per_pass(len(self.sampler))

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)
        super().set_epoch(epoch)

    def order(self, epoch: int) -> Tensor:
        return self.layout.order(self.sampler.order(epoch))

    def settings(self) -> dict[str, Any]:
        return {
            "sampler": self.sampler.fingerprint(),
            "layout": [self.mini_repeat_count, self.batch_size, self.repeat_count],
        }

    def identity(self) -> str:
        return f"{super().identity()}({self.sampler.identity()})"

    def learned_state(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_learned_state(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)

    def check_not_started(self) -> None:
        super().check_not_started()
        self.sampler.check_not_started()

    def _cache_key(self) -> Any:
        return self.epoch, self.sampler._cache_key()
