"""Which tokens are trained on: those of the kept completions in D3S, and those of prompts beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Losses that divide by the tokens of each row.
_BY_ROW = ("grpo", "sapo")
#: Losses that divide by the tokens of the micro-batch of this rank.
_BY_MICRO_BATCH = ("bnpo",)
#: Losses that divide by the tokens of the generation.
_BY_GENERATION = ("dapo", "cispo", "vespo")
#: Losses that divide by nothing that a token changes.
_BY_NO_TOKENS = ("dr_grpo", "luspo")

_TOLERANCE = 1e-9


def score_threshold(scores: Tensor, share: float) -> Tensor:
    """
    The score that the best `ceil(share * tokens)` tokens reach.

    D3S keeps the tokens with the largest `|A_it| * H_it` (advantage and entropy). Tokens that tie with the last one
    are kept too, on every rank alike.

    Paper: [Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy
    Optimization](https://huggingface.co/papers/2509.22115), token level.

    Args:
        scores (`torch.Tensor`): Of every token that competes, shape `(tokens,)`.
        share (`float`): In (0, 1].

    Returns:
        `torch.Tensor`: One number; infinite where there is no token.

    Example:
    ```python
    >>> score_threshold(torch.tensor([0.1, 0.4, 0.3, 0.2]), 0.5).item() == torch.tensor(0.3).item()
    True
    ```
    """
    if not len(scores):
        return torch.full((), math.inf, dtype=scores.dtype, device=scores.device)
    keep = max(1, math.ceil(len(scores) * share - _TOLERANCE))
    return torch.topk(scores, keep).values[-1]


def token_weights(kept: Tensor, mask: Tensor, loss_type: str, share: float) -> Tensor:
    """
    What the loss of each token is multiplied by so that it is averaged over the kept tokens.

    TRL's losses divide by counts that a token mask does not change. `w_it = kept_it * (tokens that TRL divides by) /
    (those of them that are kept)`:

    | `loss_type` | TRL divides by | weight of a kept token |
    |---|---|---|
    | grpo, sapo | tokens of the row, then rows | tokens of the row / kept tokens of the row |
    | bnpo | tokens of the micro-batch on this rank | tokens of the micro-batch / kept tokens of it, on this rank |
    | dapo, cispo, vespo | tokens of the generation | `1 / share` |
    | dr_grpo, luspo | rows, and a constant | 1: no count of tokens |

    Args:
        kept (`torch.Tensor`): Boolean, shape `(rows, tokens)`.
        mask (`torch.Tensor`): Tokens in the loss, shape `(rows, tokens)`; `kept` is inside it.
        loss_type (`str`): TRL's.
        share (`float`): Share of the tokens of this micro-batch, on all ranks, that are kept.

    Returns:
        `torch.Tensor`: float32, shape `(rows, tokens)`; 0 where a token is not kept. A row without a kept token has
        no loss, and counts as a row.

    Raises:
        ValueError: `loss_type` is unknown.

    Example:
    ```python
    >>> kept, mask = torch.tensor([[True, False, False], [True, True, False]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> token_weights(kept, mask, "grpo", share=0.6).tolist()
    [[2.0, 0.0, 0.0], [1.5, 1.5, 0.0]]
    >>> token_weights(kept, mask, "dr_grpo", share=0.6).tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    ```
    """
    chosen = kept.float()
    if loss_type in _BY_ROW:
        return chosen * (mask.sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp(min=1.0))
    if loss_type in _BY_MICRO_BATCH:
        return chosen * (mask.sum() / chosen.sum().clamp(min=1.0))
    if loss_type in _BY_GENERATION:
        return chosen / share if share else chosen
    if loss_type in _BY_NO_TOKENS:
        return chosen
    known = ", ".join((*_BY_ROW, *_BY_MICRO_BATCH, *_BY_GENERATION, *_BY_NO_TOKENS))
    raise ValueError(f"loss_type={loss_type!r} is none of {known}, so that it is not known what it divides by.")


def prompt_token_loss(logps: Tensor, mask: Tensor, columns: int) -> Tensor:
    """
    Mean negative log-likelihood of the tokens of prompts, the next-token term of Reinforcement Mid-Training.

    Formula: `L_NTP = -sum_(x_t in prompts) log pi(x_t | x_<t) / n`, over the `n` tokens that are no target of RL and
    have a token before them: not those of completions, and not the first one of a prompt.

    Args:
        logps (`torch.Tensor`): Log-prob of each token from the second one on, shape `(rows, tokens - 1)`.
        mask (`torch.Tensor`): 1 for tokens and 0 for padding, which stands on the left of prompts; shape
            `(rows, tokens)`.
        columns (`int`): Of the completions, the last ones.

    Returns:
        `torch.Tensor`: One number, 0 where no token counts.

    Example:
    ```python
    >>> logps = torch.tensor([[-9.0, -0.5, -1.5, -9.0]])  # of tokens 2 to 5; the first one is padding
    >>> prompt_token_loss(logps, torch.tensor([[0, 1, 1, 1, 1]]), columns=1).item()
    1.0
    ```
    """
    prompts = mask.size(1) - columns
    counted = (mask[:, 1:prompts] * mask[:, : prompts - 1]).to(logps)
    return -(logps[:, : prompts - 1] * counted).sum() / counted.sum().clamp(min=1)
