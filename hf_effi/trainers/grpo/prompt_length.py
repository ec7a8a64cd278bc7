"""Prompts that do not fit the model: an error where they would crash, a counter and one warning where they would not."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from ...functional import metrics
from .forward_probe import position_table

logger = logging.get_logger(__name__)


class PromptLengthMixin:
    """Looks at the tokenized prompts before they reach the model."""

    #: positions of the model, where its config tells; whether they are a table that ends there
    _positions: int | None = None
    _positions_are_a_table = _warned_long_prompt = False

    def _init_prompt_length(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self._positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._positions_are_a_table = position_table(model) is not None

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        # Once per generation on every rank. `_generate_single_turn` runs as often as a rank's rollouts call tools.
        tokenized = super()._tokenize_prompts(prompts)
        if self._positions is not None:
            self._check_prompt_lengths([len(ids) for ids in tokenized[0]])
        return tokenized

    def _check_prompt_lengths(self, lengths: list[int]) -> None:
        completion = self.max_completion_length or 1  # None: as long as the model's generation settings let it be
        room = self._positions - completion
        # Gathered, so that all ranks count and raise alike.
        local = torch.tensor([max(lengths), sum(n > room for n in lengths)], device=self.accelerator.device)
        longest, too_long = self.accelerator.gather(local.unsqueeze(0)).view(-1, 2).unbind(1)
        longest, too_long = int(longest.max()), int(too_long.sum())
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][metrics.ROWS_OVER_MAX_POSITIONS].append(float(too_long))
        if not too_long:
            return
        message = (
            f"a prompt of {longest} tokens and max_completion_length={self.max_completion_length} do not fit into the "
            f"model's {self._positions} positions. Drop prompts of more than {room} tokens, e.g. with "
            "dataset.filter, or lower max_completion_length."
        )
        if self._positions_are_a_table and longest >= self._positions:
            raise ValueError(message)  # not even one token of a completion fits: the lookup would fail deep inside
        if not self._warned_long_prompt:
            then = (
                "The run stops where a completion goes past them."
                if self._positions_are_a_table
                else "Rotary models go on, with positions they were not trained on."
            )
            logger.warning(f"{message} {then}")
            self._warned_long_prompt = True
