"""Prompts with several completions for a stock Trainer: group the rows of a dataset, and collate them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PretrainedConfig

from ..attention.shared_prefix import check_config, check_shared_prefix
from ..errors import RefusedError
from ..functional.shared_prefix import plan_shared_prefix

PROMPT, COMPLETION = "prompt_ids", "completion_ids"


def group_by_prompt(rows: Dataset | Iterable[Mapping[str, Any]], max_completions: int | None = None) -> Dataset:
    """
    Join rows with the same prompt into one row with all their completions, in order of first appearance.

    All ids are in memory while it works. Other columns are dropped.

    Args:
        rows (`Dataset` or `Iterable[Mapping]`): Columns `prompt_ids` and `completion_ids`, lists of token ids.
        max_completions (`int`, *optional*): Most completions of one row; a prompt with more gets several rows. It
            bounds the tokens of a micro-batch. All by default.

    Returns:
        `Dataset`: Columns `prompt_ids`, a list of token ids, and `completion_ids`, a list of such lists.

    Raises:
        RefusedError: a stream.
        ValueError: no rows, a missing column, `max_completions` below 1.

    Example:
    ```python
    >>> rows = [{"prompt_ids": [5, 6], "completion_ids": [1]}, {"prompt_ids": [5, 6], "completion_ids": [2, 3]}]
    >>> group_by_prompt(rows)[0]
    {'prompt_ids': [5, 6], 'completion_ids': [[1], [2, 3]]}

    ```
    """
    if isinstance(rows, IterableDataset):
        raise RefusedError("A stream cannot be grouped: the same prompt may come at any time. Load it as a Dataset.")
    if max_completions is not None and (type(max_completions) is not int or max_completions < 1):
        raise ValueError(f"max_completions={max_completions!r} must be an integer of at least 1, or None.")
    if isinstance(rows, Dataset):
        rows = rows.select_columns([name for name in (PROMPT, COMPLETION) if name in rows.column_names])
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for row in rows:
        prompt, completion = _columns(row)
        if not _is_ids(completion):
            raise ValueError(
                f"{COMPLETION} must be a list of token ids, got {completion!r:.60}. Lists of such lists are grouped "
                "already; a dataset of tensors needs with_format(None)."
            )
        groups.setdefault(tuple(prompt), []).append(completion)
    if not groups:
        raise ValueError("There are no rows to group.")
    grouped = [
        (prompt, completions[start : start + (max_completions or len(completions))])
        for prompt, completions in groups.items()
        for start in range(0, len(completions), max_completions or len(completions))
    ]
    prompts, completions = zip(*grouped, strict=True)
    return Dataset.from_dict({PROMPT: list(map(list, prompts)), COMPLETION: list(completions)})


class SharedPrefixCollator:
    """
    Collate prompts with their completions so that each prompt is forwarded once, with the loss of padded rows.

    Rows come from [`group_by_prompt`]; a batch of `n` rows is `n` prompts with all their completions. Prompts are
    shared across its rows too. The loss is that of the completions. Set `remove_unused_columns=False`.

    Args:
        model (`PreTrainedModel`): What will be trained, with `attn_implementation="hf_effi_varlen"`. Only its config
            is kept.

    Raises:
        RefusedError: a model for which prompts cannot be shared exactly.
        ValueError: rows without these columns, or not grouped.

    Example:
    ```python
    model.set_attn_implementation(register_varlen_attention())
    args = TrainingArguments("out", remove_unused_columns=False, per_device_train_batch_size=2)
    Trainer(model, args, train_dataset=group_by_prompt(rows), data_collator=SharedPrefixCollator(model)).train()
    ```
    """

    def __init__(self, model: Any) -> None:
        check_shared_prefix(model)
        self.config: PretrainedConfig = model.config

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        check_config(self.config)  # the attention of a model can be changed after this was made
        prompts, sequences = [], []
        for row in rows:
            prompt, completions = _columns(row)
            if not isinstance(completions, list) or not completions or not all(map(_is_ids, completions)):
                raise ValueError(
                    f"{COMPLETION} must be a list of completions, each a list of token ids; got {completions!r:.60}. "
                    "Use group_by_prompt(dataset)."
                )
            prompts += [prompt] * len(completions)
            sequences += [[*prompt, *completion] for completion in completions]
        lengths = [len(sequence) - len(prompt) for prompt, sequence in zip(prompts, sequences, strict=True)]
        return plan_shared_prefix(prompts, lengths).model_inputs(sequences)


def _columns(row: Mapping[str, Any]) -> tuple[list[int], Any]:
    missing = [name for name in (PROMPT, COMPLETION) if name not in row]
    if missing:
        raise ValueError(
            f"The rows have no {' and no '.join(missing)}, only {sorted(row)}. In a Trainer, set "
            "remove_unused_columns=False."
        )
    if not _is_ids(row[PROMPT]):
        raise ValueError(
            f"{PROMPT} must be a list of token ids, got {row[PROMPT]!r:.60}. A dataset of tensors needs "
            "with_format(None)."
        )
    return row[PROMPT], row[COMPLETION]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and (not value or isinstance(value[0], int))
