"""A checkpoint of a stranger never runs code: a hostile pickle is refused in the place of every state file of ours."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_effi
from hf_effi import LRScheduleCallback
from hf_effi._files import CHECKPOINT_PREFIXES
from hf_effi.callbacks._side_file import SideFileCallback
from hf_effi.errors import BrokenFileError
from hf_effi.functional.schedules import wsd
from hf_effi.samplers import ShuffledSampler
from hf_effi.selection import VIP, ShuffledPrompts
from hf_effi.trainers.mixins import SamplerMixin
from tests.contract._sources import python_files, shown, tree_of
from tests.helpers import callback_cases, lm_dataset, prompt_dataset, push_args, run_grpo, tiny_qwen3
from tests.helpers.callback_cases import CASES, settings_of, train
from tests.helpers.grpo import grpo_args
from tests.helpers.public import public_objects

#: an update at which every callback with a file of its own has something to store: inside of a search, or of a window
STOPS = {"AutoLRSCallback": 10}
LATE = 29


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.marker,)


def raw(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps({"model": bomb}))


def zipped(path: Path, bomb: Bomb) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}, "average": bomb, "pattern": bomb}, path)


def legacy(path: Path, bomb: Bomb) -> None:
    torch.save([bomb], path, _use_new_zipfile_serialization=False)


KINDS = (raw, zipped, legacy)


def state_files(checkpoint: Path) -> list[Path]:
    """Return our files in a checkpoint that are not text."""
    ours = [path for path in sorted(checkpoint.iterdir()) if path.name.startswith(CHECKPOINT_PREFIXES)]
    return [path for path in ours if path.suffix not in (".json", ".jsonl")]


def check_each(checkpoint: Path, resume: Callable[[], Any], marker: Path) -> list[str]:
    """Put each kind of bomb into the place of each state file; return the names of the files."""
    files = state_files(checkpoint)
    for path in files:
        whole = path.read_bytes()
        for write in KINDS:
            write(path, Bomb(marker))
            with pytest.raises(BrokenFileError, match=path.name):
                resume()
            assert not marker.exists(), f"{path.name} ran code ({write.__name__})"
        path.write_bytes(whole)
    return [path.name for path in files]


def test_the_bombs_go_off_where_a_pickle_is_trusted(tmp_path: Path) -> None:
    for number, write in enumerate(KINDS):
        path, marker = tmp_path / f"{number}.pt", tmp_path / f"marker-{number}"
        write(path, Bomb(marker))
        if write is raw:
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert marker.is_dir()


@pytest.mark.parametrize("name", sorted(CASES))
def test_of_every_callback(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback_cases.without_network(monkeypatch)
    settings, model = settings_of([name])
    stop = STOPS.get(name, LATE)
    train(tmp_path, [name], settings, model, stop=stop)
    found = check_each(
        tmp_path / f"checkpoint-{stop}",
        lambda: train(tmp_path, [name], settings, model, resume=stop),
        tmp_path / "marker",
    )
    keeps = issubclass(public_objects()[name], SideFileCallback) and name not in callback_cases.NOTHING_TO_KEEP
    assert len(found) == int(keeps), found


class Ordered(SamplerMixin, Trainer):
    pass


def test_of_samplers(tmp_path: Path) -> None:
    def run(resume: str | None = None) -> None:
        args = push_args(tmp_path, save_steps=3)
        Ordered(tiny_qwen3(), args, train_dataset=lm_dataset(16), train_sampler=ShuffledSampler(16)).train(resume)

    run()
    checkpoint = tmp_path / "checkpoint-3"
    found = check_each(checkpoint, lambda: run(str(checkpoint)), tmp_path / "marker")
    assert found == ["effi_sampler.pt"]


def test_of_grpo(tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> None:
        args = grpo_args(
            tmp_path,
            hf_effi.EffiGRPOConfig,
            max_steps=4,
            num_iterations=2,
            save_strategy="steps",
            save_steps=1,
            difficulty_range=(0, 1),
        )
        data = prompt_dataset(9)
        run_grpo(hf_effi.EffiGRPOTrainer, args, train_dataset=data, resume_from_checkpoint=resume and str(resume))

    run()
    checkpoint = tmp_path / "checkpoint-3"
    found = check_each(checkpoint, lambda: run(checkpoint), tmp_path / "marker")
    assert found == ["effi_prompts.pt", "effi_rollouts_0.pt"]


def test_of_grpo_whose_state_names_a_file_or_holds_no_states(tmp_path: Path) -> None:
    """The names of our files are ours: one in the JSON of a stranger leads nowhere."""

    def run(resume: Path | None = None) -> None:
        over = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        args = grpo_args(tmp_path, hf_effi.EffiGRPOConfig, **over)
        objects = {"prompt_selector": ShuffledPrompts(9), "rollout_allocator": VIP(warmup_passes=0)}
        run_grpo(
            hf_effi.EffiGRPOTrainer,
            args,
            train_dataset=prompt_dataset(9),
            resume_from_checkpoint=resume and str(resume),
            **objects,
        )

    run()
    checkpoint = tmp_path / "checkpoint-1"
    state = json.loads((checkpoint / "effi_state.json").read_text())
    outside = tmp_path / "outside.pt"
    torch.save({"size": 9, "seed": 0, "cursor": 10**9}, outside)
    hostile = {"prompts": str(outside), "objects": "../outside.pt"}
    (checkpoint / "effi_state.json").write_text(json.dumps({**state, **hostile}))
    run(checkpoint)  # reads its own files
    for world in (10**12, "many", None, True, 0):
        (checkpoint / "effi_state.json").write_text(json.dumps({**state, "world_size": world}))
        with pytest.raises(BrokenFileError, match="processes. Resume from another checkpoint"):
            run(checkpoint)
    (checkpoint / "effi_state.json").write_text(json.dumps(state))
    for content in ([1, 2], {"rollout_allocator": 3}, {"rollout_allocator": {"state": {}}}):
        torch.save(content, checkpoint / "effi_selection.pt")
        with pytest.raises(ValueError):
            run(checkpoint)


@pytest.mark.parametrize("kind", ["os:system", "subprocess:Popen", "hf_effi.cli:main", "antigravity:x"])
def test_of_schedules_whose_state_names_a_class(tmp_path: Path, kind: str) -> None:
    def run(resume: str | None = None) -> None:
        args = push_args(tmp_path, save_steps=3)
        callbacks = [LRScheduleCallback(wsd(warmup_steps=1, decay_steps=2))]
        Trainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), callbacks=callbacks).train(resume)

    run()
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    entry = state["stateful_callbacks"]["hf_effi.lr_schedule"]
    for field in ("built", "current"):
        entry[field] = {"kind": kind, "params": {"command": f"mkdir {tmp_path / 'marker'}"}}
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError):
        run(str(path.parent))
    assert not (tmp_path / "marker").exists()


def test_few_places_read_pickles_and_none_trusts_them() -> None:
    readers = {"torch.load", "pickle.load", "pickle.loads", "numpy.load", "np.load", "joblib.load", "dill.load"}
    found = []
    for path in python_files("hf_effi"):
        for call in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in readers:
                trusted = {word.arg: ast.unparse(word.value) for word in call.keywords}.get("weights_only") != "True"
                found.append((shown(path), trusted))
    assert {path for path, trusted in found if not trusted} == {
        "hf_effi/_files.py",
        "hf_effi/callbacks/weight_averaging.py",  # a nameless file of this process
        "hf_effi/checkpoint/convert.py",  # a checkpoint that is converted
        "hf_effi/checkpoint/dcp_files.py",  # the same, of shards
    }
    # A check of a reward hands the function itself to a child of its own and reads the answer, in a folder of its own.
    assert {path for path, trusted in found if trusted} == {
        "hf_effi/report/reward_calls.py",
        "hf_effi/report/reward_child.py",
    }
