"""The token level of D3S: which tokens of a micro-batch have a loss, chosen by `|advantage| * entropy`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import RefusedError
from ...functional import metrics
from ...functional.rollouts import policy_mask, score_threshold, token_weights
from .host import Host
from .rows import Ratios
from .settings import GRPOSettings


class TokenSelection:
    """
    Stands in for TRL's mask of high-entropy tokens while the loss of a micro-batch is computed.

    TRL multiplies the policy term of each token by that mask. Here it holds the weights of
    [`~hf_effi.functional.rollouts.token_weights`], which are 0 for a token that is not kept and make the loss an
    average over those that are. With `prune_normalizer="original"` they are 0 and 1, so that a dropped token counts as
    one without any loss. The KL term is neither masked nor weighted, as in TRL.

    Args:
        host ([`Host`]): The trainer whose loss it is.
        pruner: With `token_share(progress)`, such as [`~hf_effi.selection.D3S`].
        over_kept (`bool`): Whether the loss is averaged over the kept tokens.
    """

    def __init__(self, host: Host, pruner: Any, over_kept: bool) -> None:
        self._host, self._pruner, self._over_kept = host, pruner, over_kept
        #: of the micro-batch in hand
        self._share = 1.0
        self._inputs: dict[str, Any] = {}

    @classmethod
    def of(cls, host: Host, pruner: Any, settings: GRPOSettings) -> TokenSelection | None:
        """Return what chooses the tokens of a trainer, `None` where its pruner does not."""
        return cls(host, pruner, settings.prune_normalizer == "kept") if chooses_tokens(pruner) else None

    @contextlib.contextmanager
    def choosing(self, inputs: dict[str, Any]) -> Iterator[None]:
        """
        Let TRL ask for the mask of a micro-batch within this block. Where every token has a loss it does not ask.

        Args:
            inputs (`dict`): The micro-batch.
        """
        host, state = self._host, self._host.state
        share = self._pruner.token_share(min(1.0, state.global_step / max(1, state.max_steps)))
        if not host.model.training or share >= 1.0:
            yield
            return
        stock = host.top_entropy_quantile
        host.top_entropy_quantile, self._share, self._inputs = share, share, inputs
        try:
            yield
        finally:
            host.top_entropy_quantile, self._share, self._inputs = stock, 1.0, {}

    def weights(self, entropies: Tensor, mask: Tensor) -> Tensor:
        """
        Return what the policy term of each token is multiplied by, shape `(rows, tokens)`.

        Args:
            entropies (`torch.Tensor`): Of the policy at each token, shape `(rows, tokens)`.
            mask (`torch.Tensor`): Tokens in the loss, same shape.
        """
        advantages = self._inputs["advantages"].abs()
        advantages = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages
        # A token whose ratio is 0 has no policy term; its row may not even have been forwarded.
        acts = policy_mask(self._inputs, Ratios.of(self._host).multiply)
        scores = (advantages * entropies.detach()).float().masked_fill(~acts, 0.0)
        inside = mask.bool()
        everybodys = self._gathered(scores[inside])
        threshold = score_threshold(everybodys, self._share)
        kept = (scores >= threshold) & inside
        share = float((everybodys >= threshold).float().mean()) if len(everybodys) else 1.0
        self._host._metrics["train"][metrics.TOKEN_SHARE].append(share)
        return token_weights(kept, mask, self._host.loss_type, share) if self._over_kept else kept.float()

    def _gathered(self, scores: Tensor) -> Tensor:
        """Return the scores of all ranks, shape `(tokens,)`: two collectives on each of them."""
        accelerator, nothing = self._host.accelerator, -1.0  # scores are not negative
        if accelerator.num_processes == 1:
            return scores
        longest = accelerator.pad_across_processes(scores, dim=0, pad_index=nothing)
        everybodys = cast(Tensor, accelerator.gather(longest))
        return everybodys[everybodys != nothing]


def chooses_tokens(pruner: Any) -> bool:
    """Return whether a pruner has a token level that is on at any time of the run."""
    return callable(getattr(pruner, "token_share", None)) and bool(getattr(pruner, "chooses_tokens", True))


def check_token_selection(pruner: Any, args: Any, settings: GRPOSettings) -> None:
    """
    Refuse a token level where something else chooses tokens, or needs to see all of them, before a model is loaded.

    Args:
        pruner: That of the trainer, or `None`.
        args ([`~trl.GRPOConfig`]): Of the trainer.
        settings ([`GRPOSettings`]): Its own fields.

    Raises:
        RefusedError: what does not go together, and the fix.
        ValueError: the normaliser of `loss_type` is not known.
    """
    if not chooses_tokens(pruner):
        return
    found = {
        f"top_entropy_quantile={args.top_entropy_quantile}, which chooses tokens too": (
            args.top_entropy_quantile < 1.0,
            "Set it to 1.0",
        ),
        f"loss_token_budget={settings.loss_token_budget}: tokens of all rows of a micro-batch compete, and it "
        "forwards them in pieces": (bool(settings.loss_token_budget), "Set it to 0"),
        "an entropy bonus, whose mean is over the tokens that are kept": (
            args.entropy_coef != 0 or args.use_adaptive_entropy,
            "Set entropy_coef=0.0 and use_adaptive_entropy=False",
        ),
        f"sequence_parallel_size={getattr(args, 'sequence_parallel_size', 1)}, whose ranks share rows": (
            getattr(args, "sequence_parallel_size", 1) > 1,
            "Set it to 1",
        ),
    }
    for what, (is_so, fix) in found.items():
        if is_so:
            raise RefusedError(
                f"the token level of {type(pruner).__name__} does not work with {what}. {fix}, or leave the token "
                "level off, with D3S(tokens=1.0)."
            )
    nothing = torch.zeros(1, 1)
    token_weights(nothing.bool(), nothing, args.loss_type, 1.0)


#: why a saving would change which tokens are kept
REASONS = {"sort": "D3S ranks the tokens of all rows of a micro-batch, so that rows cannot change places."}
