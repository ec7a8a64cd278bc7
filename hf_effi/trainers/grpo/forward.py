"""Savings that leave the gradient as it is: forward only real tokens, and only rows that have a gradient.

Both act at one seam, `_get_per_token_logps_and_entropies`: it returns the same `(rows, columns)` tensors as TRL's, so
the loss code downstream, with its eight normalisers, is TRL's own and needs no correction for any `loss_type`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import RefusedError
from ...functional.forward_costs import bucket_count, grouped_order
from ...functional.rollouts import (
    Bucket,
    GenerationLayout,
    concat_rows,
    contiguous_rows,
    plan_buckets,
    rows_with_gradient,
    scatter_completion,
    split_evenly,
    take_rows,
)
from .host import Host
from .packed import FlatRows, PackedForward
from .rows import Ratios, whole_rows
from .token_budget import ForwardPlanner, PiecesInHand, Plan, most_of_ranks

#: log-probs, entropies and the router's loss, as TRL's forward returns them
Scores = tuple[Tensor, Tensor | None, Tensor | None]
#: TRL's `_get_per_token_logps_and_entropies`
Forward = Callable[..., Scores]


@dataclass(frozen=True)
class _Asked:
    """
    What TRL asks for.

    Args:
        stock (`Callable`): The next `_get_per_token_logps_and_entropies`.
        model (`nn.Module`): As the trainer wrapped it.
        ids, mask (`torch.Tensor`): Shape `(rows, columns)`.
        columns (`tuple[int, int]`): Of the prompts, and of the completions.
        entropy (`bool`): Whether entropies are wanted beside the log-probs.
    """

    stock: Forward
    model: nn.Module
    ids: Tensor
    mask: Tensor
    columns: tuple[int, int]
    entropy: bool

    @property
    def of_completions(self) -> Tensor:
        """The mask of the completions."""
        return self.mask[:, self.columns[0] :]


class LogProbForward:
    """
    Stands around TRL's forward for log-probs: trim, sort, skip, pack and share.

    Args:
        host ([`Host`]): The trainer whose forward it is.
        exact_savings (`tuple[str, ...]`, *optional*): The savings that are on.
        buckets (`int`, *optional*, defaults to 0): In how many length buckets `trim` splits a micro-batch; 0 chooses.
        count (`Callable[[int, int, int], None]`, *optional*): Told of every forward: its real tokens, its tokens with
            padding, and those that were saved.
        packed ([`PackedForward`], *optional*): Runs flat rows, where `pack` or `share` is on.
        score_budget (`int`, *optional*, defaults to 0): The most tokens of a forward without a gradient; 0 is off.
    """

    def __init__(
        self,
        host: Host,
        exact_savings: tuple[str, ...] = (),
        buckets: int = 0,
        count: Callable[[int, int, int], None] = lambda real, forwarded, saved: None,
        packed: PackedForward | None = None,
        score_budget: int = 0,
    ) -> None:
        self._host, self.exact_savings, self._buckets, self._count = host, exact_savings, buckets, count
        self.packed, self._score_budget = packed, score_budget
        self._planner = ForwardPlanner(host, exact_savings, packed, self._count_of)
        #: the micro-batch that is forwarded piece by piece; `None` for one that is forwarded at once
        self._pieces: PiecesInHand | None = None
        #: which rows of the batch in hand have a gradient; `None` is not known, or of no interest
        self._active: Tensor | None = None

    # --- sort: rows change places only among the micro-batches of one optimizer step -------------------------------

    def sorted_chunks(self, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Return the micro-batches of a generation with rows of similar length together, and those without a gradient
        first.

        Args:
            chunks (`list[dict]`): As TRL buffers them.
        """
        if "sort" not in self.exact_savings or any(chunk.get("num_images") is not None for chunk in chunks):
            return chunks
        # Whole: elsewhere `sort` is not exact, and off.
        window = cast(int, GenerationLayout.of(self._host.args).micro_batches_per_update)
        if window == 1:
            return chunks
        ratios, pad = Ratios.of(self._host), self._host._tokenizer.pad_token_id
        out = []
        for start in range(0, len(chunks), window):
            rows = concat_rows(chunks[start : start + window], pad, ratios.padding)
            order = self._order(rows, rows_with_gradient(rows, ratios.multiply), window)
            size = len(order) // window
            out += [take_rows(rows, order[i * size : (i + 1) * size]) for i in range(window)]
        return out

    def _order(self, rows: dict[str, Any], active: Tensor, window: int) -> Tensor:
        """
        Return the order of the rows of one optimizer step, from which micro-batches are cut.

        Rows without a gradient go first: whole micro-batches of them then cost one dummy row.
        """
        lengths = rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)
        by_length = torch.argsort(torch.where(active, lengths, lengths - lengths.max() - 1), stable=True)
        if self.packed is None or "share" not in self.exact_savings:
            return by_length
        ids, mask = whole_rows(rows)
        known = FlatRows.of(ids, mask, rows["prompt_ids"].size(1)).lengths()
        counted = active.tolist() if "skip" in self.exact_savings else [True] * len(known)
        by_group = grouped_order(known, counted)
        size = len(known) // window

        packed, buckets = self.packed, self._count_of(size)

        def price(order: list[int]) -> float:
            cuts = (order[i * size : (i + 1) * size] for i in range(window))
            forwards = [[known[row] for row in cut if counted[row]] for cut in cuts]
            return sum(packed.cost(packed.choose(rows, buckets), rows, buckets) for rows in forwards if rows)

        return torch.tensor(by_group) if price(by_group) < price(by_length.tolist()) else by_length

    # --- skip: which rows have a gradient ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def skipping(self, batch: dict[str, Any]) -> Iterator[None]:
        """Forward no row of `batch` without a gradient, where that is on."""
        if "skip" in self.exact_savings:
            self._active = rows_with_gradient(batch, Ratios.of(self._host).multiply)
        try:
            yield
        finally:
            self._active = None

    # --- budgets: the rows of a forward in pieces -------------------------------------------------------------------

    def plan(self, batch: dict[str, Any], budget: int) -> Plan:
        """
        Return the forwards of a micro-batch that stay within a budget of tokens, before the ranks agree on how many.

        Args:
            batch (`dict`): The micro-batch.
            budget (`int`): The most tokens of one forward.
        """
        ids, mask = whole_rows(batch)
        with self.skipping(batch):
            return self._planner.plan(ids, mask, batch["prompt_ids"].size(1), self._active, budget)

    @contextlib.contextmanager
    def in_pieces(self, plan: Plan, unknown: Tensor | None) -> Iterator[None]:
        """
        Forward one piece in each call with a gradient.

        Args:
            plan ([`Plan`]): The pieces of the micro-batch in hand.
            unknown (`torch.Tensor`, *optional*): Stands for the log-probs of rows that are still to come.
        """
        self._pieces = PiecesInHand(plan, unknown)
        try:
            yield
        finally:
            self._pieces = None

    def _in_pieces(self, asked: _Asked, active: Tensor | None) -> Scores:
        """Forward the next piece of the loss; without a gradient, all pieces one after the other."""
        pieces = self._pieces if torch.is_grad_enabled() else None
        last = False
        if pieces is None:
            plan = self._planner.plan(asked.ids, asked.mask, asked.columns[0], active, self._score_budget)
            pieces = PiecesInHand(plan.in_forwards(*most_of_ranks([plan.forwards], self._host.accelerator)), None)
        while not last:
            first, rows, layout = not pieces.done, pieces.next, pieces.plan.layout
            logps, entropies, forwarded = self._piece(asked, layout, rows)
            real = forwarded if layout in ("pack", "share") else int(asked.mask[rows].sum())
            self._count(real, forwarded, asked.ids.numel() * first - forwarded)
            scores = pieces.joined(logps, entropies)
            last = torch.is_grad_enabled() or len(pieces.done) == len(pieces.plan.pieces)
        return _in_place(*scores, asked.of_completions)

    def _piece(self, asked: _Asked, layout: str, rows: list[int]) -> tuple[Tensor, Tensor | None, int]:
        """One forward of some rows, with the tokens that it forwarded."""
        index = torch.as_tensor(rows, device=asked.ids.device)
        if layout in ("pack", "share"):
            picked = FlatRows.of(asked.ids[index], asked.mask[index], asked.columns[0])
            packed = cast(PackedForward, self.packed)
            share = layout == "share"
            return packed(asked.model, picked, asked.columns[1], share=share, compute_entropy=asked.entropy)
        trims = layout == "trim"
        width = max(1, int(asked.mask[index].sum(1).max())) if trims else sum(asked.columns)
        bucket = Bucket(tuple(rows), width)
        return *self._bucket(asked, bucket), bucket.tokens

    def holding_attention(self) -> contextlib.AbstractContextManager[None]:
        """Keep the attention of a flat forward until its backward has run, to the end of this block."""
        return contextlib.nullcontext() if self.packed is None else self.packed.holding_attention()

    # --- trim (and skip): the forward itself ------------------------------------------------------------------------

    def __call__(
        self,
        stock: Forward,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> Scores:
        """
        Return what `stock` does with the other arguments, from fewer tokens where that changes nothing.

        Args:
            stock (`Callable`): The next `_get_per_token_logps_and_entropies`.
            input_ids, attention_mask (`torch.Tensor`): Shape `(rows, prompt columns + logits_to_keep)`.
        """
        rows = input_ids.size(0)
        active = self._active if self._active is not None and len(self._active) == rows else None
        plain = compute_aux_loss or any(value is not None for value in multimodal.values())
        layouts = {"trim", "pack", "share"} & set(self.exact_savings)
        budgeted = self._host.model.training and bool(self._pieces if torch.is_grad_enabled() else self._score_budget)
        if plain and budgeted:
            raise RefusedError(
                "loss_token_budget and score_token_budget cannot cut batches with images. Set both to 0, and lower "
                "per_device_train_batch_size."
            )
        if plain or not self._host.model.training or (not layouts and active is None and not budgeted):
            self._count(int(attention_mask.sum()), input_ids.numel(), 0)
            return stock(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        columns = (input_ids.size(1) - logits_to_keep, logits_to_keep)
        asked = _Asked(stock, model, input_ids, attention_mask, columns, compute_entropy)
        if budgeted:
            return self._in_pieces(asked, active)
        if self.packed is not None:
            flat = self._flat(asked, active, batch_size)
            if flat is not None:
                return flat
        plan = self._plan(attention_mask, columns, active, batch_size)
        order = [row for bucket in plan for row in bucket.rows]
        forwarded = sum(bucket.tokens for bucket in plan)
        self._count(int(attention_mask[order].sum()), forwarded, input_ids.numel() - forwarded)
        logps: list[Tensor] = []
        entropies: list[Tensor] = []
        for bucket in plan:
            part = self._bucket(asked, bucket)
            logps.append(part[0])
            if part[1] is not None:
                entropies.append(part[1])
        return _in_place(logps, entropies, order, asked.of_completions)

    def _flat(self, asked: _Asked, active: Tensor | None, max_rows: int | None) -> Scores | None:
        """Return the scores from flat rows, or `None` where padded rows are cheaper."""
        packed = cast(PackedForward, self.packed)
        known = FlatRows.of(asked.ids, asked.mask, asked.columns[0])
        if not all(known.prompts):
            return None  # nothing stands before the first token of a completion
        lengths = known.lengths()
        rows, count = self._rows_to_forward([row.tokens for row in lengths], active, max_rows)
        layout = packed.choose([lengths[row] for row in rows], count)
        if layout == "trim":
            return None
        order = grouped_order([lengths[row] for row in rows], [True] * len(rows))
        rows = [rows[i] for i in order]
        logps: list[Tensor] = []
        entropies: list[Tensor] = []
        forwarded = 0
        for part in split_evenly([lengths[row].tokens for row in rows], self._flat_parts(count, max_rows)):
            chosen = [rows[i] for i in part]
            picked = FlatRows([known.prompts[r] for r in chosen], [known.completions[r] for r in chosen])
            scores, entropy, tokens = packed(
                asked.model, picked, asked.columns[1], share=layout == "share", compute_entropy=asked.entropy
            )
            forwarded += tokens
            logps.append(scores)
            if entropy is not None:
                entropies.append(entropy)
        self._count(forwarded, forwarded, asked.ids.numel() - forwarded)
        return _in_place(logps, entropies, rows, asked.of_completions)

    def _flat_parts(self, count: int, max_rows: int | None) -> int:
        """How many forwards flat rows take: as many on every rank, and alone one, but for a limit of rows."""
        return count if self._host.accelerator.num_processes > 1 or max_rows is not None else 1

    def _count_of(self, rows: int, max_rows: int | None = None) -> int:
        """In how many buckets `trim` splits so many rows."""
        # From all rows, not from the active ones, whose number differs between ranks.
        return bucket_count(rows, self._buckets, max_rows, trims="trim" in self.exact_savings)

    def _rows_to_forward(
        self, lengths: list[int], active: Tensor | None, max_rows: int | None
    ) -> tuple[list[int], int]:
        """Return the rows that are forwarded, and in how many forwards padded rows are."""
        count = self._count_of(len(lengths), max_rows)
        rows = list(range(len(lengths))) if active is None else active.nonzero().flatten().tolist()
        # Every rank must run the same number of forwards (buffer broadcasts, parameter gathers), so with several ranks
        # a short list is topped up with the shortest rows that have no gradient; alone, one row keeps the graph whole.
        needed = min(len(lengths), count) if self._host.accelerator.num_processes > 1 else 1
        if len(rows) < needed:
            idle = sorted(set(range(len(lengths))) - set(rows), key=lambda row: (lengths[row], row))
            rows += idle[: needed - len(rows)]
        return rows, count

    def _plan(
        self, attention_mask: Tensor, columns: tuple[int, int], active: Tensor | None, max_rows: int | None
    ) -> list[Bucket]:
        """Return the forwards of a micro-batch; how many there are is the same on every rank."""
        lengths = attention_mask.sum(1).tolist()
        rows, count = self._rows_to_forward(lengths, active, max_rows)
        width = sum(columns)
        plan = plan_buckets([lengths[row] if "trim" in self.exact_savings else width for row in rows], count, max_rows)
        return [Bucket(tuple(rows[i] for i in bucket.rows), max(1, bucket.width)) for bucket in plan]

    def _bucket(self, asked: _Asked, bucket: Bucket) -> tuple[Tensor, Tensor | None]:
        """One forward, with its scores put where the micro-batch has their tokens."""
        before, after = asked.columns
        index = torch.as_tensor(bucket.rows, device=asked.ids.device)
        mask = asked.mask[index]
        if "trim" not in self.exact_savings:
            logps, entropies, _ = asked.stock(
                asked.model, asked.ids[index], mask, after, compute_entropy=asked.entropy
            )
            return logps, entropies
        prompts, completions = mask[:, :before].sum(1), mask[:, before:].sum(1)
        width = bucket.width
        if multiple := self._host.pad_to_multiple_of:
            width = -(-width // multiple) * multiple
        pad = self._host._tokenizer.pad_token_id
        batch = contiguous_rows(asked.ids, asked.mask, bucket.rows, width, pad)
        window = max(1, width - int(prompts.min()))
        logps, entropies, _ = asked.stock(
            asked.model, batch["input_ids"], batch["attention_mask"], window, compute_entropy=asked.entropy
        )
        offsets = prompts - (width - window)
        logps = scatter_completion(logps, offsets, completions, after)
        if entropies is not None:
            entropies = scatter_completion(entropies, offsets, completions, after)
        return logps, entropies


def _in_place(logps: list[Tensor], entropies: list[Tensor], order: list[int], mask: Tensor) -> Scores:
    """Return the scores of all rows of a micro-batch, from those of the rows in `order`."""
    rows = len(mask)
    full_logps = _unsort(torch.cat(logps), order, rows)
    if not entropies:
        return full_logps, None, None
    full = _unsort(torch.cat(entropies), order, rows)
    if len(order) < rows:
        # The entropy metric averages over all rows of the micro-batch: rows that were not forwarded take the mean of
        # those that were, so that the logged value is the entropy of the forwarded tokens.
        full[_missing(order, rows)] = (full.detach()[order] * mask[order]).sum() / mask[order].sum().clamp(min=1)
    return full_logps, full, None


def _missing(order: list[int], rows: int) -> list[int]:
    return sorted(set(range(rows)) - set(order))


def _unsort(values: Tensor, order: list[int], rows: int) -> Tensor:
    """Put rows back in place; rows that were not forwarded become zeros without a gradient."""
    return values.new_zeros(rows, values.size(1)).index_copy(0, torch.as_tensor(order, device=values.device), values)
