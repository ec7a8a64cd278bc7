"""Log-probs of the rows that stay, computed once it is known which they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ...functional.rollouts import rows_with_gradient
from .correction import OLD, LateCorrection
from .deferred import DeferredLogProbs
from .host import Host
from .rows import Ratios, Rows

#: TRL's name of the log-probs of the reference; what else is put off is the policy's.
REFERENCE = "ref_per_token_logps"

#: TRL's `_generate_and_score_completions`
Generate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Skipping(Protocol):
    """The part of the log-prob forward that a pipeline knows of."""

    exact_savings: tuple[str, ...]

    def skipping(self, batch: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Forward no row of `batch` without a gradient."""


class LateLogProbs:
    """
    Puts the log-prob forwards of a generation off, where rows that are dropped would pay for them.

    Args:
        host ([`Host`]): The trainer that generates.
        forward ([`Skipping`]): Computes log-probs, through the host.
    """

    def __init__(self, host: Host, forward: Skipping) -> None:
        self._host, self._forward = host, forward
        self._deferred: DeferredLogProbs | None = None
        self._correction = LateCorrection(host)

    def generated(self, stock: Generate, inputs: list[dict[str, Any]], selects: bool) -> Rows:
        """
        Return the rows of one call of TRL's generation.

        Args:
            stock (`Callable`): The next `_generate_and_score_completions`.
            selects (`bool`): Whether rows will be chosen.
        """
        # Who chooses rows has to know which ratios are 0.
        defers = not self._correction.decides if selects else "skip" in self._forward.exact_savings
        # Images are not among the rows that can wait.
        defers = defers and not self._host._is_vlm
        deferred = self._deferred = DeferredLogProbs() if defers else None
        late = deferred is not None and self._correction.on
        try:
            with self._correction.put_off() if late else contextlib.nullcontext():
                batch = stock(inputs)
        finally:
            self._deferred = None
        names = deferred.entries_of(batch) if deferred is not None else ()
        return Rows(batch, tuple(dict.fromkeys((*names, OLD))) if late else names)

    def put_off(self, attention_mask: Tensor, columns: int) -> Tensor | None:
        """
        Return what stands for the log-probs of a forward that can wait, or `None` for one that cannot.

        Args:
            attention_mask (`torch.Tensor`): Of the forward, shape `(rows, any)`.
            columns (`int`): Completion tokens of a row.
        """
        return None if self._deferred is None else self._deferred.put_off(attention_mask, columns)

    def put_no_more_off(self) -> None:
        """From the rewards on: TRL has asked for its log-probs before, so that who asks now computes with them."""
        self._deferred = None

    def computed(self, rows: Rows) -> int:
        """Compute the log-probs that were put off, for the rows that stayed; return how many have a gradient."""
        forwarded = rows_with_gradient(rows.batch, Ratios.of(self._host).multiply)
        for name in rows.put_off:
            rows.batch[name] = self.log_probs_of(rows.batch, reference=name == REFERENCE)
        if OLD in rows.put_off and self._correction.on:
            skips = "skip" in self._forward.exact_savings
            known = forwarded if skips else torch.ones_like(forwarded)
            self._correction.make(rows.batch, known, self._host._metrics["train"])
        return int(rows_with_gradient(rows.batch, Ratios.of(self._host).multiply).sum())

    def log_probs_of(self, batch: dict[str, Any], reference: bool) -> Tensor:
        """Return the log-probs of a batch by the policy, or by the reference, without a gradient."""
        host = self._host
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        policy: Any = host.model  # wrapped or not, as TRL hands it over itself
        checkpointing = disable_gradient_checkpointing(policy, host.args.gradient_checkpointing_kwargs)
        skipping = self._forward.skipping(batch)
        with skipping, torch.no_grad(), checkpointing, self._scoring_model(reference) as model:
            # Through the trainer, where it is timed, trimmed and skipped, on every rank alike.
            logps, _, _ = self._host._get_per_token_logps_and_entropies(
                model,
                ids,
                mask,
                batch["completion_ids"].size(1),
                batch_size=host.args.per_device_train_batch_size,
            )
        return logps

    @contextlib.contextmanager
    def _scoring_model(self, reference: bool) -> Iterator[Any]:
        """The policy, or the reference that TRL would use: a second model, the base model, or the "ref" adapter."""
        if not reference or self._host.ref_model is not None:
            yield self._host.ref_model if reference else self._host.model
            return
        unwrapped = self._host.accelerator.unwrap_model(self._host.model)
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            yield self._host.model
