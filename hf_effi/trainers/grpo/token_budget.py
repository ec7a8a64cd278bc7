"""Token budgets: the rows of a forward in pieces, each small enough, as many on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate import DistributedType
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from ...errors import RefusedError
from ...functional.forward_costs import ForwardCosts, RowLengths, grouped_order
from ...functional.rollouts import cut_further, cut_to_budget, plan_buckets
from .correction import OLD
from .forward_probe import measured_reasons
from .host import Host
from .packed import FlatRows, PackedForward
from .rows import LOSS_SCALE

logger = logging.get_logger(__name__)

#: counts tokens: a forward costs what runs through the linear layers
_TOKENS = ForwardCosts(per_pair=0.0, per_call=0.0)
#: rows as wide as the batch that they come in
UNTRIMMED = "untrimmed"


@dataclass(frozen=True)
class Plan:
    """
    The forwards of some rows.

    Args:
        layout (`str`): Of [`~hf_effi.trainers.grpo.packed.LAYOUTS`], or `"untrimmed"`.
        pieces (`list[list[int]]`): Row numbers of each forward.
        lengths (`list[int]`): Tokens of each row of the batch, those that are not forwarded included.
    """

    layout: str
    pieces: list[list[int]]
    lengths: list[int]

    @property
    def forwards(self) -> int:
        """How many forwards these are; one row at least keeps the graph whole."""
        return max(1, len(self.pieces))

    def in_forwards(self, count: int) -> Plan:
        """
        Return the same rows in `count` forwards, at least as many as there are.

        Pieces are halved; where each is one row, the shortest rows without a gradient are forwarded beside them. A
        batch has as many rows on every rank, so that there are enough of them.
        """
        pieces = cut_further(self.pieces, self.lengths, count)
        taken = {row for piece in pieces for row in piece}
        idle = sorted(set(range(len(self.lengths))) - taken, key=lambda row: (self.lengths[row], row))
        return replace(self, pieces=[*pieces, *([row] for row in idle[: max(0, count - len(pieces))])])


class ForwardPlanner:
    """
    Cuts the rows of a batch into forwards that stay within a budget of tokens as they are really forwarded.

    Args:
        host ([`Host`]): The trainer.
        savings (`tuple[str, ...]`): The exact savings that are on.
        packed ([`PackedForward`], *optional*): Knows the layouts, where flat rows are on.
        buckets_of (`Callable[[int], int]`): In how many length buckets so many rows are padded.
    """

    def __init__(
        self,
        host: Host,
        savings: tuple[str, ...],
        packed: PackedForward | None,
        buckets_of: Callable[[int], int],
    ) -> None:
        self._host, self._packed, self._buckets_of = host, packed, buckets_of
        self._padded = "trim" if "trim" in savings else UNTRIMMED
        self._told = False

    def plan(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_columns: int, active: Tensor | None, budget: int
    ) -> Plan:
        """
        Return the cheapest layout of the rows with a gradient, cut to a budget.

        Args:
            input_ids, attention_mask (`torch.Tensor`): Shape `(rows, columns)`.
            prompt_columns (`int`): Of these columns.
            active (`torch.Tensor`, *optional*): Boolean, shape `(rows,)`; all without it.
            budget (`int`): The most tokens of one forward of several rows.
        """
        known = self._lengths(input_ids, attention_mask, prompt_columns)
        rows = list(range(len(known))) if active is None else active.nonzero().flatten().tolist()
        layouts: tuple[str, ...] = (self._padded,)
        if self._packed is not None and all(row.prompt_tokens for row in known):
            layouts = self._packed.layouts
        width = input_ids.size(1)
        plans = {layout: self._pieces(layout, known, rows, width, budget) for layout in layouts}
        layout = min(plans, key=lambda name: self._price(name, plans[name], known)) if len(plans) > 1 else layouts[0]
        self._tell_of_long_rows(layout, plans[layout], known, width, budget)
        return Plan(layout, plans[layout], [row.tokens for row in known])

    def _lengths(self, input_ids: Tensor, attention_mask: Tensor, prompt_columns: int) -> list[RowLengths]:
        if self._packed is None:
            return [RowLengths(row, 0, total) for row, total in enumerate(attention_mask.sum(1).tolist())]
        number: dict[Any, int] = {}  # small numbers in place of whole prompts, which are compared often
        return [
            row._replace(prompt=number.setdefault(row.prompt, len(number)))
            for row in FlatRows.of(input_ids, attention_mask, prompt_columns).lengths()
        ]

    def _pieces(
        self, layout: str, known: Sequence[RowLengths], rows: list[int], width: int, budget: int
    ) -> list[list[int]]:
        def tokens(piece: list[int]) -> float:
            return self.tokens(layout, [known[row] for row in piece], width)

        if layout == UNTRIMMED:
            return cut_to_budget(rows, tokens, budget)
        if layout == "trim":
            buckets = plan_buckets([known[row].tokens for row in rows], self._buckets_of(len(known)))
            # The longest first: it says how wide a piece is, so that the others only fill it.
            found = [cut_to_budget([rows[i] for i in reversed(b.rows)], tokens, budget) for b in buckets]
            return [piece for pieces in found for piece in pieces]
        order = [rows[i] for i in grouped_order([known[row] for row in rows], [True] * len(rows))]
        return cut_to_budget(order, tokens, budget, [row.prompt for row in known] if layout == "share" else None)

    def tokens(self, layout: str, rows: Sequence[RowLengths], width: int) -> float:
        """Return the tokens of one forward of some rows, with its padding; a prompt that they share counts once."""
        if layout == UNTRIMMED:
            return float(len(rows) * width)
        if layout == "trim":
            longest, multiple = max(1, *(row.tokens for row in rows)), self._host.pad_to_multiple_of or 1
            return float(len(rows) * (-(-longest // multiple) * multiple))
        if layout == "share" and self._packed is not None and self._packed.may_share(rows):
            return _TOKENS.shared(rows)
        return _TOKENS.packed(rows)

    def _price(self, layout: str, pieces: list[list[int]], known: Sequence[RowLengths]) -> float:
        if self._packed is None:
            return 0.0
        return sum(self._packed.cost(layout, [known[row] for row in piece], 1) for piece in pieces)

    def _tell_of_long_rows(
        self, layout: str, pieces: list[list[int]], known: Sequence[RowLengths], width: int, budget: int
    ) -> None:
        if self._told:
            return
        alone = [self.tokens(layout, [known[piece[0]]], width) for piece in pieces if len(piece) == 1]
        if (longest := max(alone, default=0.0)) > budget:
            self._told = True
            logger.warning(
                f"A row is forwarded as {longest:.0f} tokens, which is over the token budget of {budget}: such rows "
                "are forwards of their own. Raise loss_token_budget or score_token_budget if there is memory for "
                "them, or lower max_completion_length."
            )


@dataclass
class PiecesInHand:
    """
    The scores of a batch whose rows are forwarded piece by piece, each in a call of the loss of its own.

    A call of the loss sees the rows of its piece with a gradient, those of the pieces before it as they were, and
    those of the pieces after it as in the old policy: no loss of TRL lets a row change the gradient of another.

    Args:
        plan ([`Plan`]): The pieces.
        unknown (`torch.Tensor`, *optional*): What stands for the log-probs of a row that is still to come; 0 without.
        done (`list`): Rows, log-probs and entropies of the pieces that were forwarded.
    """

    plan: Plan
    unknown: Tensor | None
    done: list[tuple[list[int], Tensor, Tensor | None]] = field(default_factory=list)

    @property
    def next(self) -> list[int]:
        """The rows to forward now."""
        return self.plan.pieces[len(self.done)]

    def joined(self, logps: Tensor, entropies: Tensor | None) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """
        Take the scores of the next piece, and return those of all pieces and the order of their rows.

        Args:
            logps, entropies (`torch.Tensor`): Shape `(rows of the piece, columns)`.
        """
        before, rows = self.done, self.next
        later = [row for piece in self.plan.pieces[len(before) + 1 :] for row in piece]
        blank = logps.new_zeros(len(later), logps.size(1))
        known = blank if self.unknown is None else self.unknown[later].to(logps)
        parts = [*(piece[1] for piece in before), logps, known]
        others = [] if entropies is None else [*(e for _, _, e in before if e is not None), entropies, blank]
        order = [*(row for piece, _, _ in before for row in piece), *rows, *later]
        self.done = [*before, (rows, logps.detach(), None if entropies is None else entropies.detach())]
        return parts, others, order


class Pieces(Protocol):
    """The part of the log-prob forward that a budget of the loss knows of."""

    def plan(self, batch: dict[str, Any], budget: int) -> Plan:
        """Return the forwards of a micro-batch."""

    def skipping(self, batch: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Forward no row of `batch` without a gradient."""

    def in_pieces(self, plan: Plan, unknown: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Forward one piece in each call with a gradient."""


class LossBudget:
    """
    Backpropagates a micro-batch piece by piece, so that no more than a budget of tokens is alive at once.

    TRL's loss is called once for each piece, on the whole micro-batch: its normalisers see all rows, and the gradients
    of the pieces add up to that of the whole. What a call but the last logs is dropped; the last one has the
    log-probs of all rows.

    Args:
        host ([`Host`]): The trainer.
        forward ([`Pieces`]): Computes log-probs.
        budget (`int`): The most tokens of a forward; 0 is off.
    """

    def __init__(self, host: Host, forward: Pieces, budget: int = 0) -> None:
        self._host, self._forward, self._budget = host, forward, budget
        self._chunks: Any = None
        self._plans: list[Plan] = []
        self._plan: Plan | None = None

    def begin(self, chunks: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
        """
        Return the micro-batch to train on, planned: all of a generation at once, when the first is trained on.

        Every rank comes here at each micro-step. One collective for each generation where the budget is on.

        Args:
            chunks (`Sequence[dict]`): What TRL has buffered.
            index (`int`): Which of them is trained on now.
        """
        if not self._budget:
            return chunks[index]
        if chunks is not self._chunks:
            plans = [self._forward.plan(chunk, self._budget) for chunk in chunks]
            counts = most_of_ranks([plan.forwards for plan in plans], self._host.accelerator)
            self._plans = [plan.in_forwards(count) for plan, count in zip(plans, counts, strict=True)]
            self._chunks = chunks
        self._plan = self._plans[index]
        return chunks[index]

    def loss(self, stock: Callable[[Any, dict[str, Any]], Tensor], model: Any, inputs: dict[str, Any]) -> Tensor:
        """
        Return the loss of a micro-batch, with the gradient of its last piece; those of the others are there already.

        Args:
            stock (`Callable`): The next `_compute_loss`.
            model (`nn.Module`): As the trainer wrapped it.
            inputs (`dict`): The micro-batch.
        """

        def scaled() -> Tensor:
            # With `prune_normalizer="original"`: the loss and not the advantages, so that the KL term is scaled too.
            loss, scale = stock(model, inputs), inputs.get(LOSS_SCALE)
            return loss if scale is None else loss * scale

        if not self._host.model.training:
            return scaled()
        with self._forward.skipping(inputs):
            if self._plan is None:
                return scaled()
            with self._forward.in_pieces(self._plan, inputs.get(OLD)):
                for _ in self._plan.pieces[:-1]:
                    with self._before_the_last(model):
                        self._backward(scaled())
                return scaled()

    def _backward(self, loss: Tensor) -> None:
        accelerator = self._host.accelerator
        # As the Trainer calls it. TRL's loss is divided by the accumulation steps already.
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))

    @contextlib.contextmanager
    def _before_the_last(self, model: Any) -> Iterator[None]:
        """Log nothing, and begin no update: DeepSpeed makes it at the end of a backward, DDP sums gradients there."""
        log, accelerator = self._host._metrics["train"], self._host.accelerator
        before = {name: len(values) for name, values in log.items()}
        ends_update, accelerator.sync_gradients = accelerator.sync_gradients, False
        # Without synchronization FSDP would keep whole gradients, so that it reduces those of each piece.
        waits = isinstance(model, DistributedDataParallel)
        try:
            with accelerator.no_sync(model) if waits else contextlib.nullcontext():
                yield
        finally:
            accelerator.sync_gradients = ends_update
            for name in list(log):
                del log[name][before.get(name, 0) :]
                if name not in before:
                    del log[name]


def most_of_ranks(counts: Sequence[int], accelerator: Any) -> list[int]:
    """
    Return the largest of each count over the ranks. One collective where there are several; all ranks come here.

    Args:
        counts (`Sequence[int]`): Of this rank, as many on every rank.
        accelerator (`Accelerator`): Whose ranks these are.
    """
    if accelerator.num_processes == 1:
        return list(counts)
    mine = torch.tensor([counts], dtype=torch.int64, device=accelerator.device)
    most: list[int] = accelerator.gather(mine).amax(0).tolist()
    return most


def check_budgets(trainer: Any, stock: type, savings: tuple[str, ...], loss: int, score: int) -> None:
    """
    Refuse a budget where rows that are forwarded apart would have another gradient.

    Args:
        trainer ([`EffiGRPOTrainer`]): With its model loaded; every rank asks.
        stock (`type`): The class whose loss is known.
        savings (`tuple[str, ...]`): The exact savings that are on.
        loss, score (`int`): The budgets; 0 is off.

    Raises:
        RefusedError: what makes rows depend on each other, and the fix.
    """
    if not loss and not score:
        return
    name, value = ("loss_token_budget", loss) if loss else ("score_token_budget", score)
    if (size := getattr(trainer.args, "sequence_parallel_size", 1)) > 1:
        raise RefusedError(
            f"{name}={value} does not work with sequence_parallel_size={size}, which cuts rows and not micro-batches. "
            "Set one of the two only."
        )
    if not savings:  # those that are on have asked
        model = trainer.accelerator.unwrap_model(trainer.model)
        if reason := measured_reasons(model, ("skip",), None, trainer._tokenizer.pad_token_id).get("skip"):
            raise RefusedError(f"{name}={value} forwards rows apart, which is not exact here: {reason} Set it to 0.")
    if not loss:
        return
    kind = type(trainer)
    own = next((n for n in ("_compute_loss", "compute_loss") if getattr(kind, n) is not getattr(stock, n)), "")
    found = {
        "the router's load-balancing loss": (trainer.aux_loss_enabled, "Set router_aux_loss_coef=0.0"),
        "top_entropy_quantile": (trainer.top_entropy_quantile < 1.0, "Set it to 1.0"),
        "use_adaptive_entropy": (trainer.use_adaptive_entropy, "Set it to False"),
        f"optim={trainer.args.optim}": ("lomo" in str(trainer.args.optim), "Choose another optimizer"),
        f"{kind.__name__}.{own}": (own, "Put what it does into _get_per_token_logps_and_entropies"),
    }
    for what, (is_so, fix) in found.items():
        if is_so:
            raise RefusedError(
                f"loss_token_budget={loss} calls the loss and its backward once for each piece of a micro-batch, "
                f"which does not work with {what}. {fix}, or set loss_token_budget=0."
            )
