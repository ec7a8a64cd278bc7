"""`ChunkFlowMixin`: a Trainer whose micro-batches run in chunks of tokens, with gradients as if they did not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RefusedError
from ...functional.sequence import chunk_schedule
from ...memory.chunk_flow import ChunkFlow, ChunkGroup, make_groups
from ...memory.chunk_probe import Layout, cache_name_of, chunks_are_exact, layout_of
from ...patching import agreed, draws_random_numbers, longest_exact_call, named_draws


class ChunkFlowMixin:
    """
    Give a Trainer or SFTTrainer a constructor argument `chunk_flow`.

    A micro-batch is cut into chunks of `chunk_size` tokens: short sequences share one, long ones are cut into chunks
    that see each other's keys and values. Each chunk is one call of the model and one backward, with at most
    `max_live_chunks` of a sequence alive; losses and gradients are those of the whole micro-batch, with gradient
    accumulation and under DDP, where gradients are exchanged once. Evaluation is untouched. Nothing is stored for a
    resume.

    Args:
        chunk_flow ([`ChunkFlow`], *optional*): Without it nothing changes.

    Raises:
        RefusedError: gradient checkpointing (chunks are their own), dropout, DataParallel, FSDP, DeepSpeed, a loss
            outside of the model, layers without keys and values, or a batch that cannot be cut exactly.
        ValueError: `chunk_flow` is no [`~hf_effi.memory.ChunkFlow`].

    Example:
    ```python
    class MyTrainer(ChunkFlowMixin, Trainer):
        pass


    MyTrainer(model, args, train_dataset=rows, chunk_flow=ChunkFlow(chunk_size=8192, max_live_chunks=4)).train()
    ```
    """

    chunk_flow: ChunkFlow | None = None
    #: the layouts of batches that were asked about, and the tokens up to which positions do not depend on the length
    _asked: Mapping[str, Any] = MappingProxyType({})
    _longest_exact: int | None = None
    #: the chunk that is at work, and its loss where it was run and kept before
    _now: tuple[ChunkGroup, int] | None = None
    _loss_now: Tensor | None = None

    def __init__(self, *args: Any, chunk_flow: ChunkFlow | None = None, **kwargs: Any) -> None:
        if chunk_flow is not None and not isinstance(chunk_flow, ChunkFlow):
            raise ValueError(f"chunk_flow={chunk_flow!r} must be a ChunkFlow(chunk_size=...).")
        self.chunk_flow = chunk_flow
        super().__init__(*args, **kwargs)
        if chunk_flow is not None:
            self._check_chunks()

    def _check_chunks(self) -> None:
        args = self.args
        reasons = {
            "gradient checkpointing empties the cache. Switch it off: chunks are run again by themselves": (
                getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False)
            ),
            "DataParallel splits the rows itself. Use one process per GPU": args.n_gpu > 1,
            "FSDP and DeepSpeed need the same number of calls on every rank. Use DDP": (
                self.is_fsdp_enabled or self.is_deepspeed_enabled
            ),
            "the loss has to be the model's: leave out label_smoothing_factor and compute_loss_func": (
                self.label_smoother is not None or self.compute_loss_func is not None
            ),
            # Of two caches in one call, the model ignores one.
            "PEFT's prompt learning puts tokens of its own in front of every call": (
                getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False)
            ),
            "the model takes no num_items_in_batch, so that its loss is a mean over each call": (
                not self.model_accepts_loss_kwargs
            ),
        }
        found = [reason for reason, true in reasons.items() if true]
        if found:
            raise RefusedError(f"chunk_flow is not possible here: {'; '.join(found)}.")
        self._ask_model()

    def _ask_model(self) -> None:
        """Measure whether chunks give this model's loss and gradients, and up to which length of a row."""
        drawn = agreed(draws_random_numbers(self.model))
        if not drawn.equal:
            raise RefusedError(
                f"chunk_flow is not possible here: random numbers would be others when a chunk is run again: {drawn}. "
                f"Set dropout and noise to 0; settings of that name: {named_draws(self.model)}."
            )
        self._asked = {}
        self._check_layout("padded")
        self._longest_exact = longest_exact_call(self.model)

    def _check_layout(self, layout: Layout) -> None:
        """
        Refuse rows that are laid out in a way in which this model's chunks are not its rows; asked once for each way.
        """
        found = self._asked.get(layout)
        if found is None:
            found = self._asked[layout] = chunks_are_exact(self.model, layout)
        if not found.equal:
            config = self.model.config.get_text_config()
            router = " output_router_logits=True takes a mean over the tokens of a call."
            raise RefusedError(
                f"chunk_flow is not possible here: {type(self.model).__name__} does not give the same for rows that "
                f"are {layout} and for their chunks: "
                f"{found}.{router if getattr(config, 'output_router_logits', False) else ''}"
            )

    def _check_batch(self, batch: dict[str, Any], groups: Sequence[ChunkGroup]) -> None:
        self._check_layout(layout_of(batch))
        longest = max(group.bounds[-1][1] for group in groups if len(group) > 1 or group is groups[0])
        if self._longest_exact is not None and longest > self._longest_exact:
            raise RefusedError(
                f"A row of {longest} tokens: this model's positions depend on the length of a call from "
                f"{self._longest_exact + 1} tokens on (dynamic or long RoPE), and a chunk is shorter than its row. "
                "Leave longer rows out, or train them without chunk_flow."
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.chunk_flow is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if num_items_in_batch is None:
            raise RefusedError("The Trainer gave no num_items_in_batch, so that means over chunks would not add up.")
        model.train()
        inputs = self._prepare_inputs(inputs)
        groups = make_groups(inputs, self.chunk_flow.chunk_size, cache_name_of(self.model))
        self._check_batch(inputs, groups)
        count = sum(len(group) for group in groups)
        if self.accelerator.num_processes > 1:
            # The forward of DDP, and TRL's metrics, communicate: every rank makes as many calls.
            most = torch.tensor([count], device=self.accelerator.device)
            most = int(self.accelerator.gather(most).max())
            groups = [*(_idle(groups[0]) for _ in range(most - count)), *groups]
            count = most
        total = torch.zeros((), device=self.accelerator.device)
        for group in groups:
            count -= len(group)
            total = total + self._train_group(model, group, num_items_in_batch, last=not count)
        return total

    def _train_group(self, model: nn.Module, group: ChunkGroup, num_items: Any, last: bool) -> Tensor:
        live, total = self.chunk_flow.max_live_chunks, 0.0
        if last and self.accelerator.num_processes > 1:
            # DDP exchanges gradients in the backward right behind the forward that it prepared for it.
            live = max(1, min(live, len(group) - 1))
        kept: dict[int, Tensor] = {}
        for action, index in chunk_schedule(len(group), live):
            if action == "prefix":
                self._run_prefix(group, index)
                continue
            waits = not (last and action == "backward" and index == 0)
            with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                self._now = group, index
                try:
                    if action == "keep":
                        kept[index] = self._keep(model, group, index, num_items)
                    else:
                        self._loss_now = kept.pop(index, None)
                        inputs = group.inputs(index) if self._loss_now is None else group.tokens
                        total = total + super().training_step(model, inputs, num_items)
                        group.went_back(index)
                finally:
                    self._now = None
        return total

    def _run_prefix(self, group: ChunkGroup, index: int) -> None:
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = group.inputs(index)
            del inputs["labels"], inputs["shift_labels"]
            self.model(**inputs, logits_to_keep=1)
        group.ran(index, inputs[group.cache_name])

    def _keep(self, model: nn.Module, group: ChunkGroup, index: int, num_items: Any) -> Tensor:
        self._loss_now = None
        with self.compute_loss_context_manager():
            return self._chunk_loss(model, group.inputs(index), num_items)

    def _chunk_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        group, index = self._now
        cache = inputs.get(group.cache_name)
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items)
        group.ran(index, cache)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._now is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        group, index = self._now
        loss = self._loss_now
        if loss is None:
            loss = self._chunk_loss(model, inputs, kwargs["num_items_in_batch"])
        return group.with_gradients(index, loss)


def _idle(group: ChunkGroup) -> ChunkGroup:
    """Return a chunk of one token without a label."""
    tokens = {name: value[:, :1] for name, value in group.tokens.items()}
    tokens["shift_labels"] = torch.full_like(tokens["shift_labels"], -100)
    return ChunkGroup(tokens, [(0, 1)])
