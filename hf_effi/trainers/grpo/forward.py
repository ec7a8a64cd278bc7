"""Savings that leave the gradient as it is: forward only real tokens, and only rows that have a gradient.

Both act at one seam, `_get_per_token_logps_and_entropies`: it returns the same `(rows, columns)` tensors as TRL's, so
the loss code downstream, with its eight normalisers, is TRL's own and needs no correction for any `loss_type`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ...functional.rollouts import (
    Bucket,
    GenerationLayout,
    concat_rows,
    contiguous_rows,
    plan_buckets,
    rows_with_gradient,
    scatter_completion,
    take_rows,
)
from .config import EXACT_SAVINGS
from .forward_probe import measured_reasons
from .rows import Ratios

logger = logging.get_logger(__name__)


class ExactSavingsMixin:
    """Overrides the log-prob forward, the loss call and the batch split of `GRPOTrainer` through `super()`."""

    #: names of the savings that are on
    exact_savings: tuple[str, ...] = ()
    _active_rows: Tensor | None = None
    #: why a saving is not used, by name
    _savings_left_out: dict[str, str] = {}

    def _init_exact_savings(self) -> None:
        wanted = self._settings.wanted_savings
        reasons = self._inexact_reasons()
        open_ones = tuple(name for name in (EXACT_SAVINGS if wanted is None else wanted) if name not in reasons)
        reasons |= measured_reasons(
            self.accelerator.unwrap_model(self.model), open_ones, self._longest_row(), self._tokenizer.pad_token_id
        )
        self._savings_left_out = reasons
        for name in wanted or ():
            if name in reasons:
                raise ValueError(
                    f"exact_savings={self._settings.exact_savings!r}: {name!r} is not exact here: {reasons[name]} Leave "
                    f"{name!r} out, or use exact_savings='auto'."
                )
        self.exact_savings = tuple(n for n in EXACT_SAVINGS if n not in reasons and (wanted is None or n in wanted))
        if wanted is None and reasons and self.accelerator.is_main_process:
            left_out = " ".join(f"{name}: {reason}" for name, reason in reasons.items())
            logger.info(
                f"exact_savings='auto' uses {', '.join(self.exact_savings) or 'nothing'}. Left out: {left_out}"
            )

    def _inexact_reasons(self) -> dict[str, str]:
        """Return why a saving would change the gradient, by name; exact ones are absent."""
        reasons: dict[str, str] = {}
        if self.aux_loss_enabled:
            text = "the router's load-balancing loss is computed from every forwarded token."
            return dict.fromkeys(EXACT_SAVINGS, text)
        if self._entropy_bonus_enabled:
            reasons["sort"] = "the entropy bonus is a mean over the tokens of each micro-batch."
            reasons["skip"] = "the entropy bonus (`entropy_coef`) has a gradient on every row."
        if self.top_entropy_quantile < 1.0:
            text = "`top_entropy_quantile` ranks the entropies of all rows of a micro-batch."
            reasons["sort"] = reasons["skip"] = text
        if self.beta != 0.0:
            reasons["skip"] = f"with beta={self.beta} a row with zero advantage still has a KL gradient. Set beta=0.0."
        if self.loss_type == "bnpo":
            reasons["sort"] = (
                "loss_type='bnpo' divides by the tokens of each micro-batch, so rows cannot change places."
            )
        elif GenerationLayout.of(self.args).micro_batches_per_update is None:
            reasons["sort"] = (
                f"steps_per_generation={self.args.steps_per_generation} and gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps} are not multiples, so optimizer steps straddle generations."
            )
        return reasons

    def _longest_row(self) -> int | None:
        """The most columns that a forward of this run can have, or `None` where prompts are as long as they come."""
        longest_prompt = getattr(self.args, "max_prompt_length", None)
        if longest_prompt is None or self.max_completion_length is None:
            return None
        return longest_prompt + self.max_completion_length

    # --- sort: rows change places only among the micro-batches of one optimizer step -------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        if "sort" in self.exact_savings:
            self._buffered_inputs = self._sort_windows(self._buffered_inputs)
        return self._buffered_inputs[GenerationLayout.of(self.args).micro_batch(self._step)]

    def _sort_windows(self, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        window = GenerationLayout.of(self.args).micro_batches_per_update
        if window == 1 or any(chunk.get("num_images") is not None for chunk in chunks):
            return chunks
        out = []
        for start in range(0, len(chunks), window):
            rows = concat_rows(chunks[start : start + window], self._tokenizer.pad_token_id, Ratios.of(self).padding)
            lengths = rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)
            # Rows without a gradient go first: whole micro-batches of them then cost one dummy row.
            active = rows_with_gradient(rows, Ratios.of(self).multiply)
            order = torch.argsort(torch.where(active, lengths, lengths - lengths.max() - 1), stable=True)
            size = len(order) // window
            out += [take_rows(rows, order[i * size : (i + 1) * size]) for i in range(window)]
        return out

    # --- skip: tell the forward which rows have a gradient ----------------------------------------------------------

    @contextlib.contextmanager
    def skipping(self, batch: dict[str, Any]) -> Iterator[None]:
        """Forward no row of `batch` without a gradient."""
        if "skip" in self.exact_savings:
            self._active_rows = rows_with_gradient(batch, Ratios.of(self).multiply)
        try:
            yield
        finally:
            self._active_rows = None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self.skipping(inputs) if self.model.training else contextlib.nullcontext():
            return super()._compute_loss(model, inputs)

    # --- trim (and skip): the forward itself ------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows = input_ids.size(0)
        active = self._active_rows if self._active_rows is not None and len(self._active_rows) == rows else None
        plain = compute_aux_loss or any(value is not None for value in multimodal.values())
        if plain or not self.model.training or ("trim" not in self.exact_savings and active is None):
            self._count_forward(int(attention_mask.sum()), input_ids.numel(), saved=0)
            return super()._get_per_token_logps_and_entropies(
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
        plan = self._plan_forward(attention_mask, columns, active, batch_size)
        order = [row for bucket in plan for row in bucket.rows]
        forwarded = sum(bucket.tokens for bucket in plan)
        self._count_forward(int(attention_mask[order].sum()), forwarded, saved=input_ids.numel() - forwarded)
        logps, entropies = [], []
        for bucket in plan:
            part = self._forward_bucket(model, input_ids, attention_mask, columns, bucket, compute_entropy)
            logps.append(part[0])
            entropies.append(part[1])
        full_logps = _unsort(torch.cat(logps), order, rows)
        if not compute_entropy:
            return full_logps, None, None
        full = _unsort(torch.cat(entropies), order, rows)
        if len(order) < rows:
            # The entropy metric averages over all rows of the micro-batch: rows that were not forwarded take the mean
            # of those that were, so that the logged value is the entropy of the forwarded tokens.
            mask = attention_mask[:, -logits_to_keep:]
            full[_missing(order, rows)] = (full.detach()[order] * mask[order]).sum() / mask[order].sum().clamp(min=1)
        return full_logps, full, None

    def _plan_forward(
        self, attention_mask: Tensor, columns: tuple[int, int], active: Tensor | None, max_rows: int | None
    ) -> list[Bucket]:
        lengths = attention_mask.sum(1).tolist()
        count = self._settings.forward_buckets or max(1, min(8, len(lengths) // 8))
        if "trim" not in self.exact_savings:
            count = 1
        if max_rows is not None:
            # From all rows, not from the active ones, whose number differs between ranks.
            count = max(count, -(-len(lengths) // max_rows))
        rows = list(range(len(lengths))) if active is None else active.nonzero().flatten().tolist()
        # Every rank must run the same number of forwards (buffer broadcasts, parameter gathers), so with several ranks
        # a short list is topped up with the shortest rows that have no gradient; alone, one row keeps the graph whole.
        needed = min(len(lengths), count) if self.accelerator.num_processes > 1 else 1
        if len(rows) < needed:
            idle = sorted(set(range(len(lengths))) - set(rows), key=lambda row: (lengths[row], row))
            rows += idle[: needed - len(rows)]
        width = sum(columns)
        plan = plan_buckets([lengths[row] if "trim" in self.exact_savings else width for row in rows], count, max_rows)
        return [Bucket(tuple(rows[i] for i in bucket.rows), max(1, bucket.width)) for bucket in plan]

    def _forward_bucket(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        columns: tuple[int, int],
        bucket: Bucket,
        compute_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        index = torch.as_tensor(bucket.rows, device=input_ids.device)
        if "trim" not in self.exact_savings:
            logps, entropies, _ = super()._get_per_token_logps_and_entropies(
                model, input_ids[index], attention_mask[index], columns[1], compute_entropy=compute_entropy
            )
            return logps, entropies
        mask = attention_mask[index]
        prompts, completions = mask[:, : columns[0]].sum(1), mask[:, columns[0] :].sum(1)
        width = bucket.width
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = contiguous_rows(input_ids, attention_mask, bucket.rows, width, self._tokenizer.pad_token_id)
        window = max(1, width - int(prompts.min()))
        logps, entropies, _ = super()._get_per_token_logps_and_entropies(
            model, batch["input_ids"], batch["attention_mask"], window, compute_entropy=compute_entropy
        )
        offsets = prompts - (width - window)
        logps = scatter_completion(logps, offsets, completions, columns[1])
        return logps, scatter_completion(entropies, offsets, completions, columns[1]) if compute_entropy else None

    def _count_forward(self, real: int, forwarded: int, saved: int) -> None:
        # The other ranks of a sequence-parallel group count their own rows.
        if self.model.training and self._works_on_own_batch:
            self._accounting.count_forward(real, forwarded, saved)


def _missing(order: list[int], rows: int) -> list[int]:
    return sorted(set(range(rows)) - set(order))


def _unsort(values: Tensor, order: list[int], rows: int) -> Tensor:
    """Put rows back in place; rows that were not forwarded become zeros without a gradient."""
    return values.new_zeros(rows, values.size(1)).index_copy(0, torch.as_tensor(order, device=values.device), values)
