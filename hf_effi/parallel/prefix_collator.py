"""Prompts with several completions for a stock Trainer: group the rows of a dataset, and collate them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PretrainedConfig

from ..functional.shared_prefix import SharedPrefixError, plan_shared_prefix
from .varlen import PATTERNS_FIELD, VARLEN_ATTENTION

PROMPT, COMPLETION = "prompt_ids", "completion_ids"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def group_by_prompt(rows: Dataset | Iterable[Mapping[str, Any]], max_completions: int | None = None) -> Dataset:
    """
    Join rows with the same prompt into one row with all their completions, in order of first appearance.

    All ids are in memory while it works. Other columns are dropped.

    Args:
        rows (`Dataset` or `Iterable[Mapping]`): Columns `prompt_ids` and `completion_ids`, lists of token ids.
        max_completions (`int`, *optional*): Most completions of one row; a prompt with more gets several rows. It bounds the
            tokens of a micro-batch. All by default.

    Returns:
        `Dataset`: Columns `prompt_ids`, a list of token ids, and `completion_ids`, a list of such lists.

    Raises:
        SharedPrefixError: a stream, no rows, a missing column, `max_completions` below 1.

    Example:
    ```python
    >>> rows = [{"prompt_ids": [5, 6], "completion_ids": [1]}, {"prompt_ids": [5, 6], "completion_ids": [2, 3]}]
    >>> group_by_prompt(rows)[0]
    {'prompt_ids': [5, 6], 'completion_ids': [[1], [2, 3]]}

    ```
    """
    if isinstance(rows, IterableDataset):
        raise SharedPrefixError(
            "A stream cannot be grouped: the same prompt may come at any time. Load it as a Dataset."
        )
    if max_completions is not None and (not isinstance(max_completions, int) or max_completions < 1):
        raise SharedPrefixError(f"max_completions={max_completions!r} must be an integer of at least 1, or None.")
    if isinstance(rows, Dataset):
        rows = rows.select_columns([name for name in (PROMPT, COMPLETION) if name in rows.column_names])
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for row in rows:
        prompt, completion = _columns(row)
        if completion and not isinstance(completion[0], int):
            raise SharedPrefixError(f"{COMPLETION} holds lists of lists: these rows are grouped already.")
        groups.setdefault(tuple(prompt), []).append(completion)
    if not groups:
        raise SharedPrefixError("There are no rows to group.")
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

    Rows come from [`group_by_prompt`]; a batch of `n` rows is `n` prompts with all their completions. Prompts are shared
    across its rows too. The loss is that of the completions. Set `remove_unused_columns=False`.

    Args:
        model (`PreTrainedModel`): What will be trained, with `attn_implementation="hf_effi_varlen"`. Only its config is kept.

    Raises:
        SharedPrefixError: a model for which prompts cannot be shared exactly; rows without these columns, or not grouped.

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
        _check_config(self.config)  # the attention of a model can be changed after this was made
        prompts, sequences = [], []
        for row in rows:
            prompt, completions = _columns(row)
            if not completions or isinstance(completions[0], int):
                raise SharedPrefixError(
                    f"{COMPLETION} must be a list of completions, each a list of token ids; got {completions!r:.60}. Use "
                    "group_by_prompt(dataset)."
                )
            prompts += [prompt] * len(completions)
            sequences += [[*prompt, *completion] for completion in completions]
        lengths = [len(sequence) - len(prompt) for prompt, sequence in zip(prompts, sequences, strict=True)]
        return plan_shared_prefix(prompts, lengths).model_inputs(sequences)


def check_shared_prefix(model: Any) -> None:
    """
    Raise where a model would not give the results of separate rows.

    Raises:
        SharedPrefixError: another attention implementation, one that does not hand arguments to its attention, layers that
            carry a state from token to token, sparse patterns, a router's loss.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise SharedPrefixError(
            f"{type(model).__name__} is not a transformers model that hands the arguments of a call to its attention."
        )
    _check_config(model.config)


def _check_config(config: PretrainedConfig) -> None:
    text = config.get_text_config()
    if text._attn_implementation != VARLEN_ATTENTION:
        raise SharedPrefixError(
            f"attn_implementation={text._attn_implementation!r} would not see the shared prompt: call "
            "model.set_attn_implementation(register_varlen_attention())."
        )
    if others := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        raise SharedPrefixError(
            f"Layers of type {sorted(others)} carry a state along the row, which branches cannot share."
        )
    if any(getattr(text, PATTERNS_FIELD, None) or ()):
        raise SharedPrefixError("The model has sparse attention patterns, which a shared prefix does not follow.")
    if getattr(text, "output_router_logits", False):
        raise SharedPrefixError("output_router_logits=True: a shared prompt would count once in the router's loss.")


def _columns(row: Mapping[str, Any]) -> tuple[list[int], Any]:
    missing = [name for name in (PROMPT, COMPLETION) if name not in row]
    if missing:
        raise SharedPrefixError(
            f"The rows have no {' and no '.join(missing)}, only {sorted(row)}. In a Trainer, set "
            "remove_unused_columns=False."
        )
    return row[PROMPT], row[COMPLETION]
