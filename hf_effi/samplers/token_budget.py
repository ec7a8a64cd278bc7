"""Micro-batches under a token budget, of equal cost, dealt evenly over processes and accumulation steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RefusedError
from ..functional.data import (
    batch_costs,
    check_count,
    check_lengths,
    deal_snake,
    fill_to_multiple,
    flop_coefficients,
    pack_best_fit,
    pack_padded,
    seeded,
)
from ..functional.kept_arguments import keeps_arguments
from .base import EffiSampler


def cost_of_model(model: Any) -> tuple[float, float]:
    """
    Return `(a, b)` of the cost `a l + b l^2` of a row of `l` tokens for a dense transformer of transformers.

    Reads layers, query heads and head size from the text part of `model.config`; see [`flop_coefficients`]. A mixture
    of experts multiplies fewer parameters per token than it has, and packed 4-bit weights hide some: call that
    function with the right number.

    Raises:
        RefusedError: the config does not say.
    """
    config = model.config.get_text_config()
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    missing = [name for name in names if getattr(config, name, None) is None]
    if missing:
        raise RefusedError(
            f"{type(config).__name__} has no {', '.join(missing)}. Use flop_coefficients with the model's numbers."
        )
    params = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        params -= embedding.weight.numel()  # a table of its own is looked up, not multiplied
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return flop_coefficients(params, config.num_hidden_layers, config.num_attention_heads, head_dim)


class TokenBudgetBatchSampler(EffiSampler):
    """
    Batches of as many rows as a token budget takes, each update dealt evenly to all processes.

    Padding-free rows are packed best fit decreasing, padded ones with their neighbours in length. The micro-batches
    are sorted by their cost and dealt back and forth to the `processes x accumulation steps` places of the updates, so
    that those of one update cost the same. Each row is given once per epoch: where places would stay empty, dear
    micro-batches are halved. Every process gets the same number of micro-batches, the same in each epoch. The seed
    decides which rows of one length change places, and the order of the updates.

    Args:
        lengths (`torch.Tensor` or `Sequence[int]`): Tokens of each row of the dataset, in `[1, max_tokens]`.
        max_tokens (`int`): Most tokens of a micro-batch; padding counts unless `padding_free`.
        cost (`tuple[float, float]`, *optional*, defaults to `(1.0, 0.0)`): `(a, b)` of a row's cost `a l + b l^2`; see
            [`cost_of_model`].
        padding_free (`bool`, *optional*, defaults to `False`): Whether the collator joins rows instead of padding
            them.
        length_multiple (`int`, *optional*, defaults to 1): Lengths count rounded up to it: `pad_to_multiple_of` of the
            collator. Rows of one rounded length change places.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.

    Raises:
        ValueError: an empty row, a row longer than the budget, or fewer rows than places.

    Example:
    ```python
    >>> sampler = TokenBudgetBatchSampler([5, 7, 3, 2, 4], max_tokens=10)
    >>> sampler.deal(ranks=2)
    >>> [list(sampler.batches(rank)) for rank in (0, 1)]
    [[[4], [1]], [[0], [2, 3]]]
    ```
    """

    learns = False

    @keeps_arguments
    def __init__(
        self,
        lengths: Tensor | Sequence[int],
        max_tokens: int,
        *,
        cost: tuple[float, float] = (1.0, 0.0),
        padding_free: bool = False,
        length_multiple: int = 1,
        seed: int = 0,
    ) -> None:
        self.lengths = _whole(lengths)
        super().__init__(self.lengths.numel(), seed)
        multiple = check_count("length_multiple", length_multiple)
        self.max_tokens, self.cost, self.padding_free = max_tokens, cost, padding_free
        self._rounded = (self.lengths + multiple - 1) // multiple * multiple
        for counted in (self.lengths, self._rounded):
            check_lengths(counted.tolist(), max_tokens)
        # Batches are packed once, as places in the order of lengths: an epoch only decides which rows take them.
        self._ordered = self._rounded.sort(descending=True).values.tolist()
        pack = pack_best_fit if padding_free else pack_padded
        self._packed = pack(self._ordered, max_tokens)
        self.deal(1, 1)

    def deal(self, ranks: int, accumulation: int = 1) -> None:
        """
        Deal the micro-batches to so many processes and accumulation steps. `SamplerMixin` does it by itself.

        Raises:
            ValueError: a count below 1, or fewer rows than `ranks x accumulation` places.
        """
        places = check_count("ranks", ranks) * check_count("accumulation", accumulation)
        batches = fill_to_multiple(self._packed, self._ordered, places, self.cost, not self.padding_free)
        costs = batch_costs(self._lengths_of(batches), self.cost, not self.padding_free)
        dealt = deal_snake(costs, ranks, accumulation)
        self.ranks, self.accumulation = ranks, accumulation
        self.costs = costs[dealt]
        in_order = [batches[i] for i in dealt.flatten().tolist()]
        self._places = torch.tensor([place for batch in in_order for place in batch])
        self._sizes = torch.tensor([len(batch) for batch in in_order]).view(dealt.shape)
        self._cached = None

    @property
    def batches_per_rank(self) -> int:
        """Micro-batches of an epoch for each process."""
        return self._sizes.shape[0] * self.accumulation

    @property
    def imbalance(self) -> float:
        """Cost of the dearest process of an update over the mean of all, averaged over the updates by their cost."""
        of_rank = self.costs.sum(dim=1)
        return float(of_rank.amax(dim=1).sum() / of_rank.mean(dim=1).sum())

    def batches(self, rank: int) -> Iterator[list[int]]:
        """Yield the micro-batches of one process in the epoch that `set_epoch` chose."""
        rows = self._checked_order().tolist()
        sizes = self._sizes[self._shuffled_updates(self.epoch)].flatten()
        ends = sizes.cumsum(0).tolist()
        for end, size in list(zip(ends, sizes.tolist(), strict=True))[rank :: self.ranks]:
            yield rows[end - size : end]

    def order(self, epoch: int) -> Tensor:
        """Return the rows update by update, in each of them micro-batch by micro-batch, process by process."""
        shuffled = torch.randperm(self.num_rows, generator=seeded(self.seed, epoch, 0))
        by_length = shuffled[self._rounded[shuffled].argsort(descending=True, stable=True)]
        in_update = self._sizes.sum(dim=(1, 2))
        begins = in_update.cumsum(0) - in_update
        chosen = self._shuffled_updates(epoch)
        counts = in_update[chosen]
        shift = begins[chosen] - (counts.cumsum(0) - counts)
        return by_length[self._places[torch.arange(self.num_rows) + shift.repeat_interleave(counts)]]

    def settings(self) -> dict[str, Any]:
        return {
            "lengths": self._rounded,
            "max_tokens": self.max_tokens,
            "cost": self.cost,
            "padding_free": self.padding_free,
            "places": self.ranks * self.accumulation,
        }

    def _shuffled_updates(self, epoch: int) -> Tensor:
        return torch.randperm(len(self._sizes), generator=seeded(self.seed, epoch, 1))

    def _lengths_of(self, batches: Sequence[Sequence[int]]) -> list[list[int]]:
        return [[self._ordered[place] for place in batch] for batch in batches]


def _whole(lengths: Tensor | Sequence[int]) -> Tensor:
    """Return the lengths as int64; `row_lengths` gives floats."""
    values = torch.as_tensor(lengths)
    if values.ndim != 1 or not values.numel() or not bool((values == values.long()).all()):
        raise ValueError(
            f"lengths has shape {tuple(values.shape)} and dtype {values.dtype}. Pass one whole number of tokens for "
            "each row of the dataset, at least one."
        )
    return values.long()
