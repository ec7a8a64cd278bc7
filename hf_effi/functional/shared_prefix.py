"""Rows that share a prompt, laid out in one flat row in which each prompt comes once. Indices only, no model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
_KEYWORD = "shared_prefix_"


class PrefixSegments(NamedTuple):
    """
    Which tokens of a flat row attend to which shared prefix.

    The row begins with all prefixes, then come all branches, those of one prefix side by side.

    Args:
        cu_seq_lens_q (`Tensor`): `(prefixes + 1,)` int32: where the branches of each prefix begin among the branches.
        cu_seq_lens_k (`Tensor`): `(prefixes + 1,)` int32: where each prefix begins.
        max_length_q, max_length_k (`int`): The most branch tokens of a prefix, and the longest prefix.
        num_queries, num_keys (`int`): Tokens of all branches, and of all prefixes.
        longest_context (`int`): The longest prefix and branch together.
    """

    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    num_queries: int
    num_keys: int
    longest_context: int

    def as_kwargs(self) -> dict[str, Any]:
        """Return what a model is called with: one keyword a field."""
        return {_KEYWORD + name: value for name, value in self._asdict().items()}

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> PrefixSegments | None:
        """Return what `as_kwargs` put into a call, or `None` if the call shares nothing."""
        given = {name: kwargs.get(_KEYWORD + name) for name in cls._fields}
        found = {name: value for name, value in given.items() if value is not None}
        if not found:
            return None
        if missing := [_KEYWORD + name for name in given if name not in found]:
            raise ValueError(f"The call has some arguments of a shared prefix, but not {', '.join(missing)}.")
        return cls(**found)


@dataclass(frozen=True)
class SharedPrefixLayout:
    """
    Where each token of the flat row comes from, and where the scores of each completion are.

    Args:
        rows (`Tensor`): `(tokens,)`: the row that a token is taken from.
        position_ids (`Tensor`): `(tokens,)`: its place in that row's prompt and completion, and its position.
        labelled (`Tensor`): `(tokens,)`, bool: whether it is of a completion.
        cu_seq_lens (`Tensor`): `(segments + 1,)` int32: where prefixes, branches and rows on their own begin.
        prefix ([`PrefixSegments`], *optional*): Which of them attend to which; `None` if no prompt is shared.
        scores_begin (`Tensor`): `(rows,)`: the flat index of each row's last prompt token, which scores its
            completion.
        completion_lengths (`Tensor`): `(rows,)`.
        num_row_tokens (`int`): Tokens of all rows, each with its own prompt: what padding-free rows would forward.
    """

    rows: Tensor
    position_ids: Tensor
    labelled: Tensor
    cu_seq_lens: Tensor
    prefix: PrefixSegments | None
    scores_begin: Tensor
    completion_lengths: Tensor
    num_row_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the flat row."""
        return self.rows.numel()

    def model_inputs(self, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        """
        Return `input_ids`, `labels` and `position_ids`, each `(1, tokens)`, and the arguments of the attention.

        Args:
            sequences (`Sequence[Sequence[int]]`): Prompt and completion of each row, joined.
        """
        begins = torch.tensor([0, *itertools.accumulate(map(len, sequences))])
        ids = torch.tensor(list(itertools.chain.from_iterable(sequences)))[begins[self.rows] + self.position_ids]
        longest = int(self.cu_seq_lens.diff().max())
        return {
            "input_ids": ids[None],
            "labels": ids.masked_fill(~self.labelled, IGNORED)[None],
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            **(self.prefix.as_kwargs() if self.prefix else {}),
        }

    def completion_index(self, width: int | None = None) -> Tensor:
        """
        Return `(rows, width)`: the flat index whose output scores each completion token; -1 past a completion's end.
        """
        width = int(self.completion_lengths.max()) if width is None else width
        places = torch.arange(width)
        return torch.where(
            places < self.completion_lengths[:, None], self.scores_begin[:, None] + places, torch.tensor(-1)
        )

    def to_completions(self, values: Tensor, width: int | None = None, fill: float = 0.0) -> Tensor:
        """
        Return the scores of the flat row as `(rows, width)`, differentiable.

        Args:
            values (`Tensor`): `(1, tokens)` or `(tokens,)`; entry `t` scores token `t + 1`, as logits do.
            width (`int`, *optional*): Columns; by default the longest completion.
            fill (`float`, *optional*, defaults to 0): What stands past the end of a completion.
        """
        if values.numel() != self.num_tokens:
            raise ValueError(f"values of shape {tuple(values.shape)} for {self.num_tokens} tokens: give one each.")
        index = self.completion_index(width).to(values.device)
        return values.flatten()[index.clamp(min=0)].masked_fill(index < 0, fill)


def plan_shared_prefix(
    prompts: Sequence[Sequence[int]], completion_lengths: Sequence[int], share: bool = True
) -> SharedPrefixLayout:
    """
    Lay out rows so that each distinct prompt is computed once.

    `[P[:-1] of each shared prompt][P[-1], R of each of its rows][P, R of rows whose prompt no other row has]`

    The last prompt token is repeated at the head of each branch `P[-1], R`: it predicts the first token of each
    completion, so that the usual shift by one gives every loss its place. Positions in a branch go on from `|P| - 1`.
    Rows go from `sum |P| + |R|` to `sum over prompts of |P| - 1` plus `sum of 1 + |R|` tokens.
    Prefix Grouper, https://arxiv.org/abs/2506.05433.

    Args:
        prompts (`Sequence[Sequence[int]]`): Token ids of each row's prompt, at least one.
        completion_lengths (`Sequence[int]`): Tokens of each row's completion, 0 or more.
        share (`bool`, *optional*, defaults to `True`): `False` lays out each row with a prompt of its own.

    Raises:
        ValueError: no rows, an empty prompt, or not one length per row.

    Example:
    ```python
    >>> layout = plan_shared_prefix([[5, 6, 7], [5, 6, 7], [8, 9]], [2, 1, 1])
    >>> layout.rows.tolist(), layout.position_ids.tolist()
    ([0, 0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 2, 3, 0, 1, 2])
    >>> layout.cu_seq_lens.tolist(), layout.prefix.cu_seq_lens_q.tolist(), layout.prefix.cu_seq_lens_k.tolist()
    ([0, 2, 5, 7, 10], [0, 5], [0, 2])
    >>> layout.completion_index().tolist()
    [[2, 3], [5, -1], [8, -1]]

    ```
    """
    if not prompts or len(prompts) != len(completion_lengths):
        raise ValueError(
            f"{len(prompts)} prompts and {len(completion_lengths)} completions: give at least one, and as many."
        )
    if empty := [row for row, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"The prompt of row {empty[0]} is empty: begin it with a token, such as BOS.")
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts) if share else ():
        groups.setdefault(tuple(map(int, prompt)), []).append(row)
    lengths = [len(prompt) + length for prompt, length in zip(prompts, completion_lengths, strict=True)]
    # A prompt of one token has nothing in front of its branches.
    shared = [(len(prompt) - 1, rows) for prompt, rows in groups.items() if len(rows) > 1 and len(prompt) > 1]
    alone = sorted(set(range(len(prompts))).difference(*(rows for _, rows in shared)))
    segments = [(rows[0], 0, prefix) for prefix, rows in shared]
    segments += [(row, prefix, lengths[row]) for prefix, rows in shared for row in rows]
    segments += [(row, 0, lengths[row]) for row in alone]
    bounds = [0, *itertools.accumulate(end - begin for _, begin, end in segments)]
    branch_of = {row: (bounds[i], begin) for i, (row, begin, _) in enumerate(segments) if i >= len(shared)}
    begins, firsts = zip(*(branch_of[row] for row in range(len(prompts))), strict=True)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    positions = torch.cat([torch.arange(begin, end) for _, begin, end in segments])
    rows = torch.tensor([row for row, _, _ in segments]).repeat_interleave(torch.tensor(bounds).diff())
    return SharedPrefixLayout(
        rows=rows,
        position_ids=positions,
        labelled=positions >= prompt_lengths[rows],
        cu_seq_lens=torch.tensor(bounds, dtype=torch.int32),
        prefix=_prefix_segments(shared, lengths) if shared else None,
        scores_begin=torch.tensor(begins) + prompt_lengths - 1 - torch.tensor(firsts),
        completion_lengths=torch.tensor(completion_lengths),
        num_row_tokens=sum(lengths),
    )


def _prefix_segments(shared: Sequence[tuple[int, list[int]]], lengths: Sequence[int]) -> PrefixSegments:
    keys = [prefix for prefix, _ in shared]
    queries = [sum(lengths[row] - prefix for row in rows) for prefix, rows in shared]
    of_queries, of_keys = (
        torch.tensor([0, *itertools.accumulate(parts)], dtype=torch.int32) for parts in (queries, keys)
    )
    longest = max(lengths[row] for _, rows in shared for row in rows)
    return PrefixSegments(
        cu_seq_lens_q=of_queries,
        cu_seq_lens_k=of_keys,
        max_length_q=max(queries),
        max_length_k=max(keys),
        num_queries=sum(queries),
        num_keys=sum(keys),
        longest_context=longest,
    )
