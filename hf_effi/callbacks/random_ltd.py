"""`RandomLTDCallback`: random layerwise token dropping on a stock Trainer or SFTTrainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional import metrics
from ..functional.kept_arguments import keeps_arguments
from ..functional.random_ltd import check_range, kept_tokens, layer_tokens, ramp_length
from ..layers.random_ltd import TokenDropping, drop_layer_tokens
from ..patching.handle import PatchHandle
from ._engines import data_rank
from ._turns import WRITE, TurnCallback, in_turn
from .kernel_patch import refuse_data_parallel
from .owners import Role
from .probing import in_probe, outside_probes, trained_steps, trained_total

#: key of our entry in `TrainerState.stateful_callbacks`, which every checkpoint stores as JSON
STATE_KEY = "hf_effi.random_ltd"


class RandomLTDCallback(TurnCallback):
    """
    Train middle layers on a random subset of the tokens, which grows linearly until none is dropped.

    The number of kept tokens is [`~hf_effi.functional.random_ltd.kept_tokens`] of the finished updates, with
    `ramp_steps = ceil(ramp_fraction * max_steps)`. Evaluation sees all tokens. Logs `effi/ltd_kept_tokens`, and
    `effi/ltd_layer_tokens`, `effi/ltd_layer_token_fraction` of the run so far on the main process. Updates that a
    search tries and undoes ([`AutoLRSCallback`]) are in none of these counts.

    Random-LTD, arXiv:2211.11586.

    Args:
        min_tokens (`int`): Tokens of a sequence that a middle layer processes at first, from `multiple` to
            `max_tokens`.
        max_tokens (`int`): The length of the sequences, where the ramp ends.
        ramp_fraction (`float`, *optional*, defaults to `0.7`): Share of the run in which tokens are dropped, in
            `[0, 1]`.
        multiple (`int`, *optional*, defaults to `16`): Grid of the kept tokens.

    Attributes:
        dropping ([`~hf_effi.layers.random_ltd.TokenDropping`]): State of the last training, with its counters.

    Raises:
        ValueError: a setting out of range.
        RefusedError: an RL, preference or distillation trainer, whose log-probs are compared with other passes; a
            model, attention or setting that cannot drop tokens.

    Example:
    ```python
    callback = RandomLTDCallback(min_tokens=512, max_tokens=2048)
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    ```
    """

    role = Role("layer tokens", "Two callbacks want to drop tokens of the layers", "Keep one.")

    @keeps_arguments
    def __init__(self, min_tokens: int, max_tokens: int, *, ramp_fraction: float = 0.7, multiple: int = 16) -> None:
        check_range(min_tokens, max_tokens, multiple)
        if (
            not isinstance(ramp_fraction, (int, float))
            or isinstance(ramp_fraction, bool)
            or not 0 <= ramp_fraction <= 1
        ):
            raise ValueError(f"ramp_fraction={ramp_fraction!r} must be a number in [0, 1].")
        self.min_tokens, self.max_tokens, self.multiple = min_tokens, max_tokens, multiple
        self.ramp_fraction = ramp_fraction
        self.dropping: TokenDropping | None = None
        self._handle: PatchHandle | None = None
        self._num_layers = 0
        self._consumed: int | None = None
        self._counted, self._total = (0, 0), 0

    def progress(self) -> float:
        """
        Return the finished updates in units of full ones, by the layer-tokens of rows of `max_tokens`.

        The `counter` of [`~hf_effi.LRScheduleCallback`] for a [`~hf_effi.schedules.token_indexed`] schedule: the
        paper's LayerToken LR. A function of the schedule alone, so that all ranks and resumed runs agree.

        Raises:
            RuntimeError: training is not running, or this callback comes after the one that asks.
        """
        if self._consumed is None:
            raise RuntimeError(
                "RandomLTDCallback.progress was asked before its training began. Put it before LRScheduleCallback in "
                "callbacks."
            )
        return self._consumed / (self.max_tokens * self._num_layers)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse(args)
        super().on_init_end(args, state, control, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse(args)  # a callback may be added after the Trainer was built
        super().on_train_begin(args, state, control, **kwargs)
        self._revert()  # left by a run that failed
        self.dropping = TokenDropping(args.seed, data_rank(args))
        stored = state.stateful_callbacks.get(STATE_KEY, {}) if state.global_step else {}
        self.dropping.layer_tokens = stored.get("layer_tokens", 0)
        self.dropping.full_layer_tokens = stored.get("full_layer_tokens", 0)
        self._handle = drop_layer_tokens(kwargs["model"], self.dropping)
        self._num_layers = len(self._handle.replaced) + 2
        self._consumed = self._consumed_so_far(state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if trained_total(state) != self._total:  # another callback has said since which updates are probes
            self._consumed = self._consumed_so_far(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        dropping = self.dropping
        dropping.step, dropping.micro_step = state.global_step, 0
        self._counted = dropping.layer_tokens, dropping.full_layer_tokens
        kept = self._kept(trained_steps(state), trained_total(state))
        dropping.kept = kept if kept < self.max_tokens else None  # None: also for rows longer than max_tokens

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dropping.micro_step += 1

    @outside_probes
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._consumed += self._layer_tokens(trained_steps(state), trained_total(state))  # before the LR is moved

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if in_probe(state):
            self.dropping.layer_tokens, self.dropping.full_layer_tokens = self._counted
        state.stateful_callbacks[STATE_KEY] = {
            "layer_tokens": self.dropping.layer_tokens,
            "full_layer_tokens": self.dropping.full_layer_tokens,
        }

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" not in kwargs["logs"]:
            return
        dropping = self.dropping
        values = {
            metrics.LTD_KEPT_TOKENS: self.max_tokens if dropping.kept is None else dropping.kept,
            metrics.LTD_LAYER_TOKENS: dropping.layer_tokens,
            metrics.LTD_LAYER_TOKEN_FRACTION: dropping.layer_tokens / max(dropping.full_layer_tokens, 1),
        }
        kwargs["logs"].update(values)
        state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._revert()
        self._consumed = None

    # ---- helpers ----

    def _revert(self) -> None:
        if self._handle is not None:
            self._handle.revert()

    def _kept(self, step: int, max_steps: int) -> int:
        ramp_steps = ramp_length(max_steps, self.ramp_fraction)
        return kept_tokens(step, ramp_steps, self.min_tokens, self.max_tokens, self.multiple)

    def _consumed_so_far(self, state: TrainerState) -> int:
        self._total = total = trained_total(state)
        return sum(self._layer_tokens(step, total) for step in range(trained_steps(state)))

    def _layer_tokens(self, step: int, max_steps: int) -> int:
        return layer_tokens(1, self.max_tokens, self._kept(step, max_steps), self._num_layers, self._num_layers - 2)


def _refuse(args: TrainingArguments) -> None:
    refuse_data_parallel(args)
    refuse_trainer(args)


def refuse_trainer(args: TrainingArguments) -> None:
    """Raise for the trainers and settings under which tokens must not be dropped."""
    trl = [cls.__name__ for cls in type(args).__mro__ if cls.__module__.startswith("trl.")]
    if trl and trl[0] != "SFTConfig":
        raise RefusedError(
            f"random-LTD was given a {trl[0]}. RL, preference, reward and distillation trainers compare log-probs or "
            "scores between forward passes, and dropped tokens would differ between them. Use it for pre-training "
            "and SFT."
        )
    if args.torch_compile:
        raise RefusedError(
            "torch_compile=True would compile a layer anew for each number of kept tokens. Set it to False."
        )
    if getattr(args, "sequence_parallel_size", 1) > 1:
        raise RefusedError("random-LTD needs whole sequences. Set sequence_parallel_size=1.")
