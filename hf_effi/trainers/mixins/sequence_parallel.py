"""`SequenceParallelMixin`: sequences split over several ranks, in any Trainer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ...errors import RefusedError
from ...functional.sequence import shift_labels
from ...parallel import (
    SequenceGroup,
    attention_scope,
    check_deepspeed,
    check_model,
    gathered_forward,
    implementation_of,
    make_sequence_group,
    prove_split,
    sharded_forward,
    split_batch,
)
from ...parallel.exchange import gather_sequence
from ...parallel.layout import tokens_of
from ._signatures import only_passes_on

#: Class that defines the loss -> how its batches are split.
_MODES = {
    "Trainer": "token",
    "SFTTrainer": "token",
    "DPOTrainer": "replicated",
    "KTOTrainer": "replicated",
    "RewardTrainer": "replicated",
    "GRPOTrainer": "rounds",
    "RLOOTrainer": "rounds",
}


@dataclass
class SequenceParallelArguments:
    """
    Fields that a config class gains.

    Args:
        sequence_parallel_size (`int`, *optional*, defaults to 1): Number of consecutive ranks, `P`, that share each
            sequence: a rank holds `1/P` of its tokens. 1 leaves the Trainer as it is.
    """

    sequence_parallel_size: int = field(
        default=1, metadata={"help": "Ranks that share each sequence; each holds 1/P of its tokens. 1: off."}
    )


class SequenceParallelMixin:
    """
    Split every sequence over `P` ranks, with the loss and gradients of one rank. Put it before the Trainer.

    Ulysses attention (arXiv 2309.14509) in plain PyTorch: between attention layers a rank holds `S/P` tokens, inside
    them `Hq/P` heads of all `S` tokens. Works under DDP and FSDP2, with packed and padded batches, checkpointing and
    LoRA.

    How a batch is split depends on the loss (`sequence_parallel_mode`, chosen for the Trainers named):

    - `"token"` (`Trainer`, `SFTTrainer`): the loss is a sum over tokens divided by a global count; each rank sums its
      own.
    - `"replicated"` (`DPOTrainer`, `KTOTrainer`, `RewardTrainer`): the loss needs whole sequences; per-token outputs
      are gathered, and the `P` ranks compute it alike.
    - `"rounds"` (`GRPOTrainer`, `RLOOTrainer`): every rank keeps its own batch, and a group works on the batches of
      its ranks in turn. Generation stays data-parallel.

    Args:
        sequence_parallel_size (`int`, *optional*): `P`. By default the field of that name in `args`, or 1, which
            changes nothing.

    Raises:
        RefusedError: a model or setting with which the gradient would not be that of one rank.
        ValueError: a size or mode that is out of range, or does not fit the number of processes.

    Example:
    ```python
    class LongDPOTrainer(SequenceParallelMixin, DPOTrainer):
        pass


    LongDPOTrainer(model, args=args, train_dataset=pairs, sequence_parallel_size=4).train()
    ```
    """

    sequence_parallel_mode: str | None = None
    _sequence_group: SequenceGroup | None = None
    _round: int | None = None  # whose batch the group works on
    _wants_logits = True
    _split_is_proven = False

    def __init__(self, *args: Any, sequence_parallel_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size = resolve_size(sequence_parallel_size, getattr(self.args, "sequence_parallel_size", None))
        packed = any(getattr(self.args, name, False) for name in ("packing", "padding_free"))
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if warning := check_deepspeed(self.accelerator.parallelism_config, plugin, packed):
            warnings.warn(warning, UserWarning, stacklevel=2)
        if size > 1:
            self.sequence_parallel_mode = self.sequence_parallel_mode or _mode_of(type(self))
            self._check_settings(size)
            check_model(self.model, size)
            self._sequence_group = make_sequence_group(size, self.args.device.type)
            if self.sequence_parallel_mode == "replicated" and hasattr(self, "_tp_size"):
                self._tp_size = size  # TRL's divisor of its token count: ranks with the same batch
            if not self.is_fsdp_enabled:
                self._prove_split(self.model)
            self.accelerator.print(self._description())

    def _check_settings(self, size: int) -> None:
        """Refuse what is not exact, or not tested, before any training."""
        args, mode = self.args, self.sequence_parallel_mode
        if mode not in _MODES.values():
            raise ValueError(f"sequence_parallel_mode={mode!r} must be 'token', 'replicated' or 'rounds'.")
        parallelism = self.accelerator.parallelism_config
        refused = {
            "DeepSpeed": (self.is_deepspeed_enabled, "use DDP or FSDP2, or DeepSpeed's own sp_size"),
            "parallelism_config with tp, cp or sp": (
                parallelism is not None and parallelism.non_data_parallel_size > 1,
                "use one kind of parallelism along the sequence",
            ),
            "torch_compile=True": (args.torch_compile, "leave it off"),
            "neftune_noise_alpha": (args.neftune_noise_alpha, "its noise is scaled by the length of a shard"),
            "the router's balancing loss": (
                getattr(self, "aux_loss_enabled", False),
                "set router_aux_loss_coef=0.0",
            ),
        }
        if mode == "token":
            refused |= {
                "label_smoothing_factor": (args.label_smoothing_factor, "leave it at 0"),
                "compute_loss_func": (self.compute_loss_func is not None, "it would see unshifted shards of labels"),
                "a model that takes no num_items_in_batch": (
                    not self.model_accepts_loss_kwargs,
                    "its loss is a mean over each shard",
                ),
            }
        else:
            rounds = mode == "rounds"
            refused |= {
                "a loss_is_scaled_for_ga of None": (
                    rounds and self.loss_is_scaled_for_ga is None,
                    "set the class attribute to whether compute_loss divides by the accumulation steps",
                ),
                "top_entropy_quantile": (
                    rounds and getattr(self, "top_entropy_quantile", 1.0) < 1.0,
                    "its threshold is one of the batches of all ranks at once; set it to 1.0",
                ),
                "use_adaptive_entropy": (
                    rounds and getattr(self, "use_adaptive_entropy", False),
                    "its coefficient would move in every round; set it to False",
                ),
            }
        if mode != "rounds":
            data = self.train_dataset
            streams = isinstance(data, IterableDataset) or (data is not None and not hasattr(data, "__len__"))
            dispatched = self.accelerator.dispatch_batches
            refused |= {
                "dispatch_batches (the default for streams)": (
                    dispatched or (dispatched is None and streams),
                    "set accelerator_config={'dispatch_batches': False}",
                ),
                "train_sampling_strategy='batch_rebalance'": (
                    args.train_sampling_strategy == "batch_rebalance",
                    "it gives every rank other rows",
                ),
            }
        for what, (found, fix) in refused.items():
            if found:
                raise RefusedError(f"sequence_parallel_size={size} does not work with {what}: {fix}.")

    def _description(self) -> str:
        group, args = self._sequence_group, self.args
        layout = ", ".join(str([*range(i * group.size, (i + 1) * group.size)]) for i in range(group.count))
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if self.sequence_parallel_mode == "rounds":
            steps = f"each rank keeps its own batch ({rows} rows per step); steps are those of plain data parallelism"
        else:
            steps = (
                f"a step takes {rows * group.count} rows: {rows} per group; steps are those of {group.count} rank(s)"
            )
        return (
            f"Sequence parallelism: {group.count} group(s) of {group.size} ranks, {layout}. Each rank holds "
            f"1/{group.size} of every sequence; mode '{self.sequence_parallel_mode}': {steps}. Attention: "
            f"{implementation_of(self.model)}, with the exchange checked at every forward."
        )

    # --- data: the ranks of a group get the same batch, except in rounds ---------------------------------------------

    @property
    def _shares_batches(self) -> bool:
        return self._sequence_group is not None and self.sequence_parallel_mode != "rounds"

    def get_cp_size(self) -> int:
        return self._sequence_group.size if self._shares_batches else super().get_cp_size()

    def get_train_dataloader(self) -> DataLoader:
        if not self._shares_batches:
            return super().get_train_dataloader()
        # accelerate's dataloaders know ranks with the same data from a mesh; nothing else is told of this one.
        self.accelerator._prepare_device_mesh = lambda: self._sequence_group.mesh
        try:
            return super().get_train_dataloader()
        finally:
            del self.accelerator._prepare_device_mesh

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        whole = super().floating_point_ops(inputs)
        return whole // self._sequence_group.size if self._shares_batches else whole

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        if self._shares_batches:
            counted = self.state.num_input_tokens_seen - before
            self.state.num_input_tokens_seen = before + counted // self._sequence_group.size

    # --- forward and backward ----------------------------------------------------------------------------------------

    def _prove_split(self, model: nn.Module) -> None:
        """Once; under FSDP at the first step, when every rank has the weights."""
        if self._sequence_group is None or self._split_is_proven:
            return
        prove_split(self._split_models(model), self._sequence_group, self.sequence_parallel_mode == "token")
        self._split_is_proven = True

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self._prove_split(model)
        with self._attention():
            return super().training_step(model, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        self._wants_logits = not prediction_loss_only
        self._prove_split(model)
        with self._attention():
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        if self._sequence_group is None:
            return contextlib.nullcontext()
        return attention_scope(implementation_of(model) for model in self._split_models(self.model))

    def _split_models(self, model: nn.Module) -> list[nn.Module]:
        models = [model, getattr(self, "ref_model", None)]
        found = [self.accelerator.unwrap_model(each) for each in models if each is not None]
        # The log-probs of the reference are asked of it by name: it is one model all the same.
        return list({id(each): each for each in found}.values())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._sequence_group is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.sequence_parallel_mode == "rounds":
            return self._loss_in_rounds(model, inputs, num_items_in_batch)
        _check_same_batch(inputs, self._sequence_group)
        if self.sequence_parallel_mode == "replicated":
            with gathered_forward(self._split_models(model), self._sequence_group, "sum"):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None:
            raise RefusedError("The batch has no labels to count, and a mean over a shard cannot be joined.")
        layout, shard = split_batch(inputs, self._sequence_group)
        with sharded_forward(self.accelerator.unwrap_model(model), layout):
            return super().compute_loss(model, shard, return_outputs, num_items_in_batch=num_items_in_batch)

    def _loss_in_rounds(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """
        Work on the batch of each rank of the group in turn, with the backward of all but the last round.

        Returns:
            `Tensor`: The value of this rank's own loss, with the gradient of the last round.
        """
        group = self._sequence_group
        scale = 1.0 if self.loss_is_scaled_for_ga else 1.0 / self.current_gradient_accumulation_steps
        with self._pool() as pool:
            for owner, batch in self._rounds(inputs):
                last = owner == group.size - 1
                # Without synchronization FSDP2 would keep whole gradients.
                wait = contextlib.nullcontext() if last or self.is_fsdp_enabled else self.accelerator.no_sync(model)
                with wait:
                    with gathered_forward(self._split_models(model), group, "slice"), pool.round():
                        loss = super().compute_loss(model, batch, num_items_in_batch=num_items)
                    if owner == group.rank:
                        own = loss.detach()
                    if not last:
                        self.accelerator.backward(loss * scale)
        return loss + (own - loss.detach())

    def _evaluation_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any) -> Any:
        """Evaluation always runs in rounds, so that every rank returns what it would without splitting."""
        group = self._sequence_group
        with self._pool() as pool:
            for owner, batch in self._rounds(inputs):
                if self.sequence_parallel_mode == "token":
                    result = self._evaluate_tokens(model, batch, return_outputs, num_items)
                else:
                    with gathered_forward(self._split_models(model), group, "slice"), pool.round():
                        result = super().compute_loss(model, batch, return_outputs)
                if owner == group.rank:
                    own = result
        return own

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Old and reference log-probs, which trainers with rollouts take outside of the loss, run in rounds too."""
        if self._sequence_group is None or self._round is not None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        for owner, (their_args, their_kwargs) in self._rounds((args, kwargs)):
            with gathered_forward(self._split_models(model), self._sequence_group, "slice"):
                result = super()._get_per_token_logps_and_entropies(model, *their_args, **their_kwargs)
            if owner == self._sequence_group.rank:
                own = result
        return own

    def _evaluate_tokens(self, model: nn.Module, batch: dict[str, Any], return_outputs: bool, num_items: Any) -> Any:
        group = self._sequence_group
        averaged = self.args.average_tokens_across_devices
        if num_items is None or not averaged:
            # The mean over the batch: a rank's sum over `count / P` (times the world, where the trainer multiplies).
            labels = batch["shift_labels"] if "shift_labels" in batch else shift_labels(batch["labels"])
            num_items = (labels != -100).sum() / group.size * (self.accelerator.num_processes if averaged else 1)
        layout, shard = split_batch(batch, group)
        with sharded_forward(self.accelerator.unwrap_model(model), layout):
            result = super().compute_loss(model, shard, return_outputs, num_items_in_batch=num_items)
        loss, outputs = result if return_outputs else (result, None)
        loss = gather_sequence(loss.detach()[None, None], group, "slice").mean()
        if not return_outputs:
            return loss
        return loss, layout.gather(outputs, "slice", layout.length) if self._wants_logits else outputs

    def _rounds(self, inputs: Any) -> Iterator[tuple[int, Any]]:
        """Yield each rank of the group with its inputs, on this rank's device."""
        batches: list[Any] = [None] * self._sequence_group.size
        dist.all_gather_object(batches, send_to_device(inputs, "cpu"), group=self._sequence_group.process_group)
        try:
            for self._round, batch in enumerate(batches):
                yield self._round, send_to_device(batch, self.args.device)
        finally:
            self._round = None

    def _pool(self) -> contextlib.AbstractContextManager[_Pool]:
        """
        What a micro-batch logs is pooled over its rounds, in the trainers whose loss logs for the ranks together.
        """
        if self.sequence_parallel_mode != "rounds":
            return contextlib.nullcontext(_Pool(None, {}, 0))
        metrics = self._metrics["train" if self.model.training else "eval"]
        return _Pool(self.accelerator, metrics, self._sequence_group.size)

    @property
    def _works_on_own_batch(self) -> bool:
        return self._round is None or self._round == self._sequence_group.rank


class _Pool:
    """
    Pools what TRL's loss logs over the rounds, as it is pooled over the ranks without splitting.

    That loss reduces and gathers for its metrics only. Inside, round `k` gets the sum, or the values, of rounds 1 to
    `k`, and what the rounds before the last have logged is taken back.

    Args:
        accelerator (`Accelerator`): Whose `reduce` and `gather` are replaced; `None` leaves everything as it is.
        metrics (`dict[str, list[float]]`): Where the loss logs.
        rounds (`int`): How many there are.
    """

    def __init__(self, accelerator: Any, metrics: dict[str, list[float]], rounds: int) -> None:
        self.accelerator, self.metrics, self.rounds = accelerator, metrics, rounds
        self._results: list[Tensor] = []
        self._calls = self._round = 0

    def __enter__(self) -> _Pool:
        if (stock := self.accelerator) is not None:
            stock.reduce, stock.gather = self._reduce, self._gather
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.accelerator is not None:
            del self.accelerator.reduce, self.accelerator.gather

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        self._calls, self._round = 0, self._round + 1
        before = {name: len(values) for name, values in self.metrics.items()}
        yield
        if self._round < self.rounds:
            for name, values in self.metrics.items():
                del values[before.get(name, 0) :]

    def _reduce(self, tensor: Tensor, reduction: str = "mean", scale: float = 1.0) -> Tensor:
        if reduction != "sum":
            raise RefusedError(f"The loss reduces by {reduction!r}, which rounds cannot pool: use 'sum'.")
        return self._join(type(self.accelerator).reduce(self.accelerator, tensor, reduction, scale), torch.add)

    def _gather(self, tensor: Tensor) -> Tensor:
        return self._join(type(self.accelerator).gather(self.accelerator, tensor), lambda *both: torch.cat(both))

    def _join(self, value: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if self._calls == len(self._results):
            self._results.append(value)
        else:
            self._results[self._calls] = join(self._results[self._calls], value)
        self._calls += 1
        return self._results[self._calls - 1]


def resolve_size(argument: int | None, from_config: int | None) -> int:
    if argument is not None and from_config not in (None, 1, argument):
        raise ValueError(
            f"sequence_parallel_size is {argument} in the constructor and {from_config} in args. Set it once."
        )
    size = argument if argument is not None else from_config if from_config is not None else 1
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"sequence_parallel_size={size!r} must be a whole number of ranks, at least 1.")
    return size


def _mode_of(trainer_class: type) -> str:
    overriding = (base for base in trainer_class.__mro__ if "compute_loss" in vars(base))
    owner = next(
        base
        for base in overriding
        if base is not SequenceParallelMixin and not only_passes_on(vars(base)["compute_loss"])
    )
    if owner.__name__ in _MODES and owner.__module__.startswith(("trl.trainer.", "transformers.")):
        return _MODES[owner.__name__]
    raise RefusedError(
        f"{owner.__name__} has a compute_loss of its own, so that it must say how it may be split. Set the class "
        "attribute sequence_parallel_mode: 'token' (a sum over tokens over num_items_in_batch), 'replicated' (a mean "
        "over whole sequences) or 'rounds' (every rank keeps its own batch)."
    )


def _check_same_batch(inputs: dict[str, Any], group: SequenceGroup) -> None:
    """Raise where the ranks of a group were given different batches: each would attend to the others' tokens."""
    tokens = tokens_of(inputs)
    total = sum(
        value.sum() for value in inputs.values() if isinstance(value, Tensor) and not value.is_floating_point()
    )
    mine = torch.tensor([*tokens.shape[:2], int(total)], device=tokens.device)
    parts = [torch.empty_like(mine) for _ in range(group.size)]
    dist.all_gather(parts, mine, group=group.process_group)
    if any(not torch.equal(part, mine) for part in parts):
        raise RefusedError(
            f"The ranks {list(group.ranks)} share their sequences and got different batches (rows, length, sum of all "
            f"ids: {[part.tolist() for part in parts]}). A sampler, collator or transform depends on the rank; make "
            "it depend on the group of ranks only."
        )
