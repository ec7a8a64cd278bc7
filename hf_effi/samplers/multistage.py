"""
Multistage filtering: first everything, then what has a high loss, then what a cheap predictor expects to have one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional.data import BernoulliBayes, check_count, check_number, seeded
from .learned import Measure, MeasuringSampler

#: Rows that the predictor guesses before it learns them: the batch of the released code.
_LEARNED_AT_ONCE = 8


class MultistageSampler(MeasuringSampler):
    """
    Train on the rows of a stream whose loss is above a threshold, and learn to skip the others unseen.

    The dataset is one shuffled stream, pass after pass; an epoch of the Trainer is one round of it, of `num_samples`
    samples.

    - Stage 0, `warmup_rounds` rounds: every row of the stream. No row is measured.
    - Stage 1: the next `window` rows are forwarded. The mean loss of the first `threshold_rows` of them is the
      threshold, for good; rows above it queue up for training, and naive Bayes on their tokens learns which ones they
      are.
    - Stage 2, once the mean log loss of the predictor on the last `switch_rows` rows, before it learned them, is at
      most `switch_loss`: only rows that it calls hard are forwarded, filtered and learned.

    Hard rows that do not fit into a round wait for the next. Where there are too few, the hardest of the other
    measured rows fill the round, then repetitions.

    Args:
        tokens (`Sequence[Sequence[int]]`): Tokens of each row, for the predictor.
        measure (`Callable`): Loss of each row, see [`MeasuringSampler`] and [`RowLoss`].
        window (`int`): Rows of the stream that a filtered round goes through, in `[1, num_rows]`.
        num_samples (`int`): Samples of a round, in `[1, window]`: the updates, and the schedule, follow from it.
        warmup_rounds (`int`, *optional*, defaults to 1): Rounds of stage 0, at least 0.
        threshold_rows (`int`, *optional*, defaults to 128): Losses averaged for the threshold.
        switch_loss (`float`, *optional*, defaults to 0.5): In nats, at least 0; a coin has 0.69. 0: never stage 2.
        switch_rows (`int`, *optional*, defaults to 64): Rows over which the predictor is judged.
        seed (`int`, *optional*, defaults to 0): Seed of the stream and of the orders.

    Attributes:
        history (`list[dict]`): Of each round: `stage`, `candidates`, `forwarded`, `hard`, `waiting`, `filled`.

    Raises:
        ValueError: an argument out of range, a negative token, NaN losses.

    Example:
    ```python
    >>> tokens = [[0], [1], [0], [1]]
    >>> sampler = MultistageSampler(tokens, lambda model, rows: [], window=4, num_samples=2, warmup_rounds=0)
    >>> sampler.observe(0, [float(tokens[row][0]) for row in sampler.rows_to_measure(0)])
    >>> sorted(sampler), sampler.history[0]["hard"]
    ([1, 3], 2)
    ```
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        measure: Measure,
        *,
        window: int,
        num_samples: int,
        warmup_rounds: int = 1,
        threshold_rows: int = 128,
        switch_loss: float = 0.5,
        switch_rows: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(len(tokens), measure, num_samples, seed)
        if any(len(row) and min(row) < 0 for row in tokens):
            raise ValueError("tokens holds a negative number. Pass token ids, without the -100 of labels.")
        self.bags = [torch.as_tensor(row, dtype=torch.long).unique() for row in tokens]
        self.window = check_count("window", window)
        if not num_samples <= window <= self.num_rows:
            raise ValueError(
                f"num_samples={num_samples}, window={window}: use num_samples <= window <= {self.num_rows}, the rows."
            )
        self.warmup_rounds = check_count("warmup_rounds", warmup_rounds, 0)
        self.threshold_rows = check_count("threshold_rows", threshold_rows)
        self.switch_loss = check_number("switch_loss", switch_loss, 0)
        self.switch_rows = check_count("switch_rows", switch_rows)
        self.predictor = BernoulliBayes(1 + max((int(bag.max()) for bag in self.bags if bag.numel()), default=0))
        self._tokens_hash = _hash_of(self.bags)
        self.stage = 0 if self.warmup_rounds else 1
        self.threshold: float | None = None
        self.waiting: list[int] = []
        self.recent: list[float] = []
        self.history: list[dict[str, int]] = []

    def candidates(self, epoch: int) -> list[int]:
        """Return the rows of the stream that this round goes through; a row of two passes counts once."""
        filtered = max(0, epoch - self.warmup_rounds)
        first = min(epoch, self.warmup_rounds) * self.num_samples + filtered * self.window
        last = first + (self.num_samples if epoch < self.warmup_rounds else self.window)
        # Stream 2: the order of a round uses the stream (seed, epoch).
        passes = range(first // self.num_rows, -(-last // self.num_rows))
        stream = torch.cat([torch.randperm(self.num_rows, generator=seeded(self.seed, p, 2)) for p in passes])
        start = first - passes[0] * self.num_rows
        return list(dict.fromkeys(stream[start : start + last - first].tolist()))

    def rows_to_measure(self, epoch: int) -> list[int]:
        if epoch < self.warmup_rounds:
            return []
        waiting = set(self.waiting)
        rows = [row for row in self.candidates(epoch) if row not in waiting]
        if self.stage < 2 or not rows:
            return rows
        hard = self.predictor.log_probabilities([self.bags[row] for row in rows]).argmax(1).bool()
        return [row for row, chosen in zip(rows, hard.tolist(), strict=True) if chosen]

    def choose(self, epoch: int, rows: list[int], values: Tensor) -> Tensor:
        stage = 0 if epoch < self.warmup_rounds else max(1, self.stage)
        candidates = self.candidates(epoch)
        filled: list[int] = []
        if stage == 0:
            chosen, hard = candidates, torch.empty(0, dtype=torch.bool)
        else:
            hard = self._filter(rows, values)
            queue = self.waiting + [row for row, is_hard in zip(rows, hard.tolist(), strict=True) if is_hard]
            easy = values.masked_fill(hard, -torch.inf).argsort(descending=True, stable=True)[: int((~hard).sum())]
            # Nothing measured and nothing waiting: the predictor calls all of them easy.
            filled = ([rows[place] for place in easy.tolist()] if rows or queue else candidates)[: self._room(queue)]
            chosen, self.waiting = (queue + filled)[: self.num_samples], queue[self.num_samples :]
            self._maybe_switch(stage)
        counts = (stage, len(candidates), len(rows), int(hard.sum()), len(self.waiting), len(filled))
        names = ("stage", "candidates", "forwarded", "hard", "waiting", "filled")
        self.history.append(dict(zip(names, counts, strict=True)))
        mask = torch.zeros(self.num_rows, dtype=torch.bool)
        mask[chosen] = True
        return mask

    def _room(self, queue: list[int]) -> int:
        return max(0, self.num_samples - len(queue))

    def _filter(self, rows: list[int], losses: Tensor) -> Tensor:
        """Return which of these rows are hard, and let the predictor learn it."""
        if self.threshold is None and rows:
            self.threshold = float(losses[: self.threshold_rows].mean())
        hard = torch.empty(0, dtype=torch.bool)
        if rows and self.threshold is not None:
            hard = losses > self.threshold
        for first in range(0, len(rows), _LEARNED_AT_ONCE):
            labels = hard[first : first + _LEARNED_AT_ONCE]
            bags = [self.bags[row] for row in rows[first : first + _LEARNED_AT_ONCE]]
            guesses = self.predictor.log_probabilities(bags)
            self.recent += (-guesses[torch.arange(len(bags)), labels.long()]).tolist()
            self.predictor.update(bags, labels)
        self.recent = self.recent[-self.switch_rows :]
        return hard

    def _maybe_switch(self, stage: int) -> None:
        known = len(self.recent) == self.switch_rows
        good = known and sum(self.recent) / self.switch_rows <= self.switch_loss
        self.stage = 2 if stage == 2 or good else 1

    def settings(self) -> dict[str, Any]:
        names = ("window", "num_samples", "warmup_rounds", "threshold_rows", "switch_loss", "switch_rows")
        return {"tokens": self._tokens_hash, **{name: getattr(self, name) for name in names}}

    def learned_state(self) -> dict[str, Any]:
        names = ("stage", "threshold", "waiting", "recent", "history")
        mine = {name: getattr(self, name) for name in names}
        return {**super().learned_state(), **mine, "predictor": self.predictor.state_dict()}

    def load_learned_state(self, state: dict[str, Any]) -> None:
        super().load_learned_state(state)
        self.stage, self.threshold = state["stage"], state["threshold"]
        self.waiting, self.recent = list(state["waiting"]), list(state["recent"])
        self.history = [dict(entry) for entry in state["history"]]
        self.predictor.load_state_dict(state["predictor"])


def _hash_of(bags: list[Tensor]) -> str:
    """Return a hash of all bags, taken once: the fingerprint of a checkpoint asks for it again and again."""
    digest = hashlib.sha256()
    for bag in bags:
        digest.update(bag.numel().to_bytes(8, "big") + bag.numpy().tobytes())
    return digest.hexdigest()
