"""How the prototypes of `bench/prototypes/traffic.py` send the gradients of DDP, as hooks of its buckets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from bench.prototypes.traffic import (
    buckets_of,
    choose_levels,
    lattice_quantise,
    lattice_values,
    pack,
    steps_of,
    stochastic_codes,
    unpack,
)

#: entries that share a step
BUCKET = 1024
BITS = (8, 4, 2)


class Hook:
    """Base of a hook: gives DDP the mean of the gradients of a bucket."""

    #: is told each tensor that is sent
    carry: Callable[[torch.Tensor], None]

    def mean(self, bucket: Any) -> torch.Tensor:
        """Return the mean over the processes, of the shape of `bucket.buffer()`."""
        raise NotImplementedError

    def reduced(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Return the mean as DDP takes it."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(self.mean(bucket))
        return future

    def registered_on(self, trainer: Any) -> TrainerCallback:
        """Return a callback that gives the hook to DDP when training begins."""
        hook = self

        class Register(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                # Without annotations, which torch compares with its own classes.
                trainer.model_wrapped.register_comm_hook(None, lambda state, bucket: hook.reduced(bucket))

        return Register()


class Exact(Hook):
    """What DDP does without a hook."""

    def mean(self, bucket: Any) -> torch.Tensor:
        gradient = bucket.buffer().div_(dist.get_world_size())
        dist.all_reduce(gradient)
        return gradient


class EvenBits(Hook):
    """QSDP's gradients: stochastic rounding, with a step for each 1024 entries and the same bits everywhere."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def mean(self, bucket: Any) -> torch.Tensor:
        gradient = bucket.buffer()
        total = self.joined(gradient, self.bits)
        return total.div_(dist.get_world_size())

    def joined(self, gradient: torch.Tensor, bits: int) -> torch.Tensor:
        """Return the sum over the processes of their quantised vectors."""
        buckets = buckets_of(gradient, BUCKET)
        steps = steps_of(buckets, bits)
        codes = stochastic_codes(buckets, steps, torch.rand_like(buckets))
        high = 2 ** (bits - 1) - 1
        packed, total = pack(codes.clamp_(-high, high), bits), torch.zeros_like(gradient)
        for others, of_steps in zip(self.gathered(packed), self.gathered(steps), strict=True):
            values = unpack(others, bits, buckets.numel()).view_as(buckets) * of_steps
            total += values.reshape(-1)[: gradient.numel()]
        return total

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.carry(tensor)
        found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(found, tensor)
        return found


class LevelledBits(EvenBits):
    """
    L-GreCo: bits for each weight, chosen anew every so many updates, with the error that even bits would have.

    Errors are expected squared errors of the mean gradient of an update, which all processes have.
    """

    def __init__(self, like: int, every: int) -> None:
        super().__init__(like)
        self.every, self.updates = every, 0
        self.levels: tuple[int, ...] = ()

    def mean(self, bucket: Any) -> torch.Tensor:
        gradients = bucket.gradients()
        if self.updates % self.every == 0 or len(self.levels) != len(gradients):
            gradient = bucket.buffer().div_(dist.get_world_size())
            dist.all_reduce(gradient)
            self.levels = self.chosen(gradients)
            self.updates += 1
            return gradient
        self.updates += 1
        found = torch.empty_like(bucket.buffer())
        flat = [gradient.reshape(-1) for gradient in gradients]
        offset = {id(gradient): gradient.storage_offset() for gradient in gradients}
        base = bucket.buffer().storage_offset()
        for level, bits in enumerate(BITS):  # one message for each number of bits
            mine = [i for i, chosen in enumerate(self.levels) if chosen == level]
            if not mine:
                continue
            total = self.joined(torch.cat([flat[i] for i in mine]), bits)
            for i, part in zip(mine, total.split([flat[i].numel() for i in mine]), strict=True):
                begin = offset[id(gradients[i])] - base
                found[begin : begin + part.numel()] = part
        return found.div_(dist.get_world_size())

    def chosen(self, gradients: list[torch.Tensor]) -> tuple[int, ...]:
        errors, sizes = [], []
        for gradient in gradients:
            buckets = buckets_of(gradient.reshape(-1), BUCKET)
            # A value between two codes at a fraction f has the variance f (1 - f) steps^2.
            errors.append([])
            for bits in BITS:
                scaled = buckets / steps_of(buckets, bits)
                fraction = scaled - scaled.floor()
                errors[-1].append(float((fraction * (1 - fraction) * steps_of(buckets, bits) ** 2).sum()))
            sizes.append([-(-gradient.numel() * bits // 8) + 4 * len(buckets) for bits in BITS])
        return choose_levels(errors, sizes, sum(error[BITS.index(self.bits)] for error in errors))


class QuantisedWeights:
    """
    QSDP's weights: forward and backward see them on the random-shift lattice, the optimizer the whole ones.

    Under FSDP they would be gathered so, for the forward and once more for the backward; both are sent here as one.
    """

    def __init__(self, bits: int, size: int, seed: int) -> None:
        self.bits, self.size = bits, size
        self.generator = torch.Generator().manual_seed(seed)  # all processes draw the same shifts
        self.whole: list[torch.Tensor] = []

    @torch.no_grad()
    def quantise(self, model: torch.nn.Module) -> torch.Tensor:
        """Put the quantised weights in place, and return bytes as many as are sent."""
        weights = list(model.parameters())
        self.whole = [weight.detach().clone() for weight in weights]
        count, steps_sent = 0, 0
        for weight in weights:
            buckets = buckets_of(weight.detach().reshape(-1), self.size)
            steps = steps_of(buckets, self.bits)
            shifts = (torch.rand(steps.shape, generator=self.generator) - 0.5) * steps
            values = lattice_values(lattice_quantise(buckets, steps, shifts), steps, shifts)
            weight.copy_(values.reshape(-1)[: weight.numel()].view_as(weight))
            count, steps_sent = count + weight.numel() * self.bits // 8, steps_sent + 4 * len(steps)
        return torch.empty(2 * (count + steps_sent), dtype=torch.uint8)

    @torch.no_grad()
    def restore(self, model: torch.nn.Module) -> None:
        for weight, whole in zip(model.parameters(), self.whole, strict=True):
            weight.copy_(whole)
