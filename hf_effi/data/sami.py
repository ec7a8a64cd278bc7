"""Batches for SAMI: every response of a query under every principle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: entry of a batch that says how many principles each query has, shape `(queries,)`
PRINCIPLES = "sami_principles"


class SAMICollator:
    """
    Collates rows `prompts` and `responses` of a query into its `C * C` sequences: response `j` under principle `i`.

    `prompts[i]` is the query under principle `i`, as the model is given it, and `responses[j]` what the model wrote
    under principle `j`. Sequences are padded on the right; only tokens of responses have labels.

    Args:
        tokenizer: Of the model. It needs a pad token, and an end token where that shall count.
        mask_eos (`bool`, *optional*, defaults to `True`): Leave the end of a response out, as the released code does
            on purpose: where it ends says little of the principle. `False` adds the end token to each response.

    Raises:
        ValueError: a tokenizer without the tokens that are needed.

    Example:
    ```python
    >>> from hf_effi.demo import toy
    >>> batch = SAMICollator(toy().tokenizer)([{"prompts": ["1+1=", "2+2="], "responses": ["2", "14"]}])
    >>> batch["input_ids"].shape, (batch["labels"] != -100).sum(1).tolist(), batch["sami_principles"].tolist()
    (torch.Size([4, 6]), [1, 2, 1, 2], [2])
    ```
    """

    def __init__(self, tokenizer: Any, mask_eos: bool = True) -> None:
        if not isinstance(mask_eos, bool):
            raise ValueError(f"mask_eos={mask_eos!r} must be True or False.")
        needed = ("pad_token_id",) if mask_eos else ("pad_token_id", "eos_token_id")
        if missing := [name for name in needed if getattr(tokenizer, name, None) is None]:
            raise ValueError(
                f"the tokenizer has no {missing[0]}. Set it, e.g. tokenizer.pad_token = tokenizer.eos_token."
            )
        self.tokenizer, self.mask_eos = tokenizer, mask_eos

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Return the batch: `input_ids`, `attention_mask`, `labels`, and the principles of each query.

        Raises:
            ValueError: a row without the columns, with fewer than two principles, with other numbers of prompts and
                responses, or with a response that has no token; or queries with different numbers of principles.
        """
        sequences: list[tuple[list[int], list[int]]] = []
        counts = [self._check(row, place) for place, row in enumerate(rows)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"queries of one batch have {sorted(set(counts))} principles. Give each the same number, or use "
                "per_device_train_batch_size=1."
            )
        for row in rows:
            prompts = [self._ids(text) for text in row["prompts"]]
            responses = [self._ids(text) for text in row["responses"]]
            end = [] if self.mask_eos else [self.tokenizer.eos_token_id]
            sequences += [(prompt, response + end) for prompt in prompts for response in responses]
        width = max(len(prompt) + len(response) for prompt, response in sequences)
        ids = torch.full((len(sequences), width), self.tokenizer.pad_token_id, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for place, (prompt, response) in enumerate(sequences):
            end_at = len(prompt) + len(response)
            ids[place, :end_at], mask[place, :end_at] = torch.tensor(prompt + response), 1
            labels[place, len(prompt) : end_at] = torch.tensor(response)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, PRINCIPLES: torch.tensor(counts)}

    def _check(self, row: Mapping[str, Any], place: int) -> int:
        if not {"prompts", "responses"} <= set(row):
            raise ValueError(
                f"row {place} of a batch has no columns 'prompts' and 'responses', it has {sorted(row)}. A Trainer "
                "drops columns that the model does not take: set remove_unused_columns=False."
            )
        prompts, responses = row["prompts"], row["responses"]
        if len(prompts) != len(responses) or len(prompts) < 2:
            raise ValueError(
                f"row {place} of a batch has {len(prompts)} prompts and {len(responses)} responses. Give as many "
                "responses as prompts, one written under each, and at least two: with one principle there is nothing "
                "to tell it from."
            )
        for text in prompts:
            if not self._ids(text):
                raise ValueError(f"row {place} of a batch has a prompt without a token.")
        for text in responses:
            if not self._ids(text):
                raise ValueError(f"row {place} of a batch has an empty response. Leave the row out.")
        return len(prompts)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
