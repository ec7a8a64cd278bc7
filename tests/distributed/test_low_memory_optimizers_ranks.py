"""APOLLO and FRUGAL on two gloo processes: DDP and the shards of FSDP2 make the update of one process to 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_effi.optim import APOLLO, FRUGAL
from tests.helpers import run_distributed

STEPS = 5
MADE = {
    "apollo": lambda named: APOLLO(named, lr=0.05, rank=2, update_gap=2, weight_decay=0.1),
    "mini": lambda named: APOLLO(named, lr=0.05, rank=1, update_gap=2, scaling="tensor", scale=4.0),
    "block": lambda named: FRUGAL(named, lr=0.05, density=0.4, update_gap=2),
    "columns": lambda named: FRUGAL(named, lr=0.05, density=0.4, update_gap=2, projection="columns"),
}


class Experts(nn.Module):
    """A wide matrix, a tall one and three of one tensor; no side is a multiple of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(12, 5), nn.Linear(5, 9)
        self.stack = nn.Parameter(torch.randn(3, 9, 4))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->beo", self.tall(self.wide(rows).tanh()).tanh(), self.stack)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Experts().double()


def rows(step: int) -> torch.Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(net: nn.Module, optimizer: Any, steps: range, rank: int = 0, ranks: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(rows(step).chunk(ranks)[rank]).square().mean().backward()
        optimizer.step()


def whole(net: nn.Module) -> dict[str, torch.Tensor]:
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
    return {name.removeprefix("module."): value.detach().clone() for name, value in full.items()}


def on_two_ranks() -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    rank, found = torch.distributed.get_rank(), {}
    for name, make in MADE.items():
        net = DistributedDataParallel(model())
        optimizer = make(net.named_parameters())  # whose names begin with "module."
        train(net, optimizer, range(STEPS), rank, 2)
        places = [number for number, p in enumerate(net.parameters()) if p in optimizer.state]
        drawn = [places_.tolist() for _, places_ in getattr(optimizer, "_drawn", {}).values()]
        found[name] = whole(net), (places, drawn)
    mesh = init_device_mesh("cpu", (2,))
    for name in ("apollo", "mini"):
        net = model()
        fully_shard(net, mesh=mesh)
        optimizer = MADE[name](net.named_parameters())
        train(net, optimizer, range(3), rank, 2)
        saved = get_optimizer_state_dict(net, optimizer)
        again = MADE[name](net.named_parameters())
        set_optimizer_state_dict(net, again, saved)
        train(net, again, range(3, STEPS), rank, 2)
        local = {n: again.state[p]["exp_avg"].to_local().shape for n, p in net.named_parameters()}
        found[f"{name}-fsdp2"] = whole(net), local
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_distributed(on_two_ranks, 2)


@pytest.mark.parametrize("case", [*MADE, "apollo-fsdp2", "mini-fsdp2"])
def test_two_ranks_make_the_update_of_one(case, found):
    alone = model()
    train(alone, MADE[case.partition("-")[0]](alone.named_parameters()), range(STEPS))
    for name, expected in whole(alone).items():
        torch.testing.assert_close(found[0][case][0][name], expected, atol=1e-10, rtol=1e-10)
        assert torch.equal(found[0][case][0][name], found[1][case][0][name])


def test_ranks_draw_alike(found):
    for name in MADE:
        assert found[0][name][1] == found[1][name][1]
    assert found[0]["columns"][1][1] and found[0]["block"][1][0] != found[0]["apollo"][1][0]


def test_moments_are_sharded_along_the_longer_side(found):
    (_, first), (_, second) = found[0]["apollo-fsdp2"], found[1]["apollo-fsdp2"]
    assert (first["wide.weight"], second["wide.weight"]) == ((2, 6), (2, 6))
    assert (first["tall.weight"], second["tall.weight"]) == ((5, 2), (4, 2))
    assert (first["stack"], second["stack"]) == ((2, 9, 2), (1, 9, 2))
