"""What local updates hold while a Trainer trains, and what they refuse before it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from accelerate.utils.dataclasses import DDPCommunicationHookType
from torch.nn.parallel import DistributedDataParallel

from ..._files import load_state, missing_file, save_state
from ...callbacks._engines import sharding_engine
from ...checkpoint.elastic import generates
from ...checkpoint.structure import has_optimizer
from ...errors import MismatchError, RefusedError
from ...functional.local_updates import LocalUpdates, flatten, outer_step, unflatten_into

#: the momentum of the outer step, the same on all processes, and the inner optimizer of each further process
STATE_FILE, OPTIMIZER_FILE = "effi_local_updates.pt", "effi_local_optimizer_{rank}.pt"
#: callbacks, by the name of a class or of its base, that read or write weights, gradients or checkpoints where the
#: processes differ
IN_BETWEEN = {
    "AveragingCallback": "it would average weights of one process",
    "BEMACallback": "it would average weights of one process",
    "SyncRefModelCallback": "the reference would be another one on each process",
    "ReptileCallback": "it would step back on each process alone",
    "RewindCallback": "it would go back without the outer step",
    "FastForwardCallback": "it would walk along the update of one process",
    "AutoLRSCallback": "the updates that it tries and undoes would be joined",
    "AdaLoRACallback": "each process would choose other ranks of the adapters",
    "_RuleCallback": "it reads averaged gradients, and here no gradient is averaged",
    "JITCheckpointCallback": "it saves between two synchronisations",
}


def refuse_settings(trainer: Any, settings: LocalUpdates) -> None:
    """
    Refuse what a Trainer is set to and local updates cannot keep, by name.

    Raises:
        RefusedError: names the setting and the fix.
    """
    args, world = trainer.args, trainer.args.world_size
    alone = world > 1 and settings.every > 1
    counts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    parallel = trainer.accelerator.parallelism_config
    split = getattr(trainer, "_sequence_group", None) is not None
    handler = trainer.accelerator.ddp_handler
    hooked = handler is not None and handler.comm_hook != DDPCommunicationHookType.NO
    engine = sharding_engine(args)
    refused = {
        str(engine): (engine, "no process has the whole model to train alone. Use DDP"),
        "tensor, context or sequence parallelism": (
            split or (parallel is not None and parallel.non_data_parallel_size > 1),
            "its processes share each sample and need each other in every layer. Use data parallelism only",
        ),
        "fp16 with a GradScaler": (
            getattr(trainer.accelerator, "scaler", None) is not None,
            "each process would scale, and skip, on its own. Use bf16",
        ),
        "GRPO and other trainers that generate": (
            generates(args),
            "they gather rewards of all processes in each generation, and rows of one group would come from policies "
            "that differ. Use it for SFT, DPO or pre-training",
        ),
        "average_tokens_across_devices=True": (
            alone and counts and args.average_tokens_across_devices,
            "the processes would meet in each update to count tokens. Set it to False: each process then divides by "
            "its own tokens",
        ),
        "auto_find_batch_size": (args.auto_find_batch_size, "each process would find its own. Set it to False"),
        "a compression hook": (hooked, "no gradient is sent. Keep one of the two"),
        "BatchNorm": (
            world > 1 and any(getattr(m, "running_mean", None) is not None for m in trainer.model.modules()),
            "its running statistics would differ between the processes. Use another norm",
        ),
    }
    for what, (found, why) in refused.items():
        if found:
            raise RefusedError(f"local_updates does not work with {what}: {why}.")
    for callback in trainer.callback_handler.callbacks:
        for cls in type(callback).__mro__:
            if cls.__name__ in IN_BETWEEN:
                raise RefusedError(
                    f"local_updates does not work with {type(callback).__name__}: {IN_BETWEEN[cls.__name__]}. "
                    "Leave one of the two out."
                )


def refuse_steps(trainer: Any, settings: LocalUpdates) -> None:
    """
    Refuse evaluations and saves that are planned where the processes differ.

    Raises:
        ValueError: `eval_steps` or `save_steps` is no multiple of `every`.
    """
    args, state, every = trainer.args, trainer.state, settings.every
    for name, strategy, steps in (
        ("eval_steps", args.eval_strategy, state.eval_steps),
        ("save_steps", args.save_strategy, state.save_steps),
    ):
        if strategy == "steps" and steps % every:
            above = -(-int(steps) // every) * every
            raise ValueError(
                f"{name}={steps} is no multiple of every={every}, and only every {every} updates the processes have "
                f"the same weights. Set {name}={above}."
            )


def gather_nothing(world: int) -> Callable[..., Any]:
    """
    Return what stands in for `Accelerator.gather_for_metrics`: as if all processes had what this one has.

    Args:
        world (`int`): Processes.
    """

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        def again(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor[None] if tensor.ndim == 0 else tensor] * world)

        if use_gather_object:
            return list(input_data) * world
        return recursively_apply(again, input_data)

    return gather_for_metrics


class LocalRun:
    """
    The outer optimizer of one `train()`: anchor and momentum, on the CPU.

    Args:
        settings ([`LocalUpdates`]): Of the trainer.
        model (`torch.nn.Module`): As the Trainer wrapped it.
        optimizer: The Trainer's.
        rank, world (`int`): This process, and how many there are.

    Raises:
        RefusedError: several processes without DDP around the model, or an optimizer with a copy of the weights.
    """

    def __init__(self, settings: LocalUpdates, model: torch.nn.Module, optimizer: Any, rank: int, world: int) -> None:
        self.settings, self.rank, self.world = settings, rank, world
        self.ddp = next((part for part in model.modules() if isinstance(part, DistributedDataParallel)), None)
        if world > 1 and self.ddp is None:
            raise RefusedError(f"local_updates needs DDP, and {type(model).__name__} is not wrapped by it.")
        inner = getattr(optimizer, "optimizer", optimizer)
        if callable(getattr(inner, "train", None)):
            raise RefusedError(
                f"local_updates does not work with {type(inner).__name__}, which keeps a second copy of the weights "
                "that the outer step cannot reach. Use a schedule instead of a schedule-free optimizer."
            )
        self.optimizer, self.model = optimizer, model
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.anchor = _on_cpu(flatten(list(self.weights.values())))
        self.velocity = _on_cpu(torch.zeros_like(self.anchor))
        #: synchronisations and bytes that this process gave into their all-reduce; the norm of the last outer gradient
        self.count, self.sent_bytes, self.delta_norm = 0, 0, 0.0
        self.train_alone(True)

    def train_alone(self, alone: bool) -> None:
        """Let DDP leave gradients as they are, or average them again."""
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = not alone
            self.ddp.require_forward_param_sync = not alone

    def synchronise(self) -> None:
        """
        Join the processes: one all-reduce, one outer step, the same weights everywhere.

        Raises:
            RefusedError: a weight is trained now that was frozen when training began, and was never joined.
        """
        late = [name for name, p in self.model.named_parameters() if p.requires_grad and name not in self.weights]
        if late:
            raise RefusedError(
                f"{late[0]} is trained now and was frozen when training began, so local_updates does not join it. "
                "Let it be trainable from the start."
            )
        weights = list(self.weights.values())
        flat = flatten(weights)
        if self.world > 1:
            dist.all_reduce(flat)
            flat.div_(self.world)
            self.sent_bytes += flat.numel() * flat.element_size()
        mean = flat.cpu()
        self.delta_norm = float(torch.linalg.vector_norm(self.anchor - mean))
        theta = outer_step(self.anchor, mean, self.velocity, self.settings.outer_lr, self.settings.outer_momentum)
        unflatten_into(weights, theta.to(flat.device))
        self.anchor.copy_(flatten(weights))  # as the weights' dtype holds it
        self.count += 1

    def save(self, folder: str) -> None:
        """Write what a resume needs beside the Trainer's own files: this process's part of it."""
        if self.rank:
            save_state(Path(folder) / OPTIMIZER_FILE.format(rank=self.rank), self.optimizer.state_dict())
        else:
            done = {"count": self.count, "sent_bytes": self.sent_bytes, "delta_norm": self.delta_norm}
            state = {"schema": 1, **self._facts(), **done, "velocity": self.velocity.clone()}
            save_state(Path(folder) / STATE_FILE, state)

    def load(self, folder: str) -> None:
        """
        Go on as a checkpoint says, whose weights the model has.

        Raises:
            BrokenFileError: a file of it is missing or damaged.
            MismatchError: it is of another number of processes, other settings or other weights.
        """
        path = Path(folder) / STATE_FILE
        if not path.exists():
            if not has_optimizer(Path(folder)):
                return  # weights alone: both optimizers begin anew
            raise missing_file(path)
        stored, facts = load_state(path), self._facts()
        different = [f"{key}: {stored.get(key)!r} -> {facts[key]!r}" for key in facts if stored.get(key) != facts[key]]
        if different:
            shown = ", ".join(different)
            raise MismatchError(
                f"{path} was written with other local updates ({shown[:300]}). Resume with the same LocalUpdates, "
                "number of processes and trainable weights, or start a new run from the weights."
            )
        self.velocity.copy_(stored["velocity"])
        self.count, self.sent_bytes, self.delta_norm = (stored[key] for key in ("count", "sent_bytes", "delta_norm"))
        if self.rank:
            own = Path(folder) / OPTIMIZER_FILE.format(rank=self.rank)
            self.optimizer.load_state_dict(load_state(own))

    def _facts(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "every": settings.every,
            "outer_lr": settings.outer_lr,
            "outer_momentum": settings.outer_momentum,
            "processes": self.world,
            "weights": sum(weight.numel() for weight in self.weights.values()),
        }


def _on_cpu(vector: torch.Tensor) -> torch.Tensor:
    """Return the vector on the CPU; of a GPU's in memory from which it can be copied without a detour."""
    return vector.cpu().pin_memory() if vector.is_cuda else vector
