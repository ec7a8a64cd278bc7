"""QeRL's adaptive quantization noise: how large it is at an update, and what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: how the stages of a run get their sigma: by the paper's formula, or by the released code
NOISE_SCHEDULES = ("paper", "code")


def stage_sigmas(start: float, end: float, stages: int, schedule: str = "paper") -> list[float]:
    """
    Return the standard deviation of the noise in each of `K = stages` equal parts of a run.

    Formula, with stages `k = 1..K`: `paper` is `sigma_k = start * (end / start)^((k - 1) / (K - 1))`. `code` is what
    QeRL's released trainer runs: no noise in the first stage, and `start * (end / start)^((k - 2) / (K - 2))` after
    it. Both are of 2510.11696.

    Args:
        start, end (`float`): Of the first and of the last stage with noise; `0 < end <= start`.
        stages (`int`): `K`, at least 2, and at least 3 for `code`.
        schedule (`str`, *optional*, defaults to `"paper"`): `"paper"` or `"code"`.

    Returns:
        `list[float]`: `K` values.

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> [round(sigma, 6) for sigma in stage_sigmas(1e-2, 1e-4, 3)]
    [0.01, 0.001, 0.0001]
    >>> [round(sigma, 6) for sigma in stage_sigmas(1e-2, 1e-4, 4, "code")]
    [0.0, 0.01, 0.001, 0.0001]
    ```
    """
    _check_stages(start, end, stages, schedule)
    return [_sigma_of(stage, start, end, stages, schedule) for stage in range(stages)]


def _check_stages(start: float, end: float, stages: int, schedule: str) -> None:
    if schedule not in NOISE_SCHEDULES:
        raise ValueError(f"schedule must be one of {NOISE_SCHEDULES}, got {schedule!r}.")
    if not (math.isfinite(start) and 0 < end <= start):
        raise ValueError(
            f"sigma_start={start!r} and sigma_end={end!r}: both must be above 0 and sigma_end no larger than "
            "sigma_start. QeRL uses 1e-2 and 1e-4; equal values are noise that stays as it is."
        )
    least = 2 + _silent(schedule)
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < least:
        raise ValueError(
            f"num_stages must be an integer of at least {least} with schedule={schedule!r}, got {stages!r}. QeRL uses "
            "10."
        )


def _silent(schedule: str) -> int:
    """How many stages at the start have no noise."""
    return int(schedule == "code")


def _sigma_of(stage: int, start: float, end: float, stages: int, schedule: str) -> float:
    silent = _silent(schedule)
    return 0.0 if stage < silent else float(start * (end / start) ** ((stage - silent) / (stages - silent - 1)))


def stage_at(step: int, total_steps: int, stages: int) -> int:
    """
    Return the stage, `0..stages - 1`, of an update: `floor(step * stages / total_steps)`, the last one past the end.

    Args:
        step (`int`): Updates done.
        total_steps (`int`): Updates of the run, at least 1.
        stages (`int`): Into how many equal parts the run is split.

    Example:
    ```python
    >>> [stage_at(step, 25, 10) for step in (0, 2, 3, 12, 24, 25, 99)]
    [0, 0, 1, 4, 9, 9, 9]
    ```
    """
    if total_steps < 1 or step < 0:
        raise ValueError(f"step {step} of {total_steps} updates: a run has at least 1 update, and steps begin at 0.")
    return min(step * stages // total_steps, stages - 1)


def draw_noise(sizes: Sequence[int], sigma: float, seed: int, generation: int) -> list[Tensor]:
    """
    Draw `Z ~ N(0, sigma^2)` for the channels of each layer, a pure function of the arguments.

    Two sigmas give the same draw but for its size.

    Args:
        sizes (`Sequence[int]`): Channels of each layer, in an order that all processes share.
        sigma (`float`): Standard deviation, at least 0.
        seed (`int`): Of the run.
        generation (`int`): Number of the generation.

    Returns:
        `list[torch.Tensor]`: Single precision on the CPU, one of shape `(size,)` for each layer.

    Example:
    ```python
    >>> first, second = draw_noise([3, 2], 0.01, seed=0, generation=1)
    >>> first.shape, second.shape, bool((draw_noise([3, 2], 0.02, 0, 1)[0] == 2 * first).all())
    (torch.Size([3]), torch.Size([2]), True)
    ```
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + generation) % 2**63)
    return [torch.randn(size, generator=generator) * sigma for size in sizes]


@dataclass(frozen=True)
class AdaptiveNoise:
    """
    Noise on the scales of the normalisation layers while rollouts are generated (QeRL, 2510.11696).

    Handed to [`~hf_effi.EffiGRPOTrainer`] as `rollout_noise=`. For another course of sigma, derive from it and
    override `sigma`.

    Args:
        sigma_start, sigma_end (`float`, *optional*, default to `1e-2` and `1e-4`): Standard deviation in the first and
            in the last stage, relative to a channel of the normalised input; `0 < sigma_end <= sigma_start`.
        num_stages (`int`, *optional*, defaults to 10): Equal parts of the run, with one sigma each.
        schedule (`str`, *optional*, defaults to `"paper"`): `"paper"`, or `"code"`, which has no noise in the first
            stage; see [`stage_sigmas`].
        head_norms (`bool`, *optional*, defaults to `False`): Also the norms that are given something else than the
            hidden states, such as those of queries and keys in each head.
        correction (`bool`, *optional*, defaults to `False`): Compute the log-probs of the completions under the noise
            once more, as those of the policy that sampled them. QeRL does not.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Example:
    ```python
    >>> noise = AdaptiveNoise(1e-2, 1e-4, num_stages=3)
    >>> [round(noise.sigma(step, total_steps=30), 6) for step in (0, 9, 10, 29)]
    [0.01, 0.01, 0.001, 0.0001]
    ```
    """

    sigma_start: float = 1e-2
    sigma_end: float = 1e-4
    num_stages: int = 10
    schedule: str = "paper"
    head_norms: bool = False
    correction: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # Not the list of all stages: a card may name any number of them.
        _check_stages(self.sigma_start, self.sigma_end, self.num_stages, self.schedule)
        for name in ("head_norms", "correction"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}.")

    def sigma(self, step: int, total_steps: int) -> float:
        """
        Return the standard deviation of the generation before update `step + 1`; 0 is no noise.

        Args:
            step (`int`): Updates done.
            total_steps (`int`): Updates of the run.
        """
        stage = stage_at(step, total_steps, self.num_stages)
        return _sigma_of(stage, self.sigma_start, self.sigma_end, self.num_stages, self.schedule)
