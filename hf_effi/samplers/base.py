"""
The contract of every sampler here: the order of an epoch is a tensor, and the Trainer alone keeps the place in it.

A resumed Trainer counts the batches it has done and discards so many from the front of the epoch. Therefore a sampler
never advances a cursor of its own while a Trainer drives it: it gives the same epoch again, from its first index, and
nothing is skipped twice. That costs one computation of the order and a pass over integers; no row is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import MismatchError
from ..functional.class_paths import class_path, same_class_path
from ..functional.data import check_count
from ..functional.kept_arguments import keeps_arguments

#: Indices turned into Python integers at once: bounds memory, and keeps the loop at C speed.
_CHUNK = 65536


class EffiSampler(Sampler[int]):
    """
    Base of all samplers: implement [`~EffiSampler.order`], get exact resume.

    The order of an epoch is a pure function of the settings, the seed, the epoch and, where the sampler learns, of a
    state that only changes between epochs and is stored in the checkpoint. It does not depend on the number of
    processes: batch `t` of the whole run holds the indices `[t * B, (t + 1) * B)` of the order, where `B` is the
    global batch size.

    Class attributes:
        learns (`bool`): Whether the order depends on what was learned in training, beside settings, seed and epoch.
        single_pass (`bool`): The whole plan is one epoch; a second one is an error.
        best_last (`bool`): The order ends with the rows that matter most, so the LR must not be near zero by then.

    Args:
        num_rows (`int`): Rows of the dataset.
        seed (`int`, *optional*, defaults to 0): Seed of all draws, at least 0.

    Raises:
        ValueError: `num_rows < 1` or a negative seed.

    Example:
    ```python
    class Backwards(EffiSampler):
        learns = False

        def order(self, epoch):
            return torch.arange(self.num_rows).flip(0)
    ```
    """

    learns: ClassVar[bool]
    single_pass: ClassVar[bool] = False
    best_last: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "learns", None), bool):
            raise ValueError(
                f"{cls.__name__}.learns must be False (the order is a pure function of settings, seed and epoch) or "
                "True (it has a learned state beside them). Set the class attribute; earlier versions called it rule, "
                "'A' for False and 'B' for True."
            )

    @keeps_arguments
    def __init__(self, num_rows: int, seed: int = 0) -> None:
        self.num_rows = check_count("num_rows", num_rows)
        self.seed = check_count("seed", seed, 0)
        self.epoch = 0
        self._start: tuple[int, int] | None = None
        self._cached: tuple[Any, Tensor] | None = None

    # ---- what a method implements ----

    def order(self, epoch: int) -> Tensor:
        """Return the row numbers of this epoch, shape `(len(self),)`, int64."""
        raise NotImplementedError(f"{type(self).__name__} has to implement order(epoch).")

    def settings(self) -> dict[str, Any]:
        """Return what the order depends on besides seed and epoch: JSON values and tensors. Guards the resume."""
        return {}

    def learned_state(self) -> dict[str, Any]:
        """Return what was learned so far, as containers of numbers, strings and tensors."""
        return {}

    def load_learned_state(self, state: dict[str, Any]) -> None:
        """Take back what [`~EffiSampler.learned_state`] returned."""

    def __len__(self) -> int:
        """Return how many indices one epoch gives. The Trainer derives its number of steps from it."""
        return self.num_rows

    # ---- what the Trainer, accelerate and torch use ----

    def set_epoch(self, epoch: int) -> None:
        """
        Choose the epoch of the next pass. Calling it again with the same number changes nothing.

        Raises:
            ValueError: a second epoch of a plan that has one.
        """
        check_count("epoch", epoch, 0)
        if self.single_pass and epoch > 0:
            raise ValueError(
                f"{type(self).__name__} is a plan for the whole run, given in one epoch of {len(self)} samples, and "
                f"epoch {epoch} was asked for. Set num_train_epochs=1 (or a lower max_steps) and make the plan longer."
            )
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start = 0
        if self._start is not None and self._start[0] == self.epoch:
            start = self._start[1]
        self._start = None
        indices = self._checked_order()[start:]
        for chunk in indices.split(_CHUNK):
            yield from chunk.tolist()

    def start_from(self, epoch: int, sample: int) -> None:
        """
        Begin the next pass in the middle: for your own loop, where nobody else skips.

        Inside a Trainer this is refused, because the Trainer discards the finished batches itself.

        Args:
            epoch (`int`): The epoch that was interrupted.
            sample (`int`): How many of its indices are done, in `[0, len(sampler)]`.

        Raises:
            ValueError: `sample` lies outside.
        """
        if not isinstance(sample, int) or not 0 <= sample <= len(self):
            raise ValueError(f"sample={sample!r} is outside [0, {len(self)}], the length of an epoch.")
        self.set_epoch(epoch)
        self._start = (epoch, sample)

    def forget_start(self) -> None:
        """Drop a `start_from` that no pass has used: on processes that do not read themselves."""
        self._start = None

    def check_not_started(self) -> None:
        """
        Raises:
            ValueError: `start_from` is pending, while a Trainer is about to skip the same samples.
        """
        if self._start is not None:
            raise ValueError(
                f"start_from{self._start} was called, and the Trainer skips the finished batches itself: they would "
                "be skipped twice. Remove the call; trainer.train(resume_from_checkpoint=True) is all it takes."
            )

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, a fingerprint of all that shapes the order, and what was learned."""
        return {
            "sampler": type(self).__name__,
            "class": self.identity(),
            "learns": self.learns,
            "epoch": self.epoch,
            "length": len(self),
            "fingerprint": self.fingerprint(),
            "learned": self.learned_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Take back what [`~EffiSampler.state_dict`] returned.

        Raises:
            MismatchError: the state belongs to another sampler, seed, dataset or score.
        """
        if "learns" not in state:  # earlier versions stored a letter
            state = {**state, "learns": state.get("rule") == "B"}
        for key, mine in (("sampler", type(self).__name__), ("learns", self.learns), ("length", len(self))):
            if state.get(key) != mine:
                raise MismatchError(
                    f"The checkpoint has a sampler with {key}={state.get(key)!r}, this run has {mine!r}. Build the "
                    "sampler as in the run that is resumed, or start a new run from the weights."
                )
        self.check_same_order(state)
        self.load_learned_state(state["learned"])
        self._cached = None
        self.epoch = state["epoch"]

    def identity(self) -> str:
        """Return the path of the class, `"module:Name"`: a class of yours may have the name of one of ours."""
        return class_path(type(self))

    def check_same_order(self, stored: dict[str, Any]) -> None:
        """
        Check class and fingerprint of a state, or of an entry in a checkpoint, against this sampler.

        Raises:
            MismatchError: another class, or other settings, seed, rows or scores.
        """
        # Earlier versions did not store the class.
        if not same_class_path(stored.get("class", self.identity()), self.identity()):
            raise MismatchError(
                f"The checkpoint was made by {stored['class']}, this run has {self.identity()}. Build the sampler as "
                "in the run that is resumed, or start a new run from the weights."
            )
        if stored["fingerprint"] != self.fingerprint():
            raise MismatchError(
                f"The checkpoint was made by a {stored['sampler']} with other settings, seed or scores, so the order "
                "cannot be continued. Build the sampler as in the run that is resumed (the scores must be the same "
                "numbers), or start a new run from the weights."
            )

    def fingerprint(self) -> str:
        """Return a hash of class, seed, rows and settings: equal exactly where the orders are."""
        digest = hashlib.sha256(f"{type(self).__name__}|{self.seed}|{self.num_rows}".encode())
        for key, value in sorted(self.settings().items()):
            digest.update(f"|{key}=".encode())
            if isinstance(value, Tensor):
                digest.update(str(value.dtype).encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
            else:
                digest.update(json.dumps(value, sort_keys=True).encode())
        return digest.hexdigest()

    # ---- helpers ----

    def _cache_key(self) -> Any:
        """Return what a computed order is valid for. One that learns adds the version of what it learned."""
        return self.epoch

    def _checked_order(self) -> Tensor:
        key = self._cache_key()
        if self._cached is None or self._cached[0] != key:
            order = self.order(self.epoch)
            if order.dtype != torch.int64 or order.ndim != 1 or order.numel() != len(self):
                raise ValueError(
                    f"{type(self).__name__}.order returned {order.dtype} of shape {tuple(order.shape)}, but len() "
                    f"says {len(self)}. Return int64 of shape ({len(self)},)."
                )
            self._cached = (key, order)
        return self._cached[1]


class ShuffledSampler(EffiSampler):
    """
    A uniform permutation for each epoch: the control of every curriculum, with the same exact resume.

    Args:
        num_rows (`int`): Rows of the dataset.
        seed (`int`, *optional*, defaults to 0): Epoch `e` uses the stream `(seed, e)`.
    """

    learns = False

    def order(self, epoch: int) -> Tensor:
        from ..functional.data import seeded

        return torch.randperm(self.num_rows, generator=seeded(self.seed, epoch))
