"""Log-prob and `sum_v pi_v^2` of every completion token, from one forward of the policy without a gradient.

TRL's head can report `log sum_v pi_v^2`, tile by tile, but the trainer builds it without. For the time of one call a
second head of TRL's own stands over the first one and reports that in the place of the entropy: so the forward is the
trainer's, with its temperature, trimming, packing and equal number of calls on every rank.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from ...errors import RefusedError
from ...functional.rollouts import loss_mask
from .correction import SAMPLING, LateCorrection, importance_ratio
from .host import Host
from .rows import ROW_KEYS, Rows, whole_rows


class Scoring(Protocol):
    """The part of the log-prob forward that is known here."""

    exact_savings: tuple[str, ...]


def token_stats_of(host: Host, forward: Scoring, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """
    Forward all rows of this rank once and return what the policy says of their tokens. Every rank must call it.

    Args:
        host ([`Host`]): The trainer.
        forward ([`Scoring`]): Its log-prob forward.
        rows ([`Rows`]): Those of this rank.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Log-probs under the trainer's temperature, equal to those
        that the loss sees; `sum_v pi_v^2` in (0, 1]; and the boolean mask of tokens in the loss. Each of shape
        `(rows, tokens)`, the first two 0 outside of the mask.

    Raises:
        RefusedError: image and multimodal inputs; sequence parallelism; `torch_compile`.
    """
    batch = rows.batch
    if extra := sorted(key for key in batch if key not in ROW_KEYS and isinstance(batch[key], (list, Tensor))):
        raise RefusedError(
            f"statistics of tokens cannot be had for {', '.join(extra)} yet (image and multimodal inputs). Use an "
            "advantage transform without `needs_token_stats`, such as OPO."
        )
    if (size := getattr(host.args, "sequence_parallel_size", 1)) > 1:
        raise RefusedError(
            f"statistics of tokens do not work with sequence_parallel_size={size}, which cuts the rows. Use an "
            "advantage transform without `needs_token_stats`, such as OPO, or sequence_parallel_size=1."
        )
    if getattr(host.args, "torch_compile", False):
        raise RefusedError(
            "statistics of tokens do not work with torch_compile=True, which keeps the head that it has compiled. Use "
            "an advantage transform without `needs_token_stats`, such as OPO, or torch_compile=False."
        )
    policy: Any = host.model
    ids, mask = whole_rows(batch)
    in_loss: Tensor = loss_mask(batch) != 0
    checkpointing = disable_gradient_checkpointing(policy, host.args.gradient_checkpointing_kwargs)
    unwrapped: Any = host.accelerator.unwrap_model(policy)
    # Adapters pass the call on to the model below, which is the one that has the head.
    scored = unwrapped.get_base_model() if hasattr(unwrapped, "peft_config") else unwrapped
    in_fp32 = bool(getattr(host.args, "cast_lm_head_to_fp32", False))
    with torch.no_grad(), checkpointing, reporting_squares(scored, host.temperature, in_fp32):
        logps, log_squares, _ = host._get_per_token_logps_and_entropies(
            policy,
            ids,
            mask,
            in_loss.size(1),
            batch_size=host.args.per_device_train_batch_size,
            compute_entropy=True,
        )
    zero = torch.zeros((), dtype=logps.dtype, device=logps.device)
    squares = cast(Tensor, log_squares).exp().clamp(max=1.0)
    return torch.where(in_loss, logps, zero), torch.where(in_loss, squares, zero), in_loss


@contextlib.contextmanager
def reporting_squares(model: Any, temperature: float, cast_to_fp32: bool) -> Iterator[None]:
    """
    Let TRL's head of a model report `log sum_v pi_v^2` where it would report the entropy, until this block ends.

    Args:
        model (`nn.Module`): The model that has the head, without wrappers and adapters.
        temperature (`float`): What the logits are divided by.
        cast_to_fp32 (`bool`): Whether the head runs in float32.
    """
    own = vars(model).get("forward")
    add_fused_lm_head(
        model, temperature=temperature, cast_lm_head_to_fp32=cast_to_fp32, outputs=("log_probs", "log_sum_sq_probs")
    )
    head: Any = model.forward

    def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs = head(*args, **kwargs)
        if kwargs.get("fused_lm_head"):
            outputs.entropy = outputs.log_sum_sq_probs
        return outputs

    model.forward = types.MethodType(forward, model)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def loss_ratios(host: Host, rows: Rows, stats: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """
    Return what TRL multiplies the loss of a token by under vLLM, shape `(rows, tokens)`; nothing where it does not.

    Args:
        host ([`Host`]): The trainer.
        rows ([`Rows`]): Those of this rank.
        stats (`tuple`): What [`token_stats_of`] returned for them.
    """
    logps, _, mask = stats
    sampled = rows.batch.get(SAMPLING)
    if not LateCorrection(host).on or sampled is None:
        return ()
    ratios = importance_ratio(
        logps - sampled.to(logps),
        mask,
        host.vllm_importance_sampling_mode,
        host.vllm_importance_sampling_clip_min,
        host.vllm_importance_sampling_clip_max,
    )
    return (ratios.expand_as(logps),)
