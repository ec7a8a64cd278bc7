"""One instance of every schedule, for pictures and for tests that must hold for all of them."""

from __future__ import annotations

from .base import Schedule
from .closed_forms import constant, cosine, cosine_power, damped_cosine, inverse_sqrt, linear, rex, uba
from .compose import join, scale, token_indexed
from .continual import infinite, power, rewarm_redecay
from .cyclic import one_cycle, slow_start_fast_decay, triangular
from .refined import refined_by_gradient_norm
from .shapes import SHAPES
from .stable_decay import wsd, wsd_s, wsdc


def gallery(total_steps: int) -> list[Schedule]:
    """
    Return every schedule for a run of `total_steps` updates, with settings that fit any length.

    Example:
    ```python
    >>> sorted({type(schedule).__name__ for schedule in gallery(100)})[:3]
    ['constant', 'cosine', 'cosine_power']
    ```
    """
    n = total_steps
    schedules: list[Schedule] = [
        constant(n),
        linear(n),
        linear(n, warmup_fraction=0.1, floor=0.1),
        cosine(n),
        cosine(n, warmup_fraction=0.1, floor=0.1),
        inverse_sqrt(n, warmup_fraction=0.1),
        rex(n),
        rex(n, kappa=0.9, floor=0.1),
        uba(n),
        uba(n, phi=0.25, floor=0.05),
        cosine_power(n, base=10, floor=0.01),
        cosine_power(n, spread=True),
        damped_cosine(n, cycles=3, gamma=0.5, floor=0.1),
        damped_cosine(n, floor=0.1),
        wsd(n, open_ended=True),
        wsd(n, shape="half-life", half_life_steps=20.0, floor=0.01),
    ]
    schedules += [wsd(n, shape=shape, floor=0.1, power=2.0 if shape == "power" else 1.0) for shape in sorted(SHAPES)]
    schedules += [wsd(n, decay_offset=offset) for offset in ("start", "end")]
    schedules += [
        infinite(n, cooldown=kind, warmup_fraction=0.05, warmup_start=0.0)
        for kind in ("cosine", "inverse-sqrt", "linear")
    ]
    schedules += [
        infinite(n, first_task=False),
        rewarm_redecay(n, data_fractions=(1.0,)),
        # With the paper's batch of 1024 sequences the cap is left after 2.596e10 tokens: here after a third.
        power(
            n, tokens_per_step=max(1, int(2.596e10 / (n / 3))), sequence_length=max(1, int(2.596e10 / (n / 3)) // 1024)
        ),
        one_cycle(n),
        triangular(n, half_cycle_steps=max(1, n // 6)),
        slow_start_fast_decay(n),
        refined_by_gradient_norm([1 + 3 / (i + 1) for i in range(50)], total_steps=n),
        scale(schedule=cosine(n, floor=0.2), factor=0.5),
        token_indexed(schedule=linear(n)),
    ]
    if n >= 3:
        schedules.append(join(n, schedules=(constant(), cosine(floor=0.1)), boundaries=(n // 2,)))
        schedules.append(rewarm_redecay(n, data_fractions=(0.5, 0.5), warmup_fraction=0.1, peaks=(1.0, 0.6)))
        schedules += [wsd_s(n, budgets=(0.5, 1.0), rewarm_steps=1 if n >= 10 else 0), wsdc(n)]
    return schedules
