"""The rows of an optimizer step, dealt over the ranks by what they cost."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch

from ...functional import metrics
from ...functional.forward_costs import RowLengths
from ...functional.rollouts import GenerationLayout, deal_rows, rows_with_gradient
from .accounting import StepAccounting
from .exchange import hands_of_ranks, move_rows
from .host import Host
from .packed import FlatRows, PackedForward
from .rows import LOSS_SCALE, ROW_KEYS, Ratios, Rows, whole_rows

#: rows move where the slowest rank is at least this much slower than with rows that are dealt by cost
_WORTH = 1.02


class _Facts(NamedTuple):
    """What all ranks know of one row: its lengths, and whether it is forwarded."""

    lengths: RowLengths
    forwarded: bool


class Forwards(Protocol):
    """The part of the log-prob forward that a dealer knows of."""

    exact_savings: tuple[str, ...]
    packed: PackedForward | None


class RowDealer:
    """
    Moves rows between ranks, within an optimizer step, so that no rank waits for another one.

    Each rank keeps as many rows as it has. Where prompts are shared, whole groups move.

    Args:
        host ([`Host`]): The trainer.
        forward ([`Forwards`]): Whose savings say that rows may change places, and what rows cost.
        accounting ([`StepAccounting`]): Counts the rows that came from other ranks.
    """

    def __init__(self, host: Host, forward: Forwards, accounting: StepAccounting) -> None:
        self._host, self._savings, self._packed = host, forward.exact_savings, forward.packed
        self._accounting = accounting

    def dealt(self, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Return the micro-batches of this rank. One collective for each generation, and two more where rows move.

        Args:
            chunks (`list[dict]`): Those of a generation, as TRL buffers them.
        """
        accelerator = self._host.accelerator
        world = accelerator.num_processes
        if world == 1 or "sort" not in self._savings:
            return chunks
        # Whole: elsewhere `sort` is not exact, and off.
        window = cast(int, GenerationLayout.of(self._host.args).micro_batches_per_update)
        known = self._facts(chunks)
        if known is None:
            return chunks
        size = len(known[0]) // len(chunks)
        owners: list[tuple[int, int]] = []
        hands: list[list[int]] = [[] for _ in range(world)]
        for begin in range(0, len(chunks) * size, window * size):
            places = range(begin, begin + window * size)
            mine = [(r, place) for r in range(world) for place in places]
            facts = [known[r][place] for r, place in mine]
            for r, hand in enumerate(self._hands(facts, world)):
                hands[r] += [len(owners) + row for row in hand]
            owners += mine
        if all(owners[row][0] == r for r, hand in enumerate(hands) for row in hand):
            return chunks
        pad, ratios = self._host._tokenizer.pad_token_id, Ratios.of(self._host)

        def join(parts: Sequence[Rows]) -> Rows:
            return Rows.joined(parts, pad, ratios.padding)

        rows, moved = move_rows(join([Rows(chunk) for chunk in chunks]), owners, hands, accelerator, join)
        self._accounting.counts[metrics.ROWS_MOVED] += moved
        return [rows.take(range(i * size, (i + 1) * size)).batch for i in range(len(chunks))]

    def _facts(self, chunks: list[dict[str, Any]]) -> list[list[_Facts]] | None:
        """Return what all ranks know of each other's rows, or `None` where one has rows that cannot move."""
        accelerator = self._host.accelerator
        movable = all(set(chunk) <= ROW_KEYS | {LOSS_SCALE} for chunk in chunks)
        mine = []
        for chunk in chunks:
            ids, mask = whole_rows(chunk)
            active = rows_with_gradient(chunk, Ratios.of(self._host).multiply).tolist()
            lengths = FlatRows.of(ids, mask, chunk["prompt_ids"].size(1)).lengths()
            for row, live in zip(lengths, active, strict=True):
                # The hash of a tuple of integers is the same in every process.
                counted = live or "skip" not in self._savings
                mine.append([hash(row.prompt), row.prompt_tokens, row.completion_tokens, counted, movable])
        gathered = accelerator.gather(torch.tensor([mine], dtype=torch.int64, device=accelerator.device)).tolist()
        if not all(row[-1] for rank in gathered for row in rank):
            return None
        return [[_Facts(RowLengths(*row[:3]), bool(row[3])) for row in rank] for rank in gathered]

    def _hands(self, facts: list[_Facts], world: int) -> list[list[int]]:
        """Return the rows of each rank: as they are, or dealt by cost where that is worth moving them."""
        size = len(facts) // world
        stay = [list(range(r * size, (r + 1) * size)) for r in range(world)]
        whole = self._shares(facts)
        costs = [self._row_cost(f, shared=whole) for f in facts]
        if whole:
            groups: list[Hashable] = [(f.lengths.prompt,) if f.forwarded else i for i, f in enumerate(facts)]
            dealt = deal_rows(costs, world, groups, [float(f.lengths.prompt_tokens * f.forwarded) for f in facts])
        else:
            dealt = deal_rows(costs, world)
        now, then = (max(self._cost(facts, hand) for hand in hands) for hands in (stay, dealt))
        if now <= _WORTH * then:
            return stay
        return hands_of_ranks(dealt, [i // size for i in range(len(facts))])

    def _shares(self, facts: list[_Facts]) -> bool:
        """Whether sharing prompts is the cheapest layout of all these rows."""
        if self._packed is None or "share" not in self._savings:
            return False
        rows = [f.lengths for f in facts if f.forwarded]
        return self._layout(rows) == "share"

    def _layout(self, rows: list[RowLengths]) -> str:
        packed = cast(PackedForward, self._packed)
        return min(packed.layouts, key=lambda layout: packed.cost(layout, rows, max(1, len(rows) // 8)))

    def _row_cost(self, fact: _Facts, shared: bool) -> float:
        if not fact.forwarded:
            return 0.0
        row = fact.lengths
        if shared:
            return float(row.completion_tokens + 1)
        return float(row.tokens) if self._packed is None else self._packed.cost("pack", [row], 1)

    def _cost(self, facts: list[_Facts], hand: list[int]) -> float:
        rows = [facts[i].lengths for i in hand if facts[i].forwarded]
        if self._packed is None:
            return float(sum(row.tokens for row in rows))
        return min(self._packed.cost(layout, rows, max(1, len(rows) // 8)) for layout in self._packed.layouts)
