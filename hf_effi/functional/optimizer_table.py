"""Tuned settings of optimizers by model size and tokens, as published, and the row that is nearest to a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SOURCE = "Fantastic Pretraining Optimizers and Where to Find Them, arXiv 2509.02046, with the sweeps of its repository"
#: name in the source -> weights without embeddings and head: layers (3 width x ffn + 4 width^2)
SIZES = {"130M": 134_217_728, "300M": 301_989_888, "520M": 536_870_912, "1.2B": 1_207_959_552}
#: tokens per weight at a ratio of 1, as the source counts
CHINCHILLA = 20
#: tokens per sequence in all runs of the source
SEQUENCE_TOKENS = 4096
#: a run is inside the table where its size and its tokens are within this factor of a row's
REACH = 1.5


@dataclass(frozen=True)
class TunedRow:
    """
    One tuned run of the source.

    Args:
        optimizer (`str`): `"adamw"`, `"nadamw"`, `"mars"`, `"muon"` or `"soap"`.
        size (`str`): Key of `SIZES`.
        ratio (`int`): Tokens as a multiple of 20 per weight.
        learning_rate, betas, eps, weight_decay: Of the optimizer; with Muon the betas and `eps` are those of its Adam.
        warmup_steps (`int`): In updates.
        batch_sequences (`int`): Sequences of 4,096 tokens per update.
        max_grad_norm (`float`): Where the gradient is clipped.
        loss (`float`, *optional*): On C4-EN at the end; `None` where the source's tables do not have it.
        extra (`dict`): What only this optimizer has. Muon: `adam_learning_rate`, `momentum`, `decay_fraction` (share
            of the updates in which the LR falls linearly to 0). MARS: `gamma`. SOAP: `block_size`,
            `precondition_frequency`, `shampoo_beta`.
    """

    optimizer: str
    size: str
    ratio: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_steps: int
    batch_sequences: int
    max_grad_norm: float
    loss: float | None = None
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return SIZES[self.size]

    @property
    def tokens(self) -> int:
        return self.ratio * CHINCHILLA * self.parameters


def _adam(name: str, *rows: tuple[Any, ...]) -> tuple[TunedRow, ...]:
    """`rows`: size, ratio, LR, betas, eps, decay, warm-up, batch, clip, loss."""
    return tuple(TunedRow(name, *row) for row in rows)


def _muon(*rows: tuple[Any, ...]) -> tuple[TunedRow, ...]:
    """`rows`: size, ratio, LR, LR of Adam, momentum, share of decay, eps, batch, clip, loss."""
    return tuple(
        TunedRow(
            "muon", size, ratio, lr, (0.8, 0.98), eps, 0.1, 0, batch, clip, loss,
            {"adam_learning_rate": adam, "momentum": momentum, "decay_fraction": decay},
        )
        for size, ratio, lr, adam, momentum, decay, eps, batch, clip, loss in rows
    )  # fmt: skip


def _mars(*rows: tuple[Any, ...]) -> tuple[TunedRow, ...]:
    """`rows`: size, ratio, LR, betas, gamma, warm-up, batch, loss."""
    return tuple(
        TunedRow("mars", size, ratio, lr, betas, 1e-25, 0.1, warmup, batch, 1.0, loss, {"gamma": gamma})
        for size, ratio, lr, betas, gamma, warmup, batch, loss in rows
    )


def _soap(*rows: tuple[Any, ...]) -> tuple[TunedRow, ...]:
    """`rows`: size, ratio, LR, beta2, eps, warm-up, batch, block, frequency, Shampoo's beta, loss."""
    return tuple(
        TunedRow(
            "soap", size, ratio, lr, (0.95, beta2), eps, 0.1, warmup, batch, 1.0, loss,
            {"block_size": block, "precondition_frequency": frequency, "shampoo_beta": shampoo},
        )
        for size, ratio, lr, beta2, eps, warmup, batch, block, frequency, shampoo, loss in rows
    )  # fmt: skip


_B98, _N95, _N98 = (0.9, 0.98), (0.95, 0.98), (0.98, 0.98)
#: every tuned run that the source's tables and sweep files name, with its loss where they have it
TABLE: tuple[TunedRow, ...] = (
    *_adam(
        "adamw",
        ("130M", 1, 8e-3, _B98, 1e-20, 0.1, 2000, 128, 1.0, 3.529),
        ("130M", 2, 8e-3, _B98, 1e-20, 0.1, 2000, 128, 1.0, 3.409),
        ("130M", 4, 8e-3, _B98, 1e-20, 0.1, 2000, 128, 1.0, 3.322),
        ("130M", 8, 8e-3, _B98, 1e-20, 0.1, 1000, 256, 1.0, 3.262),
        ("130M", 16, 8e-3, _B98, 1e-10, 0.1, 1000, 256, 1.0, None),
        ("300M", 1, 8e-3, _B98, 1e-10, 0.1, 2000, 128, 1.0, 3.264),
        ("300M", 2, 8e-3, _B98, 1e-15, 0.1, 2000, 128, 1.0, 3.166),
        ("300M", 4, 8e-3, _B98, 1e-10, 0.1, 2000, 256, 2.0, 3.094),
        ("300M", 8, 8e-3, _B98, 1e-10, 0.1, 2000, 256, 2.0, 3.043),
        ("300M", 16, 4e-3, _B98, 1e-10, 0.1, 2000, 256, 2.0, None),
        ("520M", 1, 4e-3, _B98, 1e-10, 0.2, 1000, 256, 1.0, 3.110),
        ("520M", 2, 4e-3, _B98, 1e-10, 0.2, 1000, 256, 1.0, 3.023),
        ("520M", 4, 4e-3, _B98, 1e-10, 0.1, 1000, 256, 1.0, 2.958),
        ("520M", 8, 4e-3, _B98, 1e-10, 0.1, 1000, 256, 1.0, 2.913),
        ("1.2B", 1, 4e-3, _B98, 1e-10, 0.2, 1000, 256, 2.0, None),
    ),
    *_adam(
        "nadamw",
        ("130M", 1, 8e-3, _N95, 1e-25, 0.1, 2000, 128, 1.0, 3.531),
        ("130M", 2, 8e-3, _N95, 1e-10, 0.1, 2000, 128, 1.0, 3.394),
        ("130M", 4, 8e-3, _N95, 1e-10, 0.1, 2000, 128, 1.0, 3.319),
        ("130M", 8, 8e-3, _N95, 1e-10, 0.1, 2000, 128, 1.0, 3.251),
        ("300M", 1, 8e-3, _N95, 1e-10, 0.1, 2000, 128, 1.0, 3.248),
        ("300M", 2, 8e-3, _N95, 1e-10, 0.1, 2000, 128, 1.0, 3.160),
        ("300M", 4, 8e-3, _N95, 1e-10, 0.1, 2000, 256, 1.0, 3.090),
        ("300M", 8, 8e-3, _N95, 1e-10, 0.1, 2000, 256, 1.0, 3.039),
        ("520M", 2, 4e-3, _N98, 1e-10, 0.1, 4000, 128, 1.0, 3.013),
        ("520M", 4, 4e-3, _N98, 1e-10, 0.1, 4000, 128, 1.0, 2.955),
        ("520M", 8, 4e-3, _N98, 1e-10, 0.1, 4000, 256, 1.0, 2.907),
        ("1.2B", 1, 4e-3, _N98, 1e-10, 0.1, 4000, 256, 1.0, None),
        ("1.2B", 8, 4e-3, _N98, 1e-10, 0.1, 4000, 256, 1.0, None),
    ),
    *_muon(
        ("130M", 1, 1.6e-2, 3.2e-3, 0.95, 0.8, 1e-15, 128, 1.0, 3.464),
        ("130M", 2, 8e-3, 2.4e-3, 0.98, 0.8, 1e-15, 128, 1.0, 3.369),
        ("130M", 4, 8e-3, 2.4e-3, 0.95, 0.8, 1e-15, 128, 1.0, 3.296),
        ("130M", 8, 8e-3, 2.4e-3, 0.98, 1.0, 1e-15, 128, 1.0, 3.240),
        ("300M", 1, 8e-3, 2.4e-3, 0.98, 0.8, 1e-15, 128, 1.0, 3.224),
        ("300M", 2, 8e-3, 2.4e-3, 0.98, 0.8, 1e-15, 128, 1.0, 3.143),
        ("300M", 4, 4e-3, 1.2e-3, 0.98, 0.8, 1e-15, 128, 1.0, 3.079),
        ("300M", 8, 8e-3, 2.4e-3, 0.98, 0.8, 1e-15, 256, 1.0, 3.032),
        ("520M", 1, 8e-3, 2.4e-3, 0.98, 1.0, 1e-25, 128, 1.0, 3.073),
        ("520M", 2, 4e-3, 1.2e-3, 0.98, 1.0, 1e-25, 128, 2.0, 3.002),
        ("520M", 4, 8e-3, 2.4e-3, 0.98, 1.0, 1e-25, 256, 2.0, 2.945),
        ("520M", 8, 8e-3, 2.4e-3, 0.98, 1.0, 1e-25, 256, 2.0, 2.906),
        ("1.2B", 2, 4e-3, 1.2e-3, 0.98, 1.0, 1e-15, 256, 2.0, None),
        ("1.2B", 8, 4e-3, 1.2e-3, 0.98, 1.0, 1e-15, 256, 2.0, None),
    ),
    *_mars(
        ("130M", 1, 1.6e-2, (0.9, 0.95), 0.025, 2000, 128, 3.537),
        ("130M", 2, 8e-3, (0.95, 0.98), 0.025, 2000, 128, 3.396),
        ("130M", 4, 8e-3, (0.9, 0.98), 0.025, 2000, 128, 3.323),
        ("300M", 2, 8e-3, (0.98, 0.99), 0.05, 1000, 128, 3.158),
        ("300M", 4, 8e-3, (0.98, 0.99), 0.05, 1000, 128, 3.097),
        ("300M", 8, 8e-3, (0.98, 0.99), 0.05, 1000, 256, 3.040),
        ("520M", 2, 8e-3, (0.95, 0.98), 0.025, 2000, 256, 3.015),
        ("520M", 4, 8e-3, (0.95, 0.98), 0.025, 2000, 256, 2.955),
        ("520M", 8, 4e-3, (0.95, 0.98), 0.025, 2000, 256, 2.906),
    ),
    *_soap(
        ("130M", 1, 1.6e-2, 0.98, 1e-15, 1000, 128, 256, 1, 0.95, 3.483),
        ("130M", 2, 1.6e-2, 0.99, 1e-15, 500, 128, 256, 1, 0.98, 3.376),
        ("130M", 4, 8e-3, 0.99, 1e-15, 500, 128, 256, 1, 0.98, 3.295),
        ("300M", 2, 8e-3, 0.99, 1e-10, 1000, 128, 512, 10, 0.9, 3.147),
        ("300M", 4, 8e-3, 0.99, 1e-10, 1000, 256, 512, 10, 0.9, 3.084),
        ("300M", 8, 8e-3, 0.99, 1e-10, 1000, 256, 512, 10, 0.9, 3.030),
        ("520M", 2, 8e-3, 0.99, 1e-10, 1000, 256, 512, 10, 0.95, 3.004),
        ("520M", 4, 4e-3, 0.99, 1e-10, 1000, 256, 512, 10, 0.95, 2.944),
        ("520M", 8, 4e-3, 0.99, 1e-10, 1000, 256, 512, 10, 0.95, 2.899),
    ),
)  # fmt: skip
#: names that `optimizer=` takes
OPTIMIZERS: tuple[str, ...] = tuple(dict.fromkeys(row.optimizer for row in TABLE))
#: what the source says about moving a tuned value
_CARE = {
    "adamw": "Twice this LR diverges from 300M on, and half the warm-up does at 300M",
    "nadamw": "Half the warm-up diverges at 300M",
    "muon": "Without weight decay the loss is 0.06 to 0.07 higher, with twice the LR up to 0.02",
    "mars": "At 130M and 20 tokens per weight half the warm-up diverges",
    "soap": "With beta1=0.9 the loss at 130M and 20 tokens per weight is 4.5 in place of 3.5",
}


@dataclass(frozen=True)
class OptimizerAdvice:
    """
    What [`recommend_optimizer`] returns: the nearest tuned row, unchanged.

    Args:
        row (`TunedRow`): The settings, with the size and the tokens that they were tuned for.
        parameters, tokens (`int`): Of the run that was asked about.
        inside (`bool`): Whether the row's size and tokens are both within a factor of 1.5 of the run's.
        sentence (`str`): The same in words: source, row, how far it is, what not to do with it.
    """

    row: TunedRow
    parameters: int
    tokens: int
    inside: bool
    sentence: str

    @property
    def steps(self) -> int:
        """Updates of the run at the row's batch, at least 1."""
        return max(self.tokens // (self.row.batch_sequences * SEQUENCE_TOKENS), 1)

    @property
    def lr_schedule(self) -> dict[str, Any]:
        """`lr_scheduler_type` and `lr_scheduler_kwargs` of `TrainingArguments`; every schedule ends at 0."""
        fraction = self.row.extra.get("decay_fraction")
        if fraction is None:
            return {"lr_scheduler_type": "cosine"}
        if fraction == 1.0:
            return {"lr_scheduler_type": "linear"}
        decay = {"num_decay_steps": round(fraction * self.steps), "decay_type": "linear", "min_lr_ratio": 0.0}
        return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}

    def training_arguments(self) -> dict[str, Any]:
        """
        Return keyword arguments of `TrainingArguments`; the batch is left to you: `row.batch_sequences` sequences of
        4,096 tokens per update, for `max_steps` updates.

        With MARS, Muon and SOAP the optimizer itself is chosen elsewhere, from `row.betas`, `row.eps` and `row.extra`.
        """
        row = self.row
        found = {
            "learning_rate": row.learning_rate,
            "weight_decay": row.weight_decay,
            "warmup_steps": row.warmup_steps,
            "max_grad_norm": row.max_grad_norm,
            "max_steps": self.steps,
            **self.lr_schedule,
        }
        if row.optimizer in ("adamw", "nadamw"):
            found |= {"adam_beta1": row.betas[0], "adam_beta2": row.betas[1], "adam_epsilon": row.eps}
        return found


def recommend_optimizer(parameters: int, tokens: int, optimizer: str | None = None) -> OptimizerAdvice:
    """
    Return the tuned settings that are published for the size and the tokens nearest to a pre-training run.

    Nothing is interpolated or extrapolated: the row is returned as it was tuned, and where the run lies more than a
    factor of 1.5 away from it, in weights or in tokens, `inside` is `False` and the sentence says so.

    Source: Fantastic Pretraining Optimizers and Where to Find Them (arXiv 2509.02046): decoders of 130M to 1.2B
    weights, 20 to 320 tokens per weight, sequences of 4,096 tokens, every LR schedule down to 0. Its finding: over a
    tuned AdamW, Muon and SOAP need 1.4 times fewer tokens at 130M and 1.1 times fewer at 1.2B. It is about
    pre-training from scratch, and says nothing about fine-tuning.

    Args:
        parameters (`int`): Weights without embeddings and head, at least 1, as the source counts them.
        tokens (`int`): Tokens of the whole run, at least 1.
        optimizer (`str`, *optional*): `"adamw"`, `"nadamw"`, `"mars"`, `"muon"` or `"soap"`. By default the one with
            the lowest loss in the nearest size and ratio, Muon where the source gives no losses.

    Raises:
        ValueError: an argument out of range, or an optimizer that is not in the table.

    Example:
    ```python
    >>> advice = recommend_optimizer(parameters=300_000_000, tokens=6_000_000_000, optimizer="adamw")
    >>> advice.row.learning_rate, advice.row.betas, advice.row.batch_sequences, advice.inside
    (0.008, (0.9, 0.98), 128, True)
    >>> recommend_optimizer(7_000_000_000, 140_000_000_000, "adamw").inside
    False
    ```
    """
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    if optimizer is not None and optimizer not in OPTIMIZERS:
        more = ""
        if optimizer in ("prodigy", "dadapt", "dadaptation", "schedule_free"):
            more = (
                " Methods without a learning rate do poorly on AlgoPerf with their papers' defaults, and behind a "
                "calibrated NAdamW with calibrated ones: see calibrated_nadamw."
            )
        raise ValueError(f"optimizer={optimizer!r} is not in the table. Choose one of {', '.join(OPTIMIZERS)}.{more}")
    row = _nearest(parameters, tokens, [row for row in TABLE if optimizer in (None, row.optimizer)])
    factors = (_factor(parameters, row.parameters), _factor(tokens, row.tokens))
    inside = max(factors) <= REACH
    return OptimizerAdvice(row, parameters, tokens, inside, _sentence(row, parameters, tokens, inside))


def _factor(one: int, other: int) -> float:
    return max(one / other, other / one)


def _nearest(parameters: int, tokens: int, rows: Sequence[TunedRow]) -> TunedRow:
    """The nearest size first, then the nearest tokens there; of several optimizers the one with the lowest loss."""
    size = min(SIZES, key=lambda name: _factor(parameters, SIZES[name]) if _has(rows, name) else math.inf)
    here = [row for row in rows if row.size == size]
    ratio = min(here, key=lambda row: _factor(tokens, row.tokens)).ratio
    cell = [row for row in here if row.ratio == ratio]
    return min(cell, key=lambda row: (math.inf if row.loss is None else row.loss, row.optimizer != "muon"))


def _has(rows: Sequence[TunedRow], size: str) -> bool:
    return any(row.size == size for row in rows)


def _sentence(row: TunedRow, parameters: int, tokens: int, inside: bool) -> str:
    where = f"{row.size} weights and {row.tokens / 1e9:.3g} billion tokens, {row.ratio * CHINCHILLA} per weight"
    loss = f" (C4 loss {row.loss:.3f})" if row.loss is not None else ""
    text = f"{row.optimizer} as tuned for {where}{loss}: learning rate {row.learning_rate:g}. {_CARE[row.optimizer]}."
    if inside:
        return text
    return (
        f"Outside the table: {parameters / 1e6:.4g} million weights on {tokens / 1e9:.3g} billion tokens. These are "
        f"the nearest row's values, not scaled: tune the learning rate before you trust them. {text}"
    )
