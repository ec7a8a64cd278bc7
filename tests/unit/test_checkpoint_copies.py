"""Copies that wait, on a stream that is not there; and processes that finish one checkpoint by files."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi.checkpoint import ranks, repair_run_dir
from hf_effi.checkpoint.commit import Commit
from hf_effi.checkpoint.copies import ChangedByTheOptimizer, Copies
from hf_effi.errors import RefusedError
from tests.unit.test_checkpoint_folders import fill


class SlowStream:
    """As a device does it: what is copied is there after `synchronize`, and not before."""

    def __init__(self) -> None:
        self.queued: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.open = threading.Event()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.queued.append((destination, source))

    def synchronize(self) -> None:
        assert self.open.wait(60)
        for destination, source in self.queued:
            destination.copy_(source)


class Everything:
    """May wait."""

    def may_wait(self, tensor: torch.Tensor) -> bool:
        return True

    def changes(self, tensor: torch.Tensor) -> int:
        return tensor._version


def test_the_wait_is_for_the_stream_and_not_for_its_orders() -> None:
    stream, source, room = SlowStream(), torch.arange(4.0), torch.zeros(4)
    copies = Copies(Everything(), lambda device: stream)
    copies.add(room, source)
    assert copies.nbytes == 16 and not stream.queued, "nothing before begin()"
    copies.begin()
    waiting = threading.Thread(target=copies.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive() and not room.any(), "the update of the optimizer waits"
    stream.open.set()
    waiting.join()
    assert torch.equal(room, source)
    copies.wait()  # once more is nothing


def test_without_a_rule_everything_is_copied_at_once() -> None:
    room = torch.zeros(2)
    copies = Copies()
    copies.add(room, torch.ones(2))
    assert torch.equal(room, torch.ones(2)) and copies.nbytes == 0


def test_a_tensor_that_was_changed_meanwhile_and_a_copy_that_fails() -> None:
    source = torch.nn.Parameter(torch.ones(2))
    copies = Copies(Everything())
    copies.add(torch.zeros(2), source)
    copies.begin()
    with torch.no_grad():
        source.add_(1)
    with pytest.raises(RefusedError, match="1 of 1 tensors were changed between a save and the optimizer's next"):
        copies.wait()
    copies.add(torch.zeros(3), source)  # of another shape
    copies.begin()
    with pytest.raises(RuntimeError, match="size"):
        copies.wait()


def test_what_only_the_optimizer_changes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.register_buffer("shared", model[0].bias.detach())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    may_wait = ChangedByTheOptimizer(model, optimizer).may_wait
    state = optimizer.state[model[0].weight]
    assert may_wait(model[0].weight) and may_wait(model.state_dict()["0.weight"]) and may_wait(state["exp_avg"])
    assert may_wait(model[0].weight.detach()[1:]), "a view of it"
    assert not may_wait(model[1].running_mean), "changes in a forward"
    assert not may_wait(model[0].bias), "a buffer has the same memory"
    assert not may_wait(torch.ones(2)) and not may_wait(model[0].weight.detach().clone())
    assert not may_wait(torch.empty(0))


def test_changes_of_what_was_detached_and_of_the_state() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    rule, seen = ChangedByTheOptimizer(model, optimizer), model.weight.detach()[1:]
    moment = optimizer.state[model.weight]["exp_avg"]
    before = rule.changes(seen), rule.changes(moment), rule.changes(model.bias)
    with torch.no_grad():
        model.weight.add_(1)
    assert rule.changes(seen) > before[0] and rule.changes(model.bias) == before[2]
    optimizer.step()
    assert rule.changes(moment) > before[1] and rule.changes(model.bias) > before[2]


# --- processes -------------------------------------------------------------------------------------------------------


def begun(tmp_path: Path, **over: Any) -> tuple[Commit, Commit]:
    leader, other = (Commit(tmp_path, 4, leader=rank == 0, rank=rank, **over) for rank in (0, 1))
    leader.others = (1,)
    leader.begin()
    other.join()
    fill(leader.made, 4)
    return leader, other


def test_the_leader_waits_for_the_report_of_the_other(tmp_path: Path) -> None:
    leader, other = begun(tmp_path)
    thread = threading.Thread(target=leader.finish)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and not leader.final.exists()
    other.finish()
    thread.join(60)
    assert leader.final.is_dir() and [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_process_that_has_ended_one_that_failed_and_one_that_hangs(tmp_path: Path, monkeypatch: Any) -> None:
    leader, other = begun(tmp_path)
    other.release()  # as the system does it for a process that is killed
    with pytest.raises(OSError, match="process 1 ended before it had written its part"):
        leader.finish()
    assert list(tmp_path.iterdir()) == []
    leader, other = begun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(other, "sync_files", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.finish()
    with pytest.raises(OSError, match="process 1: ZeroDivisionError: division by zero"):
        leader.finish()
    leader, other = begun(tmp_path, patience=0.05)
    with pytest.raises(TimeoutError, match="process 1 has not written its part, and nothing for 0 seconds"):
        leader.finish()
    other.release()


def test_a_lock_of_another_machine_says_nothing(tmp_path: Path) -> None:
    leader, other = begun(tmp_path, patience=0.05)
    other.release()
    (leader.aside / f"{ranks.LOCK}-1").write_text("elsewhere")
    with pytest.raises(TimeoutError):
        leader.finish()


def test_a_process_that_is_slow_but_writes_is_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    class Clock:
        """A second passes at each look, and between two looks a byte is written."""

        now = 0

        def monotonic(self) -> int:
            self.now += 1
            return self.now

        def sleep(self, seconds: float) -> None:
            assert seconds <= 0.25
            (tmp_path / "part").write_bytes(bytes(self.now))
            if self.now > 20:
                ranks.report(tmp_path, 1, {"optimizer_0": []})

    monkeypatch.setattr(ranks, "time", Clock())
    assert ranks.reports_of(tmp_path, [1], patience=2) == [{"optimizer_0": []}]
    assert ranks.time.now > 20


def test_repair_waits_for_every_process_that_writes(tmp_path: Path) -> None:
    leader, other = begun(tmp_path)
    leader.release()
    with pytest.raises(TimeoutError, match="Somebody has been writing"):
        repair_run_dir(tmp_path, wait_seconds=0.05)
    other.release()
    assert repair_run_dir(tmp_path) == ["checkpoint-4 was being written and not complete: deleted."]
