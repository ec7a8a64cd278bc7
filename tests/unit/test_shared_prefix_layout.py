"""Prompts shared by several completions: layout by hand, grouping of rows, bad rows named."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from hf_effi.data.shared_prefix import group_by_prompt
from hf_effi.functional.shared_prefix import PrefixSegments, plan_shared_prefix
from tests.helpers.prompts import EQUAL, ROWS

# --- layout ----------------------------------------------------------------------------------------------------------


def inputs_of(prompts, completions):
    layout = plan_shared_prefix(prompts, [len(completion) for completion in completions])
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    batch = layout.model_inputs(sequences)
    return layout, {name: value.tolist() if torch.is_tensor(value) else value for name, value in batch.items()}


def test_layout_by_hand():
    """Two groups of two and one row on its own between them: prefixes first, then branches, then the rest."""
    prompts = [[1, 2, 3], [7], [4, 5], [1, 2, 3], [4, 5]]
    layout, batch = inputs_of(prompts, [[10, 11], [12], [13], [14], [15, 16]])
    assert batch["input_ids"] == [[1, 2, 4, 3, 10, 11, 3, 14, 5, 13, 5, 15, 16, 7, 12]]
    assert batch["position_ids"] == [[0, 1, 0, 2, 3, 4, 2, 3, 1, 2, 1, 2, 3, 0, 1]]
    ignored = -100
    assert batch["labels"] == [
        [ignored] * 4 + [10, 11, ignored, 14, ignored, 13, ignored, 15, 16, ignored, 12]
    ]  # a branch begins with a prompt token
    assert batch["cu_seq_lens_q"] == batch["cu_seq_lens_k"] == [0, 2, 3, 6, 8, 10, 13, 15]
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert layout.prefix._asdict() | {"cu_seq_lens_q": 0, "cu_seq_lens_k": 0} == {
        "cu_seq_lens_q": 0, "cu_seq_lens_k": 0, "max_length_q": 5, "max_length_k": 2, "num_queries": 10,
        "num_keys": 3, "longest_context": 5,
    }  # fmt: skip
    assert batch["shared_prefix_cu_seq_lens_q"] == [0, 5, 10] and batch["shared_prefix_cu_seq_lens_k"] == [0, 2, 3]
    assert layout.completion_index().tolist() == [[3, 4], [13, -1], [8, -1], [6, -1], [10, 11]]
    assert (layout.num_tokens, layout.num_row_tokens) == (15, 18)


def test_every_completion_token_is_scored_by_the_token_before_it():
    layout, batch = inputs_of([EQUAL, EQUAL, [9]], [[1, 2], [3], [7, 8]])
    shifted = torch.tensor(batch["labels"][0][1:] + [-100])
    scores = layout.to_completions(shifted, fill=-1)
    assert scores.tolist() == [[1, 2], [3, -1], [7, 8]]
    assert (shifted != -100).sum() == 5  # and no other token is
    assert layout.to_completions(shifted[None], width=3, fill=0).tolist() == [[1, 2, 0], [3, 0, 0], [7, 8, 0]]


@pytest.mark.parametrize(
    ("prompts", "completions", "ids", "shared"),
    [
        ([EQUAL], [[1]], [4, 5, 6, 1], None),  # one completion: an ordinary document
        ([EQUAL, [4, 5]], [[1], [2]], [4, 5, 6, 1, 4, 5, 2], None),  # a longer prompt is another prompt
        ([[4], [4]], [[1], [2]], [4, 1, 4, 2], None),  # one token: nothing in front of the branches
        ([EQUAL, EQUAL], [[], [1]], [4, 5, 6, 6, 1], 3),  # an empty completion
        ([EQUAL, EQUAL], [[1], [1]], [4, 5, 6, 1, 6, 1], 4),  # equal completions stay two
        ([EQUAL, EQUAL], [[], []], [4, 5, 6, 6], 2),
        ([EQUAL], [[]], [4, 5, 6], None),
    ],
)
def test_layout_edges(prompts, completions, ids, shared):
    layout, batch = inputs_of(prompts, completions)
    assert batch["input_ids"] == [ids]
    assert (layout.prefix and layout.prefix.num_queries) == shared
    assert ("shared_prefix_cu_seq_lens_q" in batch) == (shared is not None)
    labelled = [token for token in batch["labels"][0] if token != -100]
    assert labelled == sum(completions, [])
    assert layout.completion_index().shape == (len(prompts), max(map(len, completions)))


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match="prompt of row 1 is empty.*BOS"):
        plan_shared_prefix([[1], []], [1, 1])
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        plan_shared_prefix([[1], [2]], [1])
    with pytest.raises(ValueError, match="0 prompts"):
        plan_shared_prefix([], [])
    with pytest.raises(ValueError, match=r"values of shape \(3,\) for 2 tokens"):
        plan_shared_prefix([[1]], [1]).to_completions(torch.zeros(3))
    with pytest.raises(ValueError, match="not shared_prefix_cu_seq_lens_k, .*longest_context"):
        PrefixSegments.from_kwargs({"shared_prefix_cu_seq_lens_q": torch.zeros(2)})


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, Dataset.from_list(ROWS)], ids=["list", "dataset"])
def test_group_by_prompt(rows):
    assert group_by_prompt(rows).to_list() == [
        {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [3]]},
        {"prompt_ids": [9], "completion_ids": [[]]},
    ]
    assert group_by_prompt(rows, max_completions=2)["completion_ids"][:] == [[[3], [4, 5]], [[3]], [[]]]
