"""How fast a device does the work of GRPO: from its data sheet, or fitted to measured runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .grpo_plan import Work

#: card -> peak TFLOP/s of dense bf16 products, and GB/s of its memory, as the makers' data sheets have them
CARDS: dict[str, tuple[float, float]] = {
    "a100": (312.0, 2039.0),
    "h100": (989.0, 3350.0),
    "h200": (989.0, 4800.0),
    "l40s": (362.0, 864.0),
    "rtx4090": (165.0, 1008.0),
    "mi300x": (1307.0, 5300.0),
}
#: bytes that AdamW moves for a parameter in fp32: weight, gradient and two moments read, all but the gradient written
_ADAMW_BYTES = 28


@dataclass(frozen=True)
class ModelSize:
    """
    What a model's work depends on.

    Args:
        linear_weights (`float`): Weights of the layers' matrices.
        head_weights (`float`): Weights of the LM head.
        parameters (`float`): All that are trained.
        layers (`int`): Decoder layers.
        weight_bytes (`float`): Bytes of all weights, which decoding reads for each token.
        kv_bytes (`float`): Bytes of keys and values of one token, all layers.
        per_pair (`float`): Cost of a pair of a query and a key, in tokens, as
            [`~hf_effi.functional.forward_costs.ForwardCosts`] has it.
    """

    linear_weights: float
    head_weights: float
    parameters: float
    layers: int
    weight_bytes: float
    kv_bytes: float
    per_pair: float


@dataclass(frozen=True)
class DataSheet:
    """
    A card, and what is reached of it.

    Args:
        tflops (`float`): Peak TFLOP/s in the dtype of the products, above 0.
        gb_per_second (`float`): Memory bandwidth, above 0.
        efficiency (`float`, *optional*, defaults to `0.35`): Share of the peak that prefill, log-probs and training
            reach, in (0, 1].
        bandwidth_efficiency (`float`, *optional*, defaults to `0.6`): Share of the bandwidth that decoding reaches, in
            (0, 1].
        layer_milliseconds (`float`, *optional*, defaults to `0.5`): What the host needs for one layer of one decoding
            step or forward. 0.5 is a guess for transformers' `generate`; captured graphs, as vLLM has, need about
            0.02.
        spread (`float`, *optional*, defaults to `0.4`): Relative `+-` of the three, in [0, 1).

    Raises:
        ValueError: a number out of range.
    """

    tflops: float
    gb_per_second: float
    efficiency: float = 0.35
    bandwidth_efficiency: float = 0.6
    layer_milliseconds: float = 0.5
    spread: float = 0.4

    def __post_init__(self) -> None:
        for name in ("tflops", "gb_per_second"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number above 0.")
        for name in ("efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie in (0, 1].")
        if not 0 <= self.layer_milliseconds < math.inf:
            raise ValueError(f"layer_milliseconds={self.layer_milliseconds!r} must be a number from 0.")
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread={self.spread!r} must lie in [0, 1).")

    def scaled(self, direction: int) -> DataSheet:
        """Return the faster (1) or slower (-1) end of the spread, without a spread of its own."""
        factor = 1 + direction * self.spread
        return DataSheet(
            self.tflops,
            self.gb_per_second,
            min(1.0, self.efficiency * factor),
            min(1.0, self.bandwidth_efficiency * factor),
            self.layer_milliseconds * (1 - direction * self.spread),
            0.0,
        )


def datasheet_speeds(model: ModelSize, card: DataSheet) -> dict[str, dict[str, float]]:
    """
    Return seconds for each count of [`~hf_effi.functional.grpo_plan.PlannedWork`], by arithmetic.

    With `F` and `B` the achieved FLOP/s and bytes/s: a token costs `2 n / F` forward and three times that in training,
    for `n` weights, the head's on completion tokens alone; a decoding step reads the weights, `bytes / B`, and adds
    `2 n / F` for each row and the keys and values of each row's context, `kv / B`; each layer of a forward or decoding
    step costs the host its milliseconds, a training step three times. AdamW moves 28 bytes per parameter. The parts
    are added, as if none ran beside another.

    Args:
        model ([`ModelSize`]): The model.
        card ([`DataSheet`]): The card; its spread is not read.

    Example:
    ```python
    >>> model = ModelSize(1e9, 1e8, 1.1e9, 10, 2.2e9, 1e4, 0.0)
    >>> speeds = datasheet_speeds(model, DataSheet(100, 1000, efficiency=0.5, bandwidth_efficiency=0.5))
    >>> round(speeds["train"]["token"] * 1e6, 6), round(speeds["gen"]["step"] * 1e3, 6)
    (120.0, 9.4)

    ```
    """
    flops, moved = card.tflops * 1e12 * card.efficiency, card.gb_per_second * 1e9 * card.bandwidth_efficiency
    host = model.layers * card.layer_milliseconds / 1000
    token, head = 2 * model.linear_weights / flops, 2 * model.head_weights / flops
    forward = {"token": token, "pair": model.per_pair * token, "completion_token": head}
    return {
        "gen": {
            "prefill_token": token,
            "step": model.weight_bytes / moved + host,
            "step_row": token + head,
            "step_context": model.kv_bytes / moved,
        },
        "logp": {"forward": host, **forward},
        "train": {"forward": 3 * host, **{name: 3 * seconds for name, seconds in forward.items()}},
        "update": {"update": _ADAMW_BYTES * model.parameters / moved},
    }


def fit_speeds(samples: Sequence[tuple[Work, Mapping[str, float]]]) -> tuple[dict[str, dict[str, float]], float]:
    """
    Return the seconds for each count, and the largest relative error of a sample's sum of phases.

    Least squares of relative errors with coefficients of at least 0, for each phase: of all sets of counts the best
    one whose coefficients are none of them negative.

    Args:
        samples (`Sequence[tuple[Work, Mapping[str, float]]]`): Counts, and measured seconds of each phase, both of
            one generation.

    Raises:
        ValueError: fewer than two samples, or seconds that are negative or no numbers.

    Example:
    ```python
    >>> samples = [({"gen": {"call": 1, "step": n}}, {"gen": 0.5 + 0.1 * n}) for n in (1, 5, 9)]
    >>> speeds, error = fit_speeds(samples)
    >>> round(speeds["gen"]["call"], 6), round(speeds["gen"]["step"], 6), round(error, 6)
    (0.5, 0.1, 0.0)

    ```
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples do not tell a speed: measure at least 2.")
    for _, seconds in samples:
        for phase, value in seconds.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{value!r} seconds of phase {phase!r} are no time: they must be finite and from 0.")
    speeds: dict[str, dict[str, float]] = {}
    for phase in {name: None for work, _ in samples for name in work}:
        rows = [(work.get(phase, {}), seconds.get(phase, 0.0)) for work, seconds in samples]
        rows = [(counts, value) for counts, value in rows if any(counts.values()) and value > 0]
        if rows:
            speeds[phase] = _nonnegative(rows)
    errors = []
    for work, seconds in samples:
        told = sum(c * speeds.get(p, {}).get(n, 0.0) for p, counts in work.items() for n, c in counts.items())
        if (real := sum(seconds.values())) > 0:
            errors.append(abs(told - real) / real)
    return speeds, max(errors, default=0.0)


def _nonnegative(rows: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Return the non-negative coefficients of least relative squared error, by trying all sets of counts."""
    import torch

    names = list({name: None for counts, _ in rows for name in counts})
    left = torch.tensor([[counts.get(name, 0.0) / y for name in names] for counts, y in rows], dtype=torch.float64)
    ones = torch.ones(len(rows), dtype=torch.float64)
    scale = left.norm(dim=0)
    best, found = math.inf, dict.fromkeys(names, 0.0)
    for chosen in range(1, 2 ** len(names)):
        at = [i for i in range(len(names)) if chosen >> i & 1 and scale[i] > 0]
        if not at or len(at) > len(rows):
            continue
        scaled = left[:, at] / scale[at]
        solution = torch.linalg.lstsq(scaled, ones, driver="gelsd").solution
        error = float((scaled @ solution - ones).square().sum())
        if bool((solution >= -1e-12).all()) and error < best - 1e-12:
            best = error
            found = dict.fromkeys(names, 0.0)
            found.update({names[i]: max(0.0, float(v / scale[i])) for i, v in zip(at, solution, strict=True)})
    return found
