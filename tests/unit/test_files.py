"""What a run leaves on the disk is whole: the old file or the new one, whatever ends the process in between."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from hf_effi._files import (
    load_json,
    load_state,
    missing_file,
    save_aside,
    save_bytes,
    save_json,
    save_state,
    save_text,
    state_bytes,
)
from hf_effi.errors import BrokenFileError


def test_a_file_is_forced_to_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def watched_sync(number: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        sync(number)

    def watched_replace(source: Any, target: Any) -> None:
        calls.append(("rename", Path(target).name))
        assert Path(source).parent == Path(target).parent, "another file system could not rename it in one step"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save_text(tmp_path / "deep" / "state.json", "{}")
    (first, part), *rest = calls
    assert first == "sync" and part.startswith("_") and part.endswith("_state.json")
    assert rest == [("rename", "state.json"), ("sync", "deep")]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.json"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, OSError])
def test_what_stood_there_stays_where_writing_fails(tmp_path: Path, stop: type[BaseException]) -> None:
    path = tmp_path / "state.json"
    save_json(path, {"step": 1})

    def half(part: Path) -> None:
        part.write_text('{"step": ')
        raise stop

    with pytest.raises(stop):
        save_aside(path, half)
    assert load_json(path) == {"step": 1} and os.listdir(tmp_path) == ["state.json"]


def test_a_full_disk_is_an_error_and_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_bytes(tmp_path / "weights.pt", b"x")
    assert os.listdir(tmp_path) == []


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "theirs", tmp_path / "state.json"
    target.write_text("theirs")
    link.symlink_to(target)
    save_text(link, "ours")
    assert target.read_text() == "theirs" and link.read_text() == "ours" and not link.is_symlink()


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def make(part: Path) -> None:
        part.mkdir()
        (part / "new").write_text("2")

    folder = tmp_path / "averaged"
    for _ in range(2):
        save_aside(folder, make)
        (folder / "old").write_text("1")
    save_aside(folder, make)
    assert [path.name for path in folder.iterdir()] == ["new"] and os.listdir(tmp_path) == ["averaged"]
    with pytest.raises(ZeroDivisionError):
        save_aside(folder, lambda part: (make(part), 1 / 0))
    assert [path.name for path in folder.iterdir()] == ["new"] and os.listdir(tmp_path) == ["averaged"]


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    save_text(tmp_path / "ours", "")
    (tmp_path / "theirs").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_states_come_back(tmp_path: Path) -> None:
    state = {
        "scores": torch.arange(3.0),
        "seen": [1, 2],
        "name": "x",
        "none": None,
        "deep": {"t": (torch.ones(1), 2.5)},
    }
    save_bytes(tmp_path / "a.pt", state_bytes(state, "a selector"))
    save_state(tmp_path / "b.pt", state)
    for name in ("a.pt", "b.pt"):
        found = load_state(tmp_path / name)
        assert torch.equal(found.pop("scores"), state["scores"]) and found.pop("deep")["t"][1] == 2.5
        assert found == {"seen": [1, 2], "name": "x", "none": None}


class Own:
    pass


@pytest.mark.parametrize(
    "value", [numpy.arange(3), Own(), lambda: 1, numpy.float64(1.0)], ids=lambda v: type(v).__name__
)
def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_stored(value: Any) -> None:
    with pytest.raises(ValueError, match=r"state of prompt_selector \(Mine\) cannot be stored.*Return tensors"):
        state_bytes({"scores": value}, "prompt_selector (Mine)")


class Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("echo run > ran",))


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Hostile()}, "state.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("state.pt", "plain.pt"):
        with pytest.raises(BrokenFileError, match=f"{name} is damaged or not a state of hf_effi"):
            load_state(name)
    assert not Path("ran").exists()


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    save_state(tmp_path / "torn.pt", {"a": torch.ones(1000)})
    content = (tmp_path / "torn.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "torn.json").write_text('{"step": ')
    with pytest.raises(BrokenFileError, match=r"torn\.pt is damaged"):
        load_state(tmp_path / "torn.pt")
    with pytest.raises(BrokenFileError, match=r"torn\.json is damaged.*Resume from another checkpoint"):
        load_json(tmp_path / "torn.json")
    for load in (load_state, load_json):
        with pytest.raises(BrokenFileError, match="checkpoint-3 has no lost, which was written with it"):
            load(tmp_path / "checkpoint-3" / "lost")
    assert "Copy the file too" in str(missing_file(tmp_path / "lost"))


def test_json_keeps_its_options(tmp_path: Path) -> None:
    save_json(tmp_path / "a.json", {"b": 1, "a": 2}, indent=1, sort_keys=True)
    assert (tmp_path / "a.json").read_text() == json.dumps({"a": 2, "b": 1}, indent=1) + "\n"
