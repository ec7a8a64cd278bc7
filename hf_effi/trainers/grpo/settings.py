"""`GRPOSettings`: the own fields of a config, read once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .config import EffiGRPOConfig, parse_exact_savings, refuse_unused

#: Options that act only where groups are filtered.
_OF_FILTERING = ("difficulty_reward", "difficulty_max_rounds", "difficulty_underfill")


@dataclass(frozen=True)
class GRPOSettings:
    """
    What the methods of [`EffiGRPOTrainer`] were asked to do: the fields of [`EffiGRPOConfig`] of the same names.

    They hold from the moment when the trainer is built; `args` that change later do not change them.

    Example:
    ```python
    >>> from trl import GRPOConfig
    >>> settings = GRPOSettings.of(GRPOConfig("out", use_cpu=True, bf16=False))
    >>> settings.exact_savings, settings.difficulty_range, settings.prune_rate
    ('auto', None, 0.0)
    ```
    """

    exact_savings: str
    forward_buckets: int
    difficulty_range: list[float] | tuple[float, float] | None
    difficulty_reward: str | None
    difficulty_max_rounds: int
    difficulty_underfill: str
    prune_rate: float
    prune_metric: str
    prune_scope: str
    prune_allocation: bool
    prune_balance_signs: bool
    prune_normalizer: str

    @classmethod
    def of(cls, args: Any) -> GRPOSettings:
        """
        Return the settings of a config of any class; a plain `GRPOConfig` has the defaults of [`EffiGRPOConfig`].
        """
        own = EffiGRPOConfig.__dataclass_fields__
        values: dict[str, Any] = {
            field.name: getattr(args, field.name, own[field.name].default) for field in fields(cls)
        }
        return cls(**values)

    @property
    def wanted_savings(self) -> tuple[str, ...] | None:
        """The exact savings that are named, `()` for `"off"`, or `None` for `"auto"`."""
        return parse_exact_savings(self.exact_savings)

    def check_objects(
        self,
        prompt_selector: Any = None,
        group_filter: Any = None,
        rollout_pruner: Any = None,
        train_sampler: Any = None,
    ) -> None:
        """
        Check settings and objects of a trainer against each other, before a model is loaded.

        Raises:
            ValueError: two ways to give the same method, or an option whose method is off.
        """
        if group_filter is not None and self.difficulty_range is not None:
            raise ValueError("pass either `group_filter=` or `difficulty_range`, not both.")
        if rollout_pruner is not None and self.prune_rate:
            raise ValueError("pass either `rollout_pruner=` or `prune_rate`, not both.")
        if prompt_selector is not None and train_sampler is not None:
            raise ValueError(
                "`prompt_selector=` chooses the prompts of every generation, so that `train_sampler=` would order "
                "rows that nobody reads. Drop one of the two."
            )
        if group_filter is None and self.difficulty_range is None:
            # `difficulty_reward` also says which function's pass rates a selector is told.
            read = ("difficulty_reward",) if prompt_selector is not None else ()
            refuse_unused(
                self,
                tuple(name for name in _OF_FILTERING if name not in read),
                "acts only where groups are filtered, which they are not. Set difficulty_range, e.g. (0, 1), or pass "
                "group_filter=",
            )
        if rollout_pruner is None and not self.prune_rate:
            refuse_unused(
                self,
                ("prune_normalizer",),
                "acts only where completions are pruned, which they are not. Set prune_rate, e.g. 0.5, or pass "
                "rollout_pruner=",
            )
