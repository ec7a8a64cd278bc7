"""The importance ratio of vLLM, formed after it is known which rows stay."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...functional.rollouts import loss_mask
from .host import Host

#: the entries of a batch that it is formed from, and that it is
OLD, SAMPLING, RATIO = "old_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio"


class LateCorrection:
    """
    Stands in for TRL's correction of what vLLM sampled under other log-probs, where these are put off.

    TRL forms the ratio `pi / pi_vllm` while it generates, from log-probs of all rows. Here its correction is off for
    that call, and the ratio is formed from the log-probs of the rows that stayed.

    Args:
        host ([`Host`]): The trainer.
    """

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def on(self) -> bool:
        """Whether the run corrects at all."""
        return bool(self._host.use_vllm and self._host.vllm_importance_sampling_correction)

    @property
    def decides(self) -> bool:
        """Whether a ratio takes rows or tokens out of the loss, so that who chooses rows has to know it."""
        return self.on and self._host.vllm_importance_sampling_mode.endswith("mask")

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Switch TRL's own correction off for one generation."""
        host: Any = self._host
        before = host.vllm_importance_sampling_correction
        host.vllm_importance_sampling_correction = False
        try:
            yield
        finally:
            host.vllm_importance_sampling_correction = before

    def make(self, batch: dict[str, Any], forwarded: Tensor, log: dict[str, list[float]]) -> None:
        """
        Put the ratio into a batch, and log what TRL logs of it, over the rows that were forwarded.

        A row that was not forwarded has no log-probs: its ratio is that of equal ones.

        Args:
            batch (`dict`): With both log-probs, shape `(rows, columns)`.
            forwarded (`torch.Tensor`): Boolean, shape `(rows,)`.
            log (`dict[str, list[float]]`): TRL's metrics of the mode.
        """
        host = self._host
        difference = (batch[OLD] - batch[SAMPLING]).masked_fill(~forwarded[:, None], 0.0)
        batch[RATIO] = importance_ratio(
            difference,
            loss_mask(batch),
            host.vllm_importance_sampling_mode,
            host.vllm_importance_sampling_clip_min,
            host.vllm_importance_sampling_clip_max,
        )
        self._log(batch[RATIO], difference, loss_mask(batch).bool() & forwarded[:, None], forwarded, log)

    def _log(
        self, ratio: Tensor, difference: Tensor, mask: Tensor, forwarded: Tensor, log: dict[str, list[float]]
    ) -> None:
        per_row = self._host.vllm_importance_sampling_mode.startswith("sequence")
        gaps = difference.abs()[mask & ~difference.isnan()]
        ratios = ratio[forwarded].flatten() if per_row else ratio[mask]
        found = torch.stack(
            [_or_zero(values, take) for values in (gaps, ratios) for take in (torch.min, torch.mean, torch.max)]
        )
        ranks = self._host.accelerator.gather(found).view(-1, len(found)).nan_to_num()
        log["sampling/sampling_logp_difference/mean"].append(ranks[:, 1].mean().item())
        log["sampling/sampling_logp_difference/max"].append(ranks[:, 2].max().item())
        log["sampling/importance_sampling_ratio/min"].append(ranks[:, 3].min().item())
        log["sampling/importance_sampling_ratio/mean"].append(ranks[:, 4].mean().item())
        log["sampling/importance_sampling_ratio/max"].append(ranks[:, 5].max().item())


def _or_zero(values: Tensor, take: Any) -> Tensor:
    return take(values.float()) if values.numel() else torch.zeros((), device=values.device)


def importance_ratio(difference: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None) -> Tensor:
    """
    Return the ratio of the policy to what vLLM sampled from, as TRL 1.16 forms it.

    Formula: `r_t = exp(d_t)` for modes that begin with `token`, and `exp(sum_t d_t)` in one column for `sequence`,
    with `d = difference * mask`. `..._truncate` clips it to `[low, high]`; `..._mask` makes it 0 outside.

    Args:
        difference (`torch.Tensor`): `log pi - log pi_vllm`, shape `(rows, columns)`; NaN counts as 0.
        mask (`torch.Tensor`): Tokens in the loss, same shape.
        mode (`str`): `token_truncate`, `token_mask`, `sequence_truncate` or `sequence_mask`.
        low, high (`float`, *optional*): Bounds, none by default.

    Returns:
        `torch.Tensor`: `(rows, columns)`, or `(rows, 1)`.

    Example:
    ```python
    >>> d = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> importance_ratio(d, torch.ones(2, 2), "token_truncate", None, 2.0).tolist()[0]
    [1.0, 2.0]
    >>> importance_ratio(d, torch.ones(2, 2), "sequence_mask", None, 2.0)[0].item()
    0.0
    ```
    """
    difference = torch.nan_to_num(difference * mask, nan=0.0)
    level, _, action = mode.partition("_")
    if level not in ("token", "sequence") or action not in ("truncate", "mask"):
        raise ValueError(
            f"vllm_importance_sampling_mode={mode!r}: allowed are 'token_truncate', 'token_mask', 'sequence_truncate' "
            "and 'sequence_mask'."
        )
    ratio = torch.exp(difference.sum(-1, keepdim=True) if level == "sequence" else difference)
    if action == "truncate":
        return ratio if low is None and high is None else torch.clamp(ratio, min=low, max=high)
    outside = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio.masked_fill(outside, 0.0)
