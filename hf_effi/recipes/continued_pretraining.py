"""
Continual pre-training without the stability gap: several epochs on the best part, mixed like the pre-training data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..callbacks.lr_schedule import LRScheduleCallback
from ..functional.data import check_count, check_number, keep_top
from ..functional.schedules import Schedule, cosine
from ..samplers import MixtureSampler

_KEPT, _LEFT_OUT = "hf_effi: kept", "hf_effi: left out"


def stability_gap(
    scores: Tensor | Sequence[float],
    sources: Sequence[Hashable],
    new: Hashable,
    *,
    block: int,
    keep: float = 0.1,
    epochs: int = 4,
    new_share: float = 0.82,
    old_weights: Mapping[Hashable, float] | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Return the keyword arguments of a continual pre-training that goes `epochs` times over the best part of a new
    domain.

    Of the rows of the source `new`, the `keep` with the highest scores are trained on, `epochs` times, at a share of
    `new_share` of every block. The rest of each block comes from the old sources, which are not restarted: later
    epochs get old rows that were not seen yet, as long as there are some. The run has `epochs * kept / new_share`
    samples; set `num_train_epochs=1`. The trainer needs [`SamplerMixin`], which `EffiTrainer` and `EffiSFTTrainer`
    have. Paper: Efficient Continual Pre-training by Mitigating the Stability Gap (2406.14833).

    Args:
        scores (`torch.Tensor` or `Sequence[float]`): Quality of each row, high is good; of a perplexity pass the
            negative. Only the rows of `new` are looked at.
        sources (`Sequence[Hashable]`): Source of each row of the training dataset.
        new (`Hashable`): The source that is new.
        block (`int`): Samples over which the shares are exact, such as the global batch size.
        keep (`float`, *optional*, defaults to 0.1): Share of the new rows, in (0, 1]. Paper: 5B of 50B tokens.
        epochs (`int`, *optional*, defaults to 4): Passes over the kept rows. Paper: 4.
        new_share (`float`, *optional*, defaults to 0.82): In (0, 1). Paper: what web text was of the pre-training
            data.
        old_weights (`Mapping`, *optional*): Weight of each old source; its number of rows if `None`.
        schedule (`Schedule`, *optional*): `None` re-warms over 1 % and decays as a cosine to a tenth, which is from
            another study (2403.08763): this paper's schedule is not known to us.
        seed (`int`, *optional*, defaults to 0): Seed of all shuffles.

    Returns:
        `dict`: `{"train_sampler": ..., "callbacks": [...]}`.

    Raises:
        ValueError: no new or no old row, an unknown source, NaN scores of new rows, or an argument out of range.

    Example:
    ```python
    preset = stability_gap(scores, rows["source"], new="medical", block=512)
    EffiTrainer(model, args, train_dataset=rows, **preset).train()
    ```
    """
    check_number("keep", keep, 0, 1, open_low=True)
    check_count("epochs", epochs)
    check_number("new_share", new_share, 0, 1, open_low=True, open_high=True)
    labels = _labels(scores, list(sources), new, keep)
    old = Counter(label for label in labels if label not in (_KEPT, _LEFT_OUT))
    weights = dict(old) if old_weights is None else dict(old_weights)
    if not old or not set(weights) <= set(old) or sum(weights.values()) <= 0:
        raise ValueError(f"old_weights={weights!r} must weigh old sources; the dataset has {sorted(map(str, old))}.")
    total = sum(weights.values())
    shares = {name: (1 - new_share) * weight / total for name, weight in weights.items()}
    sampler = MixtureSampler(
        labels,
        [(0.0, {_KEPT: new_share, **shares})],
        block=block,
        num_samples=round(epochs * labels.count(_KEPT) / new_share),
        seed=seed,
    )
    schedule = cosine(warmup_fraction=0.01, floor=0.1, warmup_start=0.0) if schedule is None else schedule
    return {"train_sampler": sampler, "callbacks": [LRScheduleCallback(schedule)]}


def _labels(scores: Tensor | Sequence[float], sources: list[Hashable], new: Hashable, keep: float) -> list[Hashable]:
    """Return the sources with the new rows split into those that are trained on and those that are not."""
    if len(scores) != len(sources):
        raise ValueError(f"There are {len(scores)} scores and {len(sources)} sources. Give one of each per row.")
    rows = [row for row, source in enumerate(sources) if source == new]
    if not rows:
        raise ValueError(f"new={new!r} is no source of the dataset: {sorted(set(map(str, sources)))}.")
    best = keep_top(torch.as_tensor(scores)[rows], max(1, round(keep * len(rows))))
    labels = list(sources)
    for row, kept in zip(rows, best.tolist(), strict=True):
        labels[row] = _KEPT if kept else _LEFT_OUT
    return labels
