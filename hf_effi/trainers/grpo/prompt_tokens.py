"""The tokens of prompts, learned beside the completions: a next-token term from the forward of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...errors import RefusedError
from ...functional import metrics
from ...functional.rollouts import prompt_token_loss
from .config import EXACT_SAVINGS
from .forward import Forward, Scores
from .host import Host

#: why no exact saving is, by name
NTP_REASONS = dict.fromkeys(EXACT_SAVINGS, "ntp_coef learns the tokens of all prompts, which a saving leaves out.")


def check_ntp(coef: float, args: Any, hybrid_gate: Any) -> float:
    """
    Return the weight of the term, or say why this run cannot have it, before a model is loaded.

    Args:
        coef (`float`): `ntp_coef` of the config, at least 0.
        args (`GRPOConfig`): Of the run.
        hybrid_gate: As the trainer was given it.

    Raises:
        RefusedError: what else changes the same forward, and the fix.
    """
    if not coef:
        return 0.0
    refused = {
        "hybrid_gate": (hybrid_gate is not None, "Drop one of the two"),
        f"loss_token_budget={getattr(args, 'loss_token_budget', None)}": (
            getattr(args, "loss_token_budget", None),
            "Set it to 0",
        ),
        f"sequence_parallel_size={getattr(args, 'sequence_parallel_size', 1)}": (
            getattr(args, "sequence_parallel_size", 1) > 1,
            "Set it to 1",
        ),
        f"temperature={args.temperature}, by which TRL's head divides the logits of prompts too": (
            args.temperature != 1.0,
            "Set it to 1.0",
        ),
    }
    for what, (is_so, fix) in refused.items():
        if is_so:
            raise RefusedError(f"ntp_coef={coef} does not work with {what}. {fix}, or leave ntp_coef at 0.")
    return float(coef)


class PromptTokens:
    """
    Adds `coef` times the mean negative log-likelihood of the tokens of prompts to the loss of a micro-batch.

    It asks TRL's forward for the log-probs of all tokens in place of those of the completions: one forward for both
    terms. Tokens of completions are the targets of RL and not in this term; neither is the first token of a prompt,
    which nothing stands before.

    Args:
        host ([`Host`]): The trainer.
        coef (`float`): Above 0.

    Raises:
        RefusedError: a model of images and text.
    """

    def __init__(self, host: Host, coef: float) -> None:
        if host._is_vlm:
            raise RefusedError(
                f"ntp_coef={coef} does not work with a model of images and text, whose prompts hold tokens that stand "
                "for images. Leave ntp_coef at 0."
            )
        self._host, self.coef = host, coef
        self._armed = False
        self._term: Tensor | None = None

    @classmethod
    def of(cls, host: Host, coef: float) -> PromptTokens | None:
        """Return the term of a trainer, or `None` where `coef` is 0."""
        return cls(host, coef) if coef else None

    def around(self, stock: Forward) -> Forward:
        """Return TRL's forward, which also makes the term while a loss is computed in training."""

        def forward(model: Any, ids: Tensor, mask: Tensor, columns: int, *args: Any, **kwargs: Any) -> Scores:
            if not self._armed:
                return stock(model, ids, mask, columns, *args, **kwargs)
            logps, entropies, aux_loss = stock(model, ids, mask, ids.size(1) - 1, *args, **kwargs)
            self._term = prompt_token_loss(logps, mask, columns)
            return logps[:, -columns:], None if entropies is None else entropies[:, -columns:], aux_loss

        return forward

    def added_to(self, stock: Callable[[Any, dict[str, Any]], Tensor]) -> Callable[[Any, dict[str, Any]], Tensor]:
        """Return TRL's `_compute_loss` with the term, in training."""

        def loss(model: Any, inputs: dict[str, Any]) -> Tensor:
            host = self._host
            if not host.model.training:
                return stock(model, inputs)
            self._armed = True
            try:
                policy, term = stock(model, inputs), self._term
            finally:
                self._armed, self._term = False, None
            if term is None:
                raise RefusedError(
                    "ntp_coef: the loss of this trainer asks for no log-probs by _get_per_token_logps_and_entropies. "
                    "Leave ntp_coef at 0."
                )
            mean = float(host.accelerator.gather(term.detach()).mean())
            host._metrics["train"][metrics.PROMPT_TOKEN_LOSS].append(mean)
            return policy + self.coef * term / host.current_gradient_accumulation_steps

        return loss
