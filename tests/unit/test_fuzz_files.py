"""
Files of strangers, changed at random: records, trainer states, cards, YAML, side files of checkpoints.

Whatever they hold, they are read or refused in one short sentence; nothing is opened, imported, connected, started or
left behind. The suite runs a part; `make fuzz` runs thirty times as many cases, from other seeds. Recipes have their
fuzz in `test_card_allow_list.py`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_effi import cli
from hf_effi._files import load_json, load_state, save_state
from hf_effi._run_record import EVENTS, FOLDER, SUMMARY, RunStore
from hf_effi.callbacks.run_summary import summary_lines
from hf_effi.checkpoint import written_in_probe
from hf_effi.cli_train import make_parser, other_keys
from hf_effi.cli_yaml import problems_of_keys, read_config
from hf_effi.errors import BrokenFileError, RecipeError
from hf_effi.hub.model_card import add_section
from hf_effi.hub.recipe import read_recipe
from hf_effi.report.plan_lr import _read_curve
from hf_effi.report.run_data import load_group
from hf_effi.report.run_page import numbers, render_run_page
from hf_effi.schedules.branch import branch_cooldown
from tests.helpers.audit import files_below, watched
from tests.helpers.fuzz import damaged, mutated

ROUNDS = int(os.environ.get("HF_EFFI_FUZZ", "1"))
FIRST_SEED = 1000 if ROUNDS > 1 else 0
#: what a test may touch: its own folder
SEEDS = range(FIRST_SEED, FIRST_SEED + ROUNDS)


def check_sentence(error: Exception | str) -> None:
    text = str(error)
    assert text and len(text) < 1500 and len(text.splitlines()) == 1, text[:2000]


def record(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the two files of a record as data."""
    store = RunStore(folder / FOLDER)
    header = {
        "arguments": {"learning_rate": 1e-3},
        "model": {"class": "Tiny", "name": "a/b", "parameters": 5, "trainable": 5},
        "machine": {"cpu": "x", "cores": 2},
        "versions": {"torch": "2", "transformers": "5"},
        "data": {"train": {"rows": 5}},
        "command": "train.py",
    }
    store.begin(header, 0)
    totals = {
        "updates": 2, "seconds": {"train": 1.5, "data": 0.5}, "phases": {"gen": 0.5, "train": 0.5},
        "tokens": {"forwarded": 30, "real": 20, "saved": 5}, "rows": {"generated": 8, "trained": 6},
        "drops": {"pruned": 2},
        "peak_memory_bytes": {"host": 2**30},
    }  # fmt: skip
    for step in range(1, 5):
        values = {"loss": 2 / step, "learning_rate": 1e-3, "reward": 0.5, "effi/dropped/pruned": 1.0}
        store.event("log", step=step, values=values, totals=totals)
    store.event("checkpoint", step=4, path="checkpoint-4", totals=totals)
    finding = {"rule": "lr_zero", "step": 3, "problem": "The LR is 0", "advice": "set it", "severity": "problem"}
    store.save(
        status="finished",
        progress={"step": 4, "epoch": 1.0},
        findings=[finding],
        methods=["wsd"],
        schedule={"kind": "wsd"},
    )
    summary = json.loads((folder / FOLDER / SUMMARY).read_text())
    return summary, [json.loads(line) for line in (folder / FOLDER / EVENTS).read_text().splitlines()]


def written(data: Any, rng: random.Random) -> bytes:
    """Return data as a stranger's file: changed as data, as bytes, or both."""
    text = json.dumps(mutated(data, rng) if rng.random() < 0.8 else data).encode()
    return damaged(text, rng) if rng.random() < 0.3 else text


@pytest.fixture
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("seed", SEEDS)
def test_records(tmp_path, seed):
    rng, folder = random.Random(seed), tmp_path / "run"
    summary, events = record(folder)
    render_run_page({"run": load_group(folder)})  # whatever is imported on first use
    kept = files_below(tmp_path)
    read = refused = drawn = 0
    for number in range(400):
        (folder / FOLDER / SUMMARY).write_bytes(
            written(summary, rng) if rng.random() < 0.7 else json.dumps(summary).encode()
        )
        lines = [written(event, rng) if rng.random() < 0.15 else json.dumps(event).encode() for event in events]
        (folder / FOLDER / EVENTS).write_bytes(b"\n".join(lines))
        with watched(str(tmp_path), "hf_effi/report/templates/"):
            try:
                runs = load_group(folder)
                numbers({"run": runs})
                summary_lines(runs[0])
                if number % 60 == 0:
                    assert "<svg" in render_run_page({"a$b$": runs})
                    drawn += 1
            except BrokenFileError as error:
                check_sentence(error)
                refused += 1
                continue
        read += 1
    assert read > 50 and refused > 50 and drawn and files_below(tmp_path) == kept


STATE = {
    "global_step": 8,
    "max_steps": 8,
    "log_history": [{"step": n, "loss": 2 / n, "learning_rate": 1e-3, "epoch": n / 8} for n in range(1, 9)],
    "stateful_callbacks": {
        "hf_effi.probes": {"blocks": [[3, 4, 2]]},
        "hf_effi.lr_schedule": {
            "current": {"kind": "wsd", "version": 1, "params": {"total_steps": 8, "warmup_steps": 1}},
            "step": 8,
            "learning_rate": 1e-3,
            "base_lrs": [1e-3],
        },
    },
}


@pytest.mark.parametrize("seed", SEEDS)
def test_trainer_states(tmp_path, seed):
    rng, folder = random.Random(seed), tmp_path / "checkpoint-8"
    folder.mkdir()
    read = refused = 0
    readers = (load_group, lambda path: _read_curve(str(path), None), written_in_probe,
               lambda path: branch_cooldown(path, 4, tmp_path / "branch"))  # fmt: skip
    for _ in range(400):
        (folder / "trainer_state.json").write_bytes(written(STATE, rng))
        for reader in readers:
            with watched(str(tmp_path), "<DirEntry 'trainer_state.json'>"):  # which a branch copies
                try:
                    reader(folder)
                    read += 1
                except ValueError as error:
                    check_sentence(error)
                    refused += 1
    assert read > 100 and refused > 100


CARD = "---\nlicense: mit\ntags: [a, b]\nbase_model: me/x\nmodel-index: []\n---\n# A model\n\nText.\n"
RECIPE = {
    "schema": 1,
    "methods": ["wsd"],
    "schedule": {"kind": "wsd", "params": {"warmup_steps": 2}},
    "not_carried": {},
    "model": {"name": None, "class": "Qwen3ForCausalLM"},
    "trainer": "transformers.trainer:Trainer",
}


@pytest.mark.parametrize("seed", SEEDS)
def test_cards(tmp_path, seed, monkeypatch):
    monkeypatch.setattr("hf_effi.hub.model_card._write_picture", lambda path, run: None)
    rng, path, run = random.Random(seed), tmp_path / "README.md", {"log_history": []}
    path.write_text(CARD)
    add_section(path, RECIPE, run, "me/run")
    whole, read, refused = path.read_bytes(), 0, 0
    for _ in range(150):
        content = damaged(whole, rng)
        for _ in range(rng.randrange(3)):
            content = damaged(content, rng)
        path.write_bytes(content)
        with watched(str(tmp_path)):
            try:
                read_recipe(path)
                read += 1
            except RecipeError as error:
                check_sentence(error)
                refused += 1
            try:
                add_section(path, RECIPE, run, "me/run")
                assert read_recipe(path) == RECIPE
            except BrokenFileError as error:
                check_sentence(error)
    assert read > 20 and refused > 20


def configs() -> list[dict[str, Any]]:
    common = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 5,
        "learning_rate": 1e-3,
              "eval_strategy": "no", "lr_schedule": "wsd", "lr_schedule_kwargs": {"warmup_steps": 1}}  # fmt: skip
    return [
        {
            **common,
            "packing": True,
            "dataset_name": "data",
            "model_name_or_path": "model",
            "datasets": [{"path": "data"}],
        },
        {
            **common,
            "reward_funcs": ["mine.score"],
            "num_generations": 4,
            "prune_rate": 0.5,
            "difficulty_range": [0.1, 0.9],
        },
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_yaml(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "run.yaml"
    parsers = {kind: make_parser(kind) for kind in ("sft", "grpo")}
    others = {kind: other_keys(kind) for kind in parsers}
    outcomes = {"valid": 0, "refused": 0, "unreadable": 0}
    for _ in range(350):
        kind = rng.choice(["sft", "grpo"])
        data = configs()[kind == "grpo"]
        text = yaml.safe_dump(mutated(data, rng) if rng.random() < 0.8 else data).encode()
        path.write_bytes(damaged(text, rng) if rng.random() < 0.5 else text)
        with watched(str(tmp_path)):
            config, failure = read_config(str(path))
            problems = [failure] if failure else problems_of_keys(parsers[kind], config, others[kind])
        for problem in problems:
            check_sentence(problem)
        assert len(problems) <= 21
        outcomes["unreadable" if failure else "refused" if problems else "valid"] += 1
    assert all(count > 15 for count in outcomes.values()), outcomes


@pytest.mark.parametrize("seed", SEEDS)
def test_yaml_is_validated_without_acting(tmp_path, seed, monkeypatch, capsys):
    """The whole command: what a file names may be looked for, and nothing of it is imported, started or asked for."""
    rng = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')\ndef score(): pass\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a"}\n')
    whole = {"model_name_or_path": "model", "dataset_name": "data"}
    for data in configs():
        Path("run.yaml").write_text(yaml.safe_dump({**data, **whole}))
        assert cli.main(["validate", "run.yaml"]) == 0, capsys.readouterr()
    kept, codes = files_below(tmp_path), []
    environment = dict(os.environ)
    for _ in range(30):
        data = {**rng.choice(configs()), **whole}
        data = mutated(data, rng) if rng.random() < 0.8 else data
        Path("run.yaml").write_text(yaml.safe_dump(data))
        named = [part for part in ("/etc/passwd", "../../x") if part in str(data)]
        with watched(str(tmp_path), "run.yaml", "model", "data", "mine.py", "/site-packages", *named):
            codes.append(cli.main(["validate", "run.yaml"]))
        shown = capsys.readouterr()
        for line in shown.err.splitlines():
            check_sentence(line)
    assert set(codes) == {0, 1} and files_below(tmp_path) == kept and "mine" not in sys.modules
    assert dict(os.environ) == environment


@pytest.mark.parametrize("seed", SEEDS)
def test_side_files(tmp_path, seed):
    """
    A pickle in one would run as it is loaded: `torch.load` without its unpickler of plain data would open a file here.
    """
    rng, path = random.Random(seed), tmp_path / "effi_state.pt"
    save_state(path, {"step": 3, "weights": [torch.zeros(2)], "names": {"a": 1.5, "b": None}})
    contents = [
        path.read_bytes(),
        json.dumps({"schema": 1, "step": 3, "rows": [1, 2, {"a": None}]}).encode(),
        b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.",
    ]
    kept, read, refused = files_below(tmp_path), 0, 0
    for _ in range(600):
        path.write_bytes(damaged(rng.choice(contents), rng))
        for load in (load_state, load_json):
            with watched(str(tmp_path)):
                try:
                    load(path)
                    read += 1
                except BrokenFileError as error:
                    check_sentence(error)
                    refused += 1
    assert read > 5 and refused > 100 and files_below(tmp_path) == kept
