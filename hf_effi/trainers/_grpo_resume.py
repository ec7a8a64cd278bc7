"""Exact resume for GRPO: repairs of three defects of TRL 1.16, the intended differences from stock.

1. TRL's `RepeatSampler` has no epoch: a run resumed in epoch k replays epoch 0's prompts.
2. `_step` restarts at 0, so generation happens at other steps than in the uninterrupted run.
3. The buffered generation is lost, so a checkpoint inside a generation block regenerates it with newer weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

logger = logging.get_logger(__name__)

STATE_FILE = "effi_state.json"


class EpochRepeatSampler(RepeatSampler):
    """
    TRL's `RepeatSampler` whose order is a pure function of `(seed, pass)`.

    Pass `k` draws the permutation that the stock sampler draws on its `k`-th iteration, so an uninterrupted run sees
    the stock order and a resumed run goes on with the pass it was in.
    """

    #: Index of the next pass over the dataset; set on resume.
    next_pass = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(self.next_pass):
                torch.randperm(self.num_samples, generator=self.generator)
        self.next_pass += 1
        yield from super().__iter__()


class GRPOResumeMixin:
    """Overrides sampler, save and load of `GRPOTrainer` through `super()`."""

    _step_after_update = 0
    _train_sampler: EpochRepeatSampler | None = None

    def get_train_dataloader(self) -> Any:
        if not self._oversample_loader:
            return super().get_train_dataloader()
        # Dynamic allocation: a batch of the loader holds R times more prompts, an epoch R times fewer batches.
        saved = self._train_batch_size
        self._train_batch_size = saved * self._oversample_loader
        try:
            return super().get_train_dataloader()
        finally:
            self._train_batch_size = saved

    @property
    def _oversample_loader(self) -> int:
        """R under dynamic completion allocation, else 0."""
        factor = getattr(self.args, "prune_oversample", 1)
        return factor if factor > 1 else 0

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        stock = super()._get_train_sampler(dataset)
        if type(stock) is not RepeatSampler:
            return stock
        self._train_sampler = EpochRepeatSampler(
            data_source=stock.data_source,
            mini_repeat_count=stock.mini_repeat_count,
            batch_size=stock.batch_size * (self._oversample_loader or 1),
            repeat_count=stock.repeat_count,
            shuffle=stock.shuffle,
            seed=stock.seed,
        )
        if len(self._train_sampler) == 0:
            raise ValueError(
                f"the training dataset has {len(stock.data_source)} prompts, but one generation batch needs "
                f"{self._train_sampler.batch_size} (generation_batch_size={self.args.generation_batch_size} / "
                f"num_generations={self.num_generations}"
                + (f" x {self._oversample_loader} for prune_allocation" if self._oversample_loader else "")
                + "). Add prompts, or lower per_device_train_batch_size, steps_per_generation or prune_rate."
            )
        return self._train_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        block = self.args.steps_per_generation * self.num_iterations
        inside_block = self._buffered_inputs is not None and self._step % block != 0
        if inside_block:
            os.makedirs(folder, exist_ok=True)
            torch.save(self._buffered_inputs, os.path.join(folder, self._buffer_name()))
        if not self.args.should_save:
            return
        state = {
            "step": self._step,
            "inside_block": inside_block,
            "world_size": self.accelerator.num_processes,
            "generations_done": self._generations_done,
            "prompts": self._refill_prompts.state_dict() if self._refill_prompts is not None else None,
        }
        with open(os.path.join(folder, STATE_FILE), "w") as file:
            json.dump(state, file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self._train_sampler is not None and self.state.epoch is not None:
            # The loader skips the finished batches of this pass itself. The epsilon absorbs the division that made it.
            self._train_sampler.next_pass = int(self.state.epoch + 1e-6)
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.exists(path):
            return  # a checkpoint of the stock trainer
        with open(path) as file:
            state = json.load(file)
        self._step = self._step_after_update = state["step"]
        self._generations_done = state["generations_done"]
        if state["prompts"] is not None:
            if self._refill_prompts is None:
                self._select_rows(0)
            self._refill_prompts.load_state_dict(state["prompts"])
        if state["inside_block"]:
            self._load_buffer(checkpoint, state["world_size"])

    def _load_buffer(self, checkpoint: str, world_size: int) -> None:
        path = os.path.join(checkpoint, self._buffer_name())
        if world_size != self.accelerator.num_processes or not os.path.exists(path):
            logger.warning(
                f"{checkpoint} was saved by {world_size} processes in the middle of a generation; with "
                f"{self.accelerator.num_processes} the rest of that generation is made anew."
            )
            return
        chunks = torch.load(path, map_location="cpu", weights_only=True)
        device = self.accelerator.device
        self._buffered_inputs = [
            {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in chunk.items()}
            for chunk in chunks
        ]

    def _buffer_name(self) -> str:
        return f"effi_rollouts_{self.accelerator.process_index}.pt"
