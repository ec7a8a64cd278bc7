"""The robust z-score of a loss and the slowest process, by hand-computed values; copies of a state in memory."""

from __future__ import annotations

import math

import pytest
import torch

from hf_effi.checkpoint import MemorySnapshot, RewindCost
from hf_effi.errors import RefusedError
from hf_effi.functional.spikes import is_spike, robust_z
from hf_effi.functional.stragglers import find_straggler


def test_robust_z_by_hand() -> None:
    # median 3, deviations 2 1 0 1 2: MAD 1
    assert robust_z(5.0, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.6745 * 2)
    assert robust_z(1.0, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(-0.6745 * 2)
    # an even number of losses: median 2.5, deviations 1.5 0.5 0.5 1.5: MAD 1
    assert robust_z(4.5, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.6745 * 2)
    # outliers in the window move neither
    assert robust_z(5.0, [1.0, 2.0, 3.0, 4.0, 1e9]) == pytest.approx(0.6745 * 2)
    # equal losses: the floor is 0.001 of the median
    assert robust_z(2.002, [2.0] * 5) == pytest.approx(0.6745, rel=1e-6)
    assert robust_z(0.0, [0.0, 0.0]) == 0.0 and robust_z(1e-9, [0.0, 0.0]) == math.inf
    assert robust_z(math.nan, [1.0]) == robust_z(math.inf, [1.0]) == math.inf
    for window in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="must hold at least one loss"):
            robust_z(1.0, window)


def test_a_spike_needs_a_window_and_is_above() -> None:
    window = [1.0, 1.1, 0.9, 1.05, 0.95]
    assert is_spike(9.0, window, least=5) and not is_spike(9.0, window, least=6)
    assert not is_spike(-9.0, window, least=5) and not is_spike(1.3, window, least=5)
    assert is_spike(math.nan, []) and is_spike(math.inf, window)
    for over, words in (
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"least": 0}, "least=0"),
        ({"least": True}, "least=T"),
    ):
        with pytest.raises(ValueError, match=words):
            is_spike(1.0, window, **over)


def test_the_slowest_process_by_hand() -> None:
    report = find_straggler([[1.0, 1.0], [3.0, 1.0], [2.0, 4.0]])
    assert (report.rank, report.persistence, report.updates) == (2, 0.5, 2)
    assert report.ratio == pytest.approx(3 / 2) and report.waiting_fraction == pytest.approx(1 - 2 / 3.5)
    even = find_straggler([[1.0, 1.0], [1.0, 1.0]])
    assert (even.ratio, even.persistence, even.waiting_fraction) == (1.0, 0.0, 0.0) and not even.is_straggling()
    alternating = find_straggler([[1.0, 2.0, 1.0, 2.0], [2.0, 1.0, 2.0, 1.01]])
    assert not alternating.is_straggling() and alternating.waiting_fraction > 0.2
    assert find_straggler([[0.0], [0.0]]).ratio == 1.0
    for wrong in ([], [[]], [[1.0], [1.0, 2.0]], [[-1.0]], [[math.nan]]):
        with pytest.raises(ValueError, match="seconds"):
            find_straggler(wrong)


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for entry in optimizer.state.values() for value in entry.values()]
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers(), *moments, torch.get_rng_state())]


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: object) -> None:
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def test_a_snapshot_goes_back_to_the_bit_and_uses_its_memory_again() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
    snapshot = MemorySnapshot(model, optimizer, scheduler)
    with pytest.raises(ValueError, match="holds nothing"):
        snapshot.restore()
    snapshot.take(0)  # an optimizer without a state
    start = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, scheduler)
    snapshot.take(1)
    there, lr = state(model, optimizer), scheduler.get_last_lr()
    kept = {path: buffer.data_ptr() for path, buffer in snapshot._buffers.items()}
    assert ("weights", "0.bias") not in kept and ("weights", "1.running_mean") in kept
    runs = []
    for _ in range(2):
        model.eval()
        snapshot.restore()
        assert model.training and snapshot.step == 1
        assert all(map(torch.equal, there, state(model, optimizer))) and scheduler.get_last_lr() == lr
        for _ in range(2):
            step(model, optimizer, scheduler)
        runs.append(state(model, optimizer))
    assert all(map(torch.equal, *runs)), "what was put back is not the copy itself"
    snapshot.take(3)
    assert {path: buffer.data_ptr() for path, buffer in snapshot._buffers.items()} == kept
    assert not all(map(torch.equal, start, model.parameters()))


def test_a_state_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from hf_effi.checkpoint import memory_snapshot

    model = torch.nn.Linear(1024, 256, bias=False)
    snapshot = MemorySnapshot(model, torch.optim.SGD(model.parameters(), lr=0.1))
    free = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=2**20))
    monkeypatch.setattr(memory_snapshot, "psutil", free)
    with pytest.raises(RefusedError, match=r"needs 0.00 GiB of host memory and 0.00 GiB are free.*LoRA"):
        snapshot.take(0)
    assert not snapshot.is_taken and snapshot.nbytes == 0


def test_what_memory_saves_by_hand() -> None:
    cost = RewindCost(100, take_seconds=0.5, restore_seconds=0.25, disk_save_seconds=3.0, disk_load_seconds=2.25)
    # [(2.25 - 0.25) + (100 - 10) x 0.2 / 2] / 50 - 0.5 / 10
    assert cost.saved_seconds(0.2, 10, 100, 50) == pytest.approx(11 / 50 - 0.05)
    assert cost.saved_seconds(0.2, 1, 100, 10_000) < 0
    with pytest.raises(ValueError, match="save_steps=0 must be above 0"):
        cost.saved_seconds(0.2, 1, 0, 10)
