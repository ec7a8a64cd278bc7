"""MoPPS and BOTS: Thompson sampling of prompts whose pass rate is near a target, from Beta posteriors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional.data import check_number
from ..functional.kept_arguments import keeps_arguments
from ..functional.options import refuse_idle
from ..functional.rollouts import (
    check_success_at,
    distance_to_target,
    draw_beta,
    draw_uniform,
    forget_counts,
    implied_rates,
    reference_position,
    successes_of,
)
from ._history import Column, HistorySelector, StepTotals, saved

if TYPE_CHECKING:
    from ..protocols import RolloutGroups


class MoPPS(HistorySelector):
    """
    Keep a Beta posterior of the pass rate of each prompt and choose those whose draw is nearest to a target.

    For a prompt with `s` right and `f` wrong completions in a step:
    `alpha <- (1 - forget) * alpha + forget * alpha_0 + s`, and `beta` alike with `f` and `beta_0`. A call draws
    `candidates` times as many rows as are wanted, uniformly; draws `p ~ Beta(alpha, beta)` for each; and returns those
    with the smallest `|p - target|`.

    [MoPPS](https://huggingface.co/papers/2507.04632) writes `lambda` for `1 - forget`, and forgets only what it sees
    again. [BOTS](https://huggingface.co/papers/2510.26374) writes `lambda` for `forget`, and forgets all prompts in
    each step. A prompt without rollouts in the step counts there as if it had `rho * k * p~` right and
    `rho * k * (1 - p~)` wrong completions, with `k` the completions of a group and
    `p~ = clip(mu * p_strong + (1 - mu) * p_weak, 0, 1)`, from the stored pass rates of a strong and a weak model and
    from where the policy stands between the two.
    `MoPPS()` is MoPPS, `MoPPS(forget=0.1, rho=0.1, weak="...", strong="...")` is BOTS.

    Args:
        size (`int`, *optional*): Rows of the training dataset. By default what the trainer says.
        target (`float`, *optional*, defaults to 0.5): Pass rate aimed at, in [0, 1].
        band (`tuple[float, float]`, *optional*): Any pass rate inside counts as aimed at, in place of `target`.
        forget (`float`, *optional*, defaults to 0): See above, in [0, 1].
        forget_unseen (`bool`, *optional*, defaults to `False`): Forget all prompts in each step, as BOTS does. With
            `rho > 0` that is so anyway.
        candidates (`float`, *optional*, defaults to 8): Rows drawn for each that is wanted, in [1, 1e6]; `None` = all.
        prior (`tuple[float, float]`, *optional*, defaults to (1, 1)): `alpha_0` and `beta_0`, > 0.
        passed, tried (column, *optional*): Right answers, and answers, of each prompt that are known before the run:
            a warm start with `alpha_0 + warm_weight * passed`.
        warm_weight (`float`, *optional*, defaults to 3): Of those answers, > 0.
        rho (`float`, *optional*, defaults to 0): Weight of the references, in [0, 1).
        weak, strong (column, *optional*): Pass rates of the references, in [0, 1].
        momentum (`float`, *optional*, defaults to 0.9): Of `mu`, in [0, 1).
        success_at (`float`, *optional*): Lowest reward of a right answer. Without it the reward that decides must be 0
            or 1.
        explore (`float`, *optional*, defaults to 0.1): Share of the rows that is drawn uniformly.
        seed (`int`, *optional*, defaults to 0): Of all draws.

    A column is its name in the training dataset, or one value per row.

    Raises:
        ValueError: an argument out of range, or one that nothing reads.

    Example:
    ```python
    >>> selector = MoPPS(passed=[0, 8, 4], tried=[8, 8, 8], explore=0.0, candidates=None)
    >>> selector.rates().tolist(), selector.select(1)
    ([0.038461538461538464, 0.9615384615384616, 0.5], [2])
    ```
    """

    _columns = ("passed", "tried", "weak", "strong")
    #: rows with rollouts in the step
    _in_step: list[int]
    #: `mu`, and the completions of a group, with which rows were counted that had none in the step
    _implied: list[float]

    @keeps_arguments
    def __init__(
        self,
        size: int | None = None,
        *,
        target: float = 0.5,
        band: tuple[float, float] | None = None,
        forget: float = 0.0,
        forget_unseen: bool = False,
        candidates: float | None = 8.0,
        prior: tuple[float, float] = (1.0, 1.0),
        passed: Column | None = None,
        tried: Column | None = None,
        warm_weight: float = 3.0,
        rho: float = 0.0,
        weak: Column | None = None,
        strong: Column | None = None,
        momentum: float = 0.9,
        success_at: float | None = None,
        explore: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.passed, self.tried, self.weak, self.strong = passed, tried, weak, strong
        super().__init__(size, explore, seed)
        self.target, self.band = check_number("target", target, 0, 1), _pair("band", band)
        if self.band is not None:
            check_number("band", self.band[1], 0, 1)
            check_number("band", self.band[0], 0, self.band[1])
        refuse_idle("target", target, 0.5, band is None, "without band=")
        self.forget = check_number("forget", forget, 0, 1)
        if not isinstance(forget_unseen, bool):
            raise TypeError(f"forget_unseen must be True or False, got {forget_unseen!r}.")
        self.forget_unseen = forget_unseen
        self.candidates = None if candidates is None else check_number("candidates", candidates, 1, 1e6)
        self.prior = _pair("prior", prior) or (1.0, 1.0)
        for count in self.prior:
            check_number("prior", count, 0, 1e6, open_low=True)
        self.warm_weight = check_number("warm_weight", warm_weight, 0, 1e6, open_low=True)
        self.rho = check_number("rho", rho, 0, 1, open_high=True)
        self.momentum = check_number("momentum", momentum, 0, 1, open_high=True)
        check_success_at(success_at)
        self.success_at = success_at
        self._check_together()
        self._steps = StepTotals(4)
        #: `mu`; empty until the references could be compared
        self.position: list[float] = []
        self._new_step()

    def _check_together(self) -> None:
        warm = self.passed is not None
        if warm != (self.tried is not None):
            raise ValueError("passed= and tried= belong together: right answers, and all answers, of each prompt.")
        if (self.rho > 0) != (self.weak is not None) or (self.rho > 0) != (self.strong is not None):
            raise ValueError(
                f"rho={self.rho!r}, weak= and strong= belong together: give the pass rates of a weak and of a strong "
                "model with a rho above 0 (BOTS uses 0.1), or none of the three."
            )
        if self.rho > 0 and self.forget == 0:
            raise ValueError(
                f"rho={self.rho!r} adds to the counts of every prompt in each step, and without forgetting they grow "
                "for ever. Set forget above 0 (BOTS uses 0.1)."
            )
        refuse_idle("warm_weight", self.warm_weight, 3.0, warm, "with passed= and tried=")
        refuse_idle("momentum", self.momentum, 0.9, self.rho > 0, "with rho above 0")
        refuse_idle("forget_unseen", self.forget_unseen, False, self.forget > 0, "with forget above 0")

    def rates(self) -> Tensor:
        """Return the mean of each posterior, float64, shape `(size,)`."""
        self._ready()
        return self.alpha / (self.alpha + self.beta)

    def _begin(self, size: int) -> None:
        self.alpha, self.beta = (torch.full((size,), float(count), dtype=torch.float64) for count in self.prior)
        if self.passed is not None:
            passed, tried = self._numbers("passed", 0, 1e9), self._numbers("tried", 0, 1e9)
            if bool((passed > tried).any()):
                wrong = int((passed > tried).nonzero()[0])
                raise ValueError(f"row {wrong} has passed {passed[wrong]:g} of tried {tried[wrong]:g} answers.")
            self.alpha += self.warm_weight * passed
            self.beta += self.warm_weight * (tried - passed)
        if self.rho > 0:
            self._references = self._numbers("weak", 0, 1), self._numbers("strong", 0, 1)

    def _choose(self, count: int, free: Tensor, generator: torch.Generator) -> Tensor:
        wanted = len(free) if self.candidates is None else min(len(free), math.ceil(self.candidates * count))
        rows = draw_uniform(free, wanted, generator)
        drawn = draw_beta(self.alpha[rows], self.beta[rows], generator)
        # Inside a band all are equal: those that were drawn first go first.
        order = torch.sort(distance_to_target(drawn, self.target, self.band), stable=True).indices
        return rows[order[:count]]

    # --- learning ---------------------------------------------------------------------------------------------------

    def _learn(self, rows: Tensor, groups: RolloutGroups) -> None:
        successes, counts = successes_of(groups, self.success_at)
        scorable = counts > 0
        rows, successes, counts = rows[scorable], successes[scorable], counts[scorable]
        if len(rows) == 0:
            return
        if groups.step != self._step:
            self._new_step(groups.step)
        self._move_position(rows, successes / counts, groups.step)
        self._measure((self.alpha / (self.alpha + self.beta))[rows], successes / counts)
        first = rows.unique()
        if self._in_step:
            first = first[~torch.isin(first, torch.tensor(self._in_step))]
        if self.rho > 0 or self.forget_unseen:
            self._count_unseen(first, float(counts.mean()))
        else:
            self.alpha[first] = forget_counts(self.alpha[first], self.prior[0], self.forget)
            self.beta[first] = forget_counts(self.beta[first], self.prior[1], self.forget)
        self.alpha.index_add_(0, rows, successes)
        self.beta.index_add_(0, rows, counts - successes)
        self._in_step = sorted({*self._in_step, *first.tolist()})

    def _new_step(self, step: int = -1) -> None:
        """Begin a step: what is forgotten and implied counts once in it, however many rounds it has."""
        self._step, self._in_step, self._implied = step, [], []

    def _move_position(self, rows: Tensor, rates: Tensor, step: int) -> None:
        if self.rho == 0:
            return
        sums = (float(values.sum()) for values in (rates, *(values[rows] for values in self._references)))
        before, (observed, weak, strong, number) = self._steps.add(step, (*sums, len(rows)), self.position)
        now = reference_position(observed / number, weak / number, strong / number)
        if now is not None:
            self.position = [self.momentum * old + (1 - self.momentum) * now for old in before] or [now]

    def _count_unseen(self, first: Tensor, group_size: float) -> None:
        """Forget once in a step, and count what the references imply for rows without rollouts in it."""
        if not self._in_step:
            self.alpha = forget_counts(self.alpha, self.prior[0], self.forget)
            self.beta = forget_counts(self.beta, self.prior[1], self.forget)
            self._implied = [*self.position, group_size] if self.position else []
            self._add_implied(slice(None), 1.0)
        self._add_implied(first, -1.0)  # these have rollouts after all

    def _add_implied(self, rows: Any, sign: float) -> None:
        if self._implied:
            position, group_size = self._implied
            weak, strong = self._references
            rates, weight = implied_rates(weak[rows], strong[rows], position), sign * self.rho * group_size
            self.alpha[rows] += weight * rates
            self.beta[rows] += weight * (1 - rates)

    def _measure(self, predicted: Tensor, observed: Tensor) -> None:
        self._metrics |= {
            "predicted": float(predicted.mean()),
            "observed": float(observed.mean()),
            "error": float((predicted - observed).abs().mean()),
            "all_wrong": float((observed == 0).double().mean()),
            "middle": float(((observed >= 0.25) & (observed <= 0.75)).double().mean()),
            "all_right": float((observed == 1).double().mean()),
        }
        if self.position:
            self._metrics["reference_position"] = self.position[0]
        if len(observed) > 1 and float(predicted.std()) > 0 and float(observed.std()) > 0:
            self._metrics["correlation"] = float(torch.corrcoef(torch.stack([predicted, observed]))[0, 1])

    def _own_state(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha.clone(),
            "beta": self.beta.clone(),
            "position": list(self.position),
            "step": self._step,
            "in_step": list(self._in_step),
            "implied": list(self._implied),
            "steps": self._steps.state_dict(),
        }

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self.alpha, self.beta = saved(state, "alpha", self.alpha), saved(state, "beta", self.beta)
        self.position = list(state["position"])
        self._step, self._in_step, self._implied = state["step"], list(state["in_step"]), list(state["implied"])
        self._steps.load_state_dict(state["steps"])


def _pair(name: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}={value!r} must be two numbers, such as (0.3, 0.7) for a band.")
    return value[0], value[1]
