"""CyclicReflex: a triangle wave on the logits of words that begin a second thought."""

from __future__ import annotations

from ..data import check_count, check_number


def reflection_bonus(step: int, amplitude: float = 5.0, period: int = 600, shift: float = 0.0) -> float:
    """
    Return what is added to the logits of the reflection tokens at a generated token.

    With `phi = ((step + shift period) mod period) / period`: `4 A phi` up to 1/4, `A - 4 A (phi - 1/4)` up to 3/4,
    then `-A + 4 A (phi - 3/4)`. CyclicReflex, [2506.11077](https://huggingface.co/papers/2506.11077).

    Args:
        step (`int`): Tokens that were generated before this one, from 0.
        amplitude (`float`, *optional*, defaults to 5.0): `A`, at least 0. The authors' scripts: 5.
        period (`int`, *optional*, defaults to 600): `C`, in tokens. The authors' scripts: 600 to 1200.
        shift (`float`, *optional*, defaults to 0.0): Share of a period by which the wave is ahead, in [0, 1].

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> [reflection_bonus(step) for step in (0, 75, 150, 300, 450, 525, 600)]
    [0.0, 2.5, 5.0, 0.0, -5.0, -2.5, 0.0]
    ```
    """
    check_count("step", step, 0)
    check_number("amplitude", amplitude, 0.0)
    check_count("period", period)
    check_number("shift", shift, 0.0, 1.0)
    phase = ((step + shift * period) % period) / period
    if phase <= 0.25:
        return 4 * amplitude * phase
    if phase <= 0.75:
        return amplitude - 4 * amplitude * (phase - 0.25)
    return -amplitude + 4 * amplitude * (phase - 0.75)
