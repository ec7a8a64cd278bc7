"""Which exact savings a run may use: what its loss, its settings and the loaded model rule out."""

from __future__ import annotations

from transformers.utils import logging

from ...errors import RefusedError
from ...functional.rollouts import GenerationLayout
from .config import EXACT_SAVINGS
from .forward_probe import measured_reasons
from .host import Host
from .settings import GRPOSettings

logger = logging.get_logger(__name__)


def choose_savings(host: Host, settings: GRPOSettings) -> tuple[tuple[str, ...], dict[str, str]]:
    """
    Return the exact savings to use, and why others are left out, by name.

    Args:
        host ([`Host`]): The trainer, with its model loaded; every rank asks.
        settings ([`GRPOSettings`]): `exact_savings` names some, or leaves the choice.

    Raises:
        RefusedError: a saving that is named would change the gradient, with the reason.
    """
    wanted = settings.wanted_savings
    reasons = inexact_reasons(host)
    open_ones = tuple(name for name in (EXACT_SAVINGS if wanted is None else wanted) if name not in reasons)
    model, pad = host.accelerator.unwrap_model(host.model), host._tokenizer.pad_token_id
    reasons |= measured_reasons(model, open_ones, _longest_row(host), pad)
    for name in wanted or ():
        if name in reasons:
            raise RefusedError(
                f"exact_savings={settings.exact_savings!r}: {name!r} is not exact here: {reasons[name]} Leave "
                f"{name!r} out, or use exact_savings='auto'."
            )
    chosen = tuple(n for n in EXACT_SAVINGS if n not in reasons and (wanted is None or n in wanted))
    if wanted is None and reasons and host.accelerator.is_main_process:
        left_out = " ".join(f"{name}: {reason}" for name, reason in reasons.items())
        logger.info(f"exact_savings='auto' uses {', '.join(chosen) or 'nothing'}. Left out: {left_out}")
    return chosen, reasons


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
    return reasons


def _longest_row(host: Host) -> int | None:
    """The most columns that a forward of this run can have, or `None` where prompts are as long as they come."""
    longest_prompt = getattr(host.args, "max_prompt_length", None)
    if longest_prompt is None or host.max_completion_length is None:
        return None
    return longest_prompt + host.max_completion_length
