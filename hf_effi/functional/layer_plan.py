"""
Which decoder layers keep, save in part, recompute or offload their activations: least time under a memory budget.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

#: how a layer can keep its activations, from the most memory on the device to the least
MODES = ("keep", "selective", "checkpoint", "offload")


@dataclass(frozen=True)
class ModeCost:
    """
    What one mode costs one layer.

    Args:
        seconds (`float`): Time on top of keeping everything, forward and backward together.
        size (`int`): Bytes that stay on the device between the forward and the backward pass.
    """

    seconds: float
    size: int


@dataclass(frozen=True)
class LayerCost:
    """
    The choices of one layer. Layers with the same costs are exchangeable.

    Args:
        modes (`Mapping[str, ModeCost]`): By mode; a mode that is absent is not on offer.
        working_bytes (`int`): What recomputing the layer holds for a moment: all that it would have kept.
    """

    modes: Mapping[str, ModeCost]
    working_bytes: int

    @property
    def kind(self) -> Hashable:
        """What exchangeable layers have in common."""
        return self.working_bytes, *sorted((mode, cost.seconds, cost.size) for mode, cost in self.modes.items())


def mode_costs(
    forward_seconds: float,
    attention_seconds: float,
    *,
    kept_bytes: int,
    attention_bytes: int,
    input_bytes: int,
    copy_bytes_per_second: float | None = None,
) -> LayerCost:
    """
    Return the choices of a layer from one measurement of it.

    `keep` costs no time; `selective` recomputes all but attention; `checkpoint` recomputes the forward pass; `offload`
    also waits for what is left of the copy after a layer's forward has hidden the rest,
    `max(0, input_bytes / bandwidth - forward_seconds)`, in the forward and in the backward pass.

    Args:
        forward_seconds (`float`): One forward pass of the layer.
        attention_seconds (`float`): The part of it inside fused attention.
        kept_bytes (`int`): What autograd saves in it.
        attention_bytes (`int`): Outputs of fused attention.
        input_bytes (`int`): The layer's input.
        copy_bytes_per_second (`float`, *optional*): Bandwidth between device and host; without it `offload` is not
            offered.

    Example:
    ```python
    >>> cost = mode_costs(4.0, 1.0, kept_bytes=100, attention_bytes=10, input_bytes=8, copy_bytes_per_second=1.0)
    >>> [(mode, c.seconds, c.size) for mode, c in cost.modes.items()]
    [('keep', 0.0, 100), ('selective', 3.0, 18), ('checkpoint', 4.0, 8), ('offload', 12.0, 0)]

    ```
    """
    modes = {
        "keep": ModeCost(0.0, kept_bytes),
        "selective": ModeCost(forward_seconds - attention_seconds, input_bytes + attention_bytes),
        "checkpoint": ModeCost(forward_seconds, input_bytes),
    }
    if copy_bytes_per_second is not None:
        exposed = max(0.0, input_bytes / copy_bytes_per_second - forward_seconds)
        modes["offload"] = ModeCost(forward_seconds + 2 * exposed, 0)
    return LayerCost(modes, working_bytes=kept_bytes)


def plan_bytes(layers: Sequence[LayerCost], modes: Sequence[str]) -> int:
    """
    Return the activation memory of a plan: what stays, and the largest layer that is recomputed.

    Args:
        layers (`Sequence[LayerCost]`): The layers.
        modes (`Sequence[str]`): One mode per layer.
    """
    stays = sum(layer.modes[mode].size for layer, mode in zip(layers, modes, strict=True))
    recomputed = [layer.working_bytes for layer, mode in zip(layers, modes, strict=True) if mode != "keep"]
    return stays + max(recomputed, default=0)


def plan_layer_modes(layers: Sequence[LayerCost], budget_bytes: int) -> tuple[str, ...]:
    """
    Choose one mode per layer: least extra time with [`plan_bytes`] within the budget. The choice is optimal.

    A multiple-choice knapsack, solved over the (bytes, time) pairs that no other pair beats. The working memory of the
    recomputed layers is a maximum, so that the knapsack is solved once for each value that it can have. Among equal
    layers the ones that free most memory come last, since the backward pass frees the last layers first, and offloaded
    ones come first.

    Args:
        layers (`Sequence[LayerCost]`): The layers, in order.
        budget_bytes (`int`): Memory for the activations of all layers.

    Returns:
        `tuple[str, ...]`: One mode per layer.

    Raises:
        ValueError: not even the smallest plan fits; the message says how much it needs.

    Example:
    ```python
    >>> layer = mode_costs(4.0, 1.0, kept_bytes=100, attention_bytes=10, input_bytes=8)
    >>> plan_layer_modes([layer] * 4, budget_bytes=340)
    ('selective', 'selective', 'keep', 'keep')

    ```
    """
    if not layers:
        raise ValueError("there are no layers to plan.")
    best: tuple[float, int, tuple[str, ...]] | None = None
    for working in sorted({0, *(layer.working_bytes for layer in layers)}):
        found = _least_time(layers, budget_bytes - working, working)
        if found is not None and (best is None or found[:2] < best[:2]):
            best = found
    if best is None:
        smallest = [min(layer.modes, key=lambda mode: layer.modes[mode].size) for layer in layers]
        raise ValueError(
            f"no plan fits into {budget_bytes} bytes: the smallest needs {plan_bytes(layers, smallest)}. Raise the "
            "budget, or shorten the sequences or the micro-batch."
        )
    return _in_freeing_order(layers, best[2])


def _least_time(layers: Sequence[LayerCost], budget: int, working: int) -> tuple[float, int, tuple[str, ...]] | None:
    """Return (seconds, bytes, modes) of the best plan whose recomputed layers need at most `working` bytes each."""
    # bytes -> (seconds, chain of modes, from the last layer to the first)
    plans: dict[int, tuple[float, tuple]] = {0: (0.0, ())}
    for layer in layers:
        allowed = [(m, c) for m, c in layer.modes.items() if m == "keep" or layer.working_bytes <= working]
        reached: dict[int, tuple[float, tuple]] = {}
        for size, (seconds, chain) in plans.items():
            for mode, cost in allowed:
                total = size + cost.size
                if total > budget:
                    continue
                time = seconds + cost.seconds
                if total not in reached or time < reached[total][0]:
                    reached[total] = (time, (mode, chain))
        plans = _unbeaten(reached)
    if not plans:
        return None
    size, (seconds, chain) = min(plans.items(), key=lambda item: (item[1][0], item[0]))
    modes = []
    while chain:
        mode, chain = chain
        modes.append(mode)
    return seconds, size, tuple(reversed(modes))


def _unbeaten(plans: dict[int, tuple[float, tuple]]) -> dict[int, tuple[float, tuple]]:
    """Keep the plans for which no smaller one is as fast."""
    kept: dict[int, tuple[float, tuple]] = {}
    fastest = float("inf")
    for size in sorted(plans):
        if plans[size][0] < fastest:
            kept[size] = plans[size]
            fastest = plans[size][0]
    return kept


def _in_freeing_order(layers: Sequence[LayerCost], modes: Sequence[str]) -> tuple[str, ...]:
    """Give the modes of each kind of layer to its layers from `offload` to `keep`."""
    queues: dict[Hashable, list[str]] = {}
    for layer, mode in zip(layers, modes, strict=True):
        queues.setdefault(layer.kind, []).append(mode)
    for queue in queues.values():
        queue.sort(key=MODES.index)  # popped from the end: offload first
    return tuple(queues[layer.kind].pop() for layer in layers)
