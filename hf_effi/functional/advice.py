"""Findings of papers as numbers for a run: repeated data, one epoch, SFT before DPO, large batches, no tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

#: what to try where data repeat: 4 to 32 times the usual 0.1
WEIGHT_DECAY_GRID = (0.4, 0.8, 1.6, 3.2)
#: times that a run goes over its data before they count as repeated
MOST_PASSES = 4.0
#: learning rates of SFT, as a share of the usual one, that are worth comparing after DPO
SFT_FACTORS = (0.5, 0.25, 0.1)
#: tokens per weight: compute-optimal (Hoffmann and others, 2022), and what One Epoch Is All You Need found
TOKENS_PER_PARAMETER, TOKENS_PER_PARAMETER_2019 = 20.0, 5.0
#: tokens per update of the large-batch runs: 3,584 on each of 8 GPUs, 16 times
LARGE_BATCH_TOKENS = 3584 * 8 * 16


def check_positive(name: str, value: Any, most: float = math.inf) -> float:
    """
    Return a number above 0.

    Raises:
        ValueError: it is none, or above `most`.
    """
    wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
    if wrong or value > most:
        allowed = "a number above 0" if most == math.inf else f"a number above 0 and up to {most:g}"
        raise ValueError(f"{name}={value!r} must be {allowed}.")
    return float(value)


def weight_decay_grid(tokens: float, unique_tokens: float) -> tuple[float, ...]:
    """
    Return the weight decays to compare where a run goes over its data more than four times; nothing where it does not.

    Pre-training under infinite compute (Kim and others, 2025) tunes weight decay, epochs and LR together on a fixed
    200 million tokens: the best weight decay is 30 times the usual 0.1, and only then does a larger model help.

    Args:
        tokens (`float`): That the run trains on, repetitions counted: tokens of one pass times passes. Above 0.
        unique_tokens (`float`): Different ones among them. Above 0, at most `tokens`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> weight_decay_grid(tokens=16e9, unique_tokens=1e9)
    (0.4, 0.8, 1.6, 3.2)
    >>> weight_decay_grid(tokens=4e9, unique_tokens=1e9)
    ()
    ```
    """
    seen = check_positive("tokens", tokens)
    unique = check_positive("unique_tokens", unique_tokens)
    if unique > seen:
        raise ValueError(f"unique_tokens={unique_tokens!r} is more than tokens={tokens!r}, repetitions counted.")
    return WEIGHT_DECAY_GRID if seen / unique > MOST_PASSES else ()


@dataclass(frozen=True)
class OneEpochSize:
    """
    A model and a data set that fit each other in one pass.

    Args:
        parameters, tokens (`int`): Weights without embeddings, and tokens of the data set.
        tokens_per_parameter (`float`): Their ratio.
    """

    parameters: int
    tokens: int
    tokens_per_parameter: float

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} weights for {self.tokens:,} tokens, each seen once "
            f"({self.tokens_per_parameter:g} tokens per weight)"
        )


def size_one_epoch(
    parameters: float | None = None,
    tokens: float | None = None,
    *,
    tokens_per_parameter: float = TOKENS_PER_PARAMETER,
) -> OneEpochSize:
    """
    Return the model for a data set, or the data set for a model, that a single pass uses well: `D = r N`.

    One Epoch Is All You Need (Komatsuzaki, 2019): one pass over more data beats many passes over less, needs no
    regularisation, and model size and updates are to be chosen together. It found `r` near 5; compute-optimal
    training was later found near 20 (Hoffmann and others, 2022), which is the default.

    Args:
        parameters (`float`, *optional*): Weights without embeddings, at least 1.
        tokens (`float`, *optional*): Of the data set, at least 1. Exactly one of the two is given.
        tokens_per_parameter (`float`, *optional*, defaults to 20.0): `r`, above 0.

    Raises:
        ValueError: both or neither are given, or one is out of range.

    Example:
    ```python
    >>> print(size_one_epoch(tokens=2e9))
    100,000,000 weights for 2,000,000,000 tokens, each seen once (20 tokens per weight)
    >>> size_one_epoch(parameters=125e6).tokens
    2500000000
    ```
    """
    ratio = check_positive("tokens_per_parameter", tokens_per_parameter)
    if (parameters is None) == (tokens is None):
        raise ValueError("Pass exactly one of parameters= and tokens=; the other is what is looked for.")
    name, given = ("tokens", tokens) if parameters is None else ("parameters", parameters)
    known = check_positive(name, given)
    if known < 1:
        raise ValueError(f"{name}={given!r} must be at least 1.")
    if parameters is None:
        return OneEpochSize(max(round(known / ratio), 1), round(known), ratio)
    return OneEpochSize(round(known), max(round(known * ratio), 1), ratio)


def sft_learning_rate(learning_rate: float, next_stage: str | None = None, *, factor: float | None = None) -> float:
    """
    Return the learning rate of SFT: the usual one, or a share of it where DPO follows.

    Implicit Reward as the Bridge (Wang and others, 2025): the KL term of SFT does not depend on the policy, so nothing
    holds it near its start, and a smaller learning rate makes up for that; up to 6 points of win rate after DPO, by
    the paper. Which share is best is to be judged after DPO, not by the loss of SFT: compare 1/2, 1/4 and 1/10.

    Args:
        learning_rate (`float`): The one you would use for SFT alone, above 0.
        next_stage (`str`, *optional*): `"dpo"`, or `None` where SFT is the last stage; then nothing changes.
        factor (`float`, *optional*): Share of the learning rate, above 0 and up to 1; 1/4 by default. Only with
            `next_stage="dpo"`.

    Raises:
        ValueError: a number out of range, another stage, or a factor that would not act.

    Example:
    ```python
    >>> sft_learning_rate(2e-5), sft_learning_rate(2e-5, "dpo")
    (2e-05, 5e-06)
    ```
    """
    rate = check_positive("learning_rate", learning_rate)
    if next_stage is None:
        if factor is not None:
            raise ValueError(f"factor={factor!r} acts only with next_stage='dpo', which is not given. Add it.")
        return rate
    if next_stage != "dpo":
        raise ValueError(f"next_stage={next_stage!r} must be 'dpo', or None where SFT is the last stage.")
    return rate * (0.25 if factor is None else check_positive("factor", factor, most=1.0))


def large_batch_seq2seq(
    rows_per_device: int,
    tokens_per_row: float,
    devices: int = 1,
    *,
    tokens_per_update: int = LARGE_BATCH_TOKENS,
    precision: str = "fp16",
) -> dict[str, Any]:
    """
    Return keyword arguments of `Seq2SeqTrainingArguments` for translation with large batches in half precision.

    Scaling Neural Machine Translation (Ott and others, 2018): gradients of 16 batches are added up before each update
    of a large Transformer, in half precision, with the learning rate doubled to 1e-3; 5 times faster on 8 GPUs, by the
    paper. Values of the paper's configuration in fairseq: Adam (0.9, 0.98), inverse square root after 4,000 updates of
    warm-up, label smoothing 0.1, no weight decay, no clipping.

    Args:
        rows_per_device (`int`): `per_device_train_batch_size`, at least 1.
        tokens_per_row (`float`): Mean number of target tokens per row without padding, above 0.
        devices (`int`, *optional*, defaults to 1): Data-parallel processes, at least 1.
        tokens_per_update (`int`, *optional*, defaults to 458,752): Target tokens per update, from half to twice the
            default. The learning rate belongs to that size and is not scaled.
        precision (`str`, *optional*, defaults to `"fp16"`): As in the paper; `"bf16"`, or `"no"` for full precision.

    Raises:
        ValueError: an argument out of range, or one forward pass that is larger than the update.

    Example:
    ```python
    >>> preset = large_batch_seq2seq(rows_per_device=128, tokens_per_row=28, devices=8)
    >>> preset["gradient_accumulation_steps"], preset["learning_rate"], preset["lr_scheduler_type"]
    (16, 0.001, 'inverse_sqrt')
    ```
    """
    for name, value in (("rows_per_device", rows_per_device), ("devices", devices)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    if not LARGE_BATCH_TOKENS / 2 <= check_positive("tokens_per_update", tokens_per_update) <= LARGE_BATCH_TOKENS * 2:
        raise ValueError(
            f"tokens_per_update={tokens_per_update!r} must be from {LARGE_BATCH_TOKENS // 2:,} to "
            f"{LARGE_BATCH_TOKENS * 2:,}: the learning rate 1e-3 was found for {LARGE_BATCH_TOKENS:,}. With "
            f"batches of {LARGE_BATCH_TOKENS // 16:,} the paper uses 5e-4."
        )
    if precision not in ("fp16", "bf16", "no"):
        raise ValueError(f"precision={precision!r} must be 'fp16', 'bf16' or 'no'.")
    forward = rows_per_device * check_positive("tokens_per_row", tokens_per_row) * devices
    if forward > tokens_per_update:
        raise ValueError(
            f"One forward pass has {forward:,.0f} tokens on {devices} devices, more than tokens_per_update="
            f"{tokens_per_update:,}. Lower rows_per_device."
        )
    return {
        "per_device_train_batch_size": rows_per_device,
        "gradient_accumulation_steps": max(round(tokens_per_update / forward), 1),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 4000,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "label_smoothing_factor": 0.1,
        "fp16": precision == "fp16",
        "bf16": precision == "bf16",
    }


def calibrated_nadamw(total_steps: int) -> dict[str, Any]:
    """
    Return the NAdamW settings that AlgoPerf calibrated over all its workloads, for runs without any tuning.

    How far away are truly hyperparameter-free learning algorithms? (Kasimbeg and others, 2025): methods without a
    learning rate did poorly with their papers' defaults; with one calibrated configuration they came close to a NAdamW
    that was calibrated alike, and stayed behind it. So this is what to compare Prodigy and its like with, and no
    promise that it suits a language model: for pre-training, [`recommend_optimizer`] has values tuned for it.

    The values are those of the benchmark's own self-tuning NAdamW (mlcommons/algorithmic-efficiency): warm-up over 2 %
    of the run, then cosine to 0; dropout 0.1 belongs to them where the model has any.

    Args:
        total_steps (`int`): Updates of the run, at least 1.

    Returns:
        `dict`: `learning_rate`, `adam_beta1`, `adam_beta2`, `adam_epsilon`, `weight_decay`, `warmup_steps`,
        `lr_scheduler_type` and `max_steps` of `TrainingArguments`. Which optimizer reads them is chosen beside it:
        the Trainer's own AdamW does not look ahead as NAdamW does.

    Raises:
        ValueError: `total_steps` is no whole number of at least 1.

    Example:
    ```python
    >>> preset = calibrated_nadamw(10_000)
    >>> round(preset["learning_rate"], 6), round(preset["adam_beta1"], 4), preset["warmup_steps"]
    (0.001749, 0.9327, 200)
    ```
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps={total_steps!r} must be a whole number of at least 1.")
    return {
        "learning_rate": 0.0017486387539278373,
        "adam_beta1": 1 - 0.06733926164,
        "adam_beta2": 0.9955159689799007,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.08121616522670176,
        "warmup_steps": round(0.02 * total_steps),
        "lr_scheduler_type": "cosine",
        "max_steps": total_steps,
    }
