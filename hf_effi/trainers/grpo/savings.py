"""Which exact savings a run may use: what its loss, its settings and the loaded model rule out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers.utils import logging

from ...callbacks.adaptive_lr import GradientSNRCallback
from ...errors import RefusedError
from ...functional.rollouts import GenerationLayout
from .config import EXACT_SAVINGS, refuse_unused
from .forward_probe import flat_reasons, measured_reasons, shortest_window
from .host import Host
from .packed import LAYOUTS, PackedForward, costs_of
from .settings import GRPOSettings

logger = logging.get_logger(__name__)


def choose_savings(
    host: Host, settings: GRPOSettings, more_reasons: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """
    Return the exact savings to use.

    Args:
        host ([`Host`]): The trainer, with its model loaded; every rank asks.
        settings ([`GRPOSettings`]): `exact_savings` names some, or leaves the choice.
        more_reasons (`Mapping[str, str]`, *optional*): Why a saving would change the gradient of what else is on, by
            name.

    Raises:
        RefusedError: a saving that is named would change the gradient, with the reason.
        ValueError: `forward_buckets` is set where `trim` is off.
    """
    wanted = settings.wanted_savings
    reasons = inexact_reasons(host) | dict(more_reasons or {})
    open_ones = tuple(name for name in (EXACT_SAVINGS if wanted is None else wanted) if name not in reasons)
    model, pad = host.accelerator.unwrap_model(host.model), host._tokenizer.pad_token_id
    reasons |= measured_reasons(model, open_ones, _longest_row(host), pad)
    if host.ref_model is not None:  # its forward is one of those that are saved
        reference = host.accelerator.unwrap_model(host.ref_model)
        flat = tuple(name for name in ("pack", "share") if name in open_ones and name not in reasons)
        reasons |= {
            name: f"of the reference model, {reason}" for name, reason in flat_reasons(reference, flat).items()
        }
    _refuse_named(settings, reasons)
    chosen = tuple(n for n in EXACT_SAVINGS if n not in reasons and (wanted is None or n in wanted))
    if wanted is None and reasons and host.accelerator.is_main_process:
        left_out = " ".join(f"{name}: {reason}" for name, reason in reasons.items())
        logger.info(f"exact_savings='auto' uses {', '.join(chosen) or 'nothing'}. Left out: {left_out}")
    if settings.forward_buckets and "trim" not in chosen:
        # The config knows which savings were asked for; `auto` may have left `trim` out for this model or loss.
        reason = f"acts only with 'trim': {reasons.get('trim', 'it is off.')} Drop it"
        refuse_unused(settings, ("forward_buckets",), reason)
    return chosen


def _refuse_named(settings: GRPOSettings, reasons: Mapping[str, str]) -> None:
    for name in settings.wanted_savings or ():
        if name in reasons:
            raise RefusedError(
                f"exact_savings={settings.exact_savings!r}: {name!r} is not exact here: {reasons[name]} Leave "
                f"{name!r} out, or use exact_savings='auto'."
            )


def still_exact(host: Host, settings: GRPOSettings, savings: tuple[str, ...]) -> tuple[str, ...]:
    """
    Return the savings that stay exact with the callbacks that the trainer has now.

    Args:
        savings (`tuple[str, ...]`): Those that were chosen when the trainer was built.

    Raises:
        RefusedError: a saving that is named would change what a callback measures.
    """
    reasons = inexact_reasons(host)
    _refuse_named(settings, reasons)
    return tuple(name for name in savings if name not in reasons)


def packed_forward(host: Host, savings: tuple[str, ...]) -> PackedForward | None:
    """Return what runs flat rows, where `pack` or `share` is on."""
    if not {"pack", "share"} & set(savings):
        return None
    models = [host.accelerator.unwrap_model(m) for m in (host.model, host.ref_model) if m is not None]
    windows = [window for window in map(shortest_window, models) if window is not None] if "share" in savings else []
    return PackedForward(
        tuple(layout for layout in LAYOUTS if layout in savings),
        costs_of(models[0], host.accelerator.device),
        min(windows, default=None),
        host.accelerator.autocast,
        say=host.accelerator.is_main_process,
    )


def inexact_reasons(host: Host) -> dict[str, str]:
    """Return why a saving would change the gradient of this loss, by name; exact ones are absent."""
    reasons: dict[str, str] = {}
    if host.aux_loss_enabled:
        text = "the router's load-balancing loss is computed from every forwarded token."
        return dict.fromkeys(EXACT_SAVINGS, text)
    if host._entropy_bonus_enabled:
        reasons["sort"] = "the entropy bonus is a mean over the tokens of each micro-batch."
        reasons["skip"] = "the entropy bonus (`entropy_coef`) has a gradient on every row."
    if host.top_entropy_quantile < 1.0:
        text = "`top_entropy_quantile` ranks the entropies of all rows of a micro-batch."
        reasons["sort"] = reasons["skip"] = text
    if host.beta != 0.0:
        reasons["skip"] = f"with beta={host.beta} a row with zero advantage still has a KL gradient. Set beta=0.0."
    if host.loss_type == "bnpo":
        reasons["sort"] = "loss_type='bnpo' divides by the tokens of each micro-batch, so rows cannot change places."
    elif GenerationLayout.of(host.args).micro_batches_per_update is None:
        reasons["sort"] = (
            f"steps_per_generation={host.args.steps_per_generation} and gradient_accumulation_steps="
            f"{host.args.gradient_accumulation_steps} are not multiples, so optimizer steps straddle generations."
        )
    if any(isinstance(one, GradientSNRCallback) for one in host.callback_handler.callbacks):
        text = "GradientSNRCallback compares halves of a batch, which must not differ in their lengths."
        reasons.setdefault("sort", text)
    if reason := _no_flat_rows(host):
        reasons["pack"] = reasons["share"] = reason
    return reasons


def _no_flat_rows(host: Host) -> str | None:
    """Return why rows cannot stand end to end in this run, whatever the model."""
    args = host.args
    if getattr(args, "torch_compile", False):
        return "torch_compile=True would compile anew for each length of a flat row."
    if getattr(args, "sequence_parallel_size", 1) > 1:
        return f"sequence_parallel_size={args.sequence_parallel_size} splits rows, not a flat row."
    if host.accelerator.device.type == "cuda" and not (args.bf16 or args.fp16):
        dtype = next((p.dtype for p in host.model.parameters() if p.is_floating_point()), torch.float32)
        if dtype not in (torch.bfloat16, torch.float16):
            return f"torch's variable-length attention takes bf16 and fp16 on a GPU, and the model is {dtype}."
    return None


def _longest_row(host: Host) -> int | None:
    """The most columns that a forward of this run can have, or `None` where prompts are as long as they come."""
    longest_prompt = getattr(host.args, "max_prompt_length", None)
    if longest_prompt is None or host.max_completion_length is None:
        return None
    return longest_prompt + host.max_completion_length
