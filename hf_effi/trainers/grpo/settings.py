"""`GRPOSettings`: the own fields of a config, read once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .config import EffiGRPOConfig, parse_exact_savings


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
    loss_token_budget: int | None
    score_token_budget: int | None
    ntp_coef: float
    rollout_savings: str
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

    @property
    def token_budgets(self) -> tuple[int, int]:
        """The most tokens of a forward with and without a gradient; 0 is off."""
        return self.loss_token_budget or 0, self.score_token_budget or 0
