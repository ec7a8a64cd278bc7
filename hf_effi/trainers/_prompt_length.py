"""Prompts that do not fit the model: an error where they would crash, a counter and one warning where they would not."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from ._exact_probe import position_table

logger = logging.get_logger(__name__)


class PromptLengthMixin:
    """Looks at the tokenized prompts before they reach the model."""

    def _init_prompt_length(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self._positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._positions_are_a_table = position_table(model) is not None
        self._warned_long_prompt = False

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self._positions is not None:
            self._check_prompt_lengths([len(ids) for ids in prompt_ids])
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _check_prompt_lengths(self, lengths: list[int]) -> None:
        room = self._positions - self.max_completion_length
        # Gathered, so that all ranks count and raise alike.
        local = torch.tensor([max(lengths), sum(n > room for n in lengths)], device=self.accelerator.device)
        longest, too_long = self.accelerator.gather(local.unsqueeze(0)).view(-1, 2).unbind(1)
        longest, too_long = int(longest.max()), int(too_long.sum())
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["effi/rows_over_max_positions"].append(float(too_long))
        if not too_long:
            return
        message = (
            f"a prompt of {longest} tokens and max_completion_length={self.max_completion_length} do not fit into the "
            f"model's {self._positions} positions. Drop prompts of more than {room} tokens, e.g. with "
            "dataset.filter, or lower max_completion_length."
        )
        if self._positions_are_a_table:
            raise ValueError(message)
        if not self._warned_long_prompt:
            logger.warning(f"{message} Rotary models go on, with positions they were not trained on.")
            self._warned_long_prompt = True
