"""
Prompts that do not fit the model: an error where they would crash, a counter and one warning where they would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ...errors import RefusedError
from ...functional import metrics
from .forward_probe import position_table

logger = logging.get_logger(__name__)


@dataclass
class PromptRoom:
    """
    Looks at the lengths of prompts before they reach the model.

    Args:
        positions (`int`): Positions of the model.
        is_a_table (`bool`): Whether they are rows of an embedding, which ends there; rotary ones go on.
        warned (`bool`, *optional*, defaults to `False`): Whether a prompt was too long before: one warning is enough.
    """

    positions: int
    is_a_table: bool
    warned: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> PromptRoom | None:
        """Return the room of an unwrapped model, or `None` where its config does not tell the positions."""
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return None if positions is None else cls(positions, position_table(model) is not None)

    def check(
        self, lengths: Sequence[int], max_completion_length: int | None, accelerator: Any, log: dict[str, list[float]]
    ) -> None:
        """
        Count the prompts that leave a completion no room. Once for each generation, on every rank.

        Args:
            lengths (`Sequence[int]`): Tokens of each prompt of this rank; at least one.
            max_completion_length (`int`, *optional*): `None` is as long as the model's generation settings let it be,
                which is at least one token.
            accelerator (`Accelerator`): Gathers, so that all ranks count, warn and raise alike.
            log (`dict[str, list[float]]`): TRL's `_metrics` of training or evaluation.

        Raises:
            RefusedError: a prompt of any rank reaches the end of the table, where the lookup would fail.
        """
        room = self.positions - (max_completion_length or 1)
        local = torch.tensor([max(lengths), sum(n > room for n in lengths)], device=accelerator.device)
        longest, too_long = accelerator.gather(local.unsqueeze(0)).view(-1, 2).unbind(1)
        longest, too_long = int(longest.max()), int(too_long.sum())
        log[metrics.ROWS_OVER_MAX_POSITIONS].append(float(too_long))
        if not too_long:
            return
        message = (
            f"a prompt of {longest} tokens and max_completion_length={max_completion_length} do not fit into the "
            f"model's {self.positions} positions. Drop prompts of more than {room} tokens, e.g. with "
            "dataset.filter, or lower max_completion_length."
        )
        if self.is_a_table and longest >= self.positions:
            raise RefusedError(message)
        if not self.warned:
            then = (
                "The run stops where a completion goes past them."
                if self.is_a_table
                else "Rotary models go on, with positions they were not trained on."
            )
            logger.warning(f"{message} {then}")
            self.warned = True
