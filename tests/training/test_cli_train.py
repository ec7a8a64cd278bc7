"""`hf-effi validate`, `grpo`, `sft` and `completion`: TRL's conventions, checked before a model is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import trl
import yaml
from transformers import AutoModelForCausalLM

from hf_effi import cli, read_run
from tests.helpers import prompt_dataset, save_tiny, sft_dataset, tiny_qwen3, tiny_tokenizer

GOOD = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": "1e-3"}


def write(tmp_path, **over):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **over}))
    return str(path)


@pytest.fixture
def whole(tmp_path):
    """What a file needs beside its settings: a folder with a model, rows, and for GRPO a reward."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a", "text": "b"}\n')
    return {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "data")}


REWARD = {"reward_funcs": ["tests.helpers.data.length_reward"]}


def test_a_good_file_is_valid(tmp_path, capsys, whole):
    own = {"prune_rate": 0.5, "num_generations": 4, "per_device_train_batch_size": 8, "lr_schedule": "wsd"}
    path = write(tmp_path, **own, **whole, **REWARD)
    assert cli.main(["validate", path]) == 0
    assert "valid for `hf-effi grpo`" in capsys.readouterr().out
    assert cli.main(["validate", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "config": path,
        "kind": "grpo",
        "valid": True,
        "problems": [],
        "notes": [],
    }
    assert cli.main(["validate", write(tmp_path, packing=True, **whole)]) == 0


@pytest.mark.parametrize(
    "over, words",
    [
        ({"prune_rat": 0.5}, ["prune_rat: unknown key", "Did you mean prune_rate?"]),
        ({"prune_rate": "much"}, ["prune_rate", "'much' is str", "float"]),
        ({"prune_rate": 1.5}, ["prune_rate must be in [0, 1)", "1.5"]),
        ({"num_generations": 4.5}, ["num_generations", "4.5"]),
        ({"logging_steps": True, "max_steps": [1]}, ["logging_steps", "max_steps", "[1] is list"]),
        ({"loss_type": {"a": 1}}, ["loss_type"]),
        ({"prune_metric": "biggest"}, ["prune_metric", "'smallest'"]),
        ({"eval_strategy": "sometimes"}, ["sometimes"]),
        ({"lr_scheduler_type": "nonsense"}, ["nonsense"]),
        ({"lr_schedule": "wds"}, ["'wds'", "wsd"]),
        ({"lr_schedule": "wsd", "lr_schedule_kwargs": {"warm_steps": 3}}, ["warm_steps"]),
        ({"lr_schedule": "wsd", "lr_scheduler_type": "cosine"}, ["lr_scheduler_type"]),
        ({"lr_schedule_kwargs": {"warmup_steps": 3}}, ["needs lr_schedule"]),
        ({"kernel_patch": "ligr"}, ["kernel_patch='ligr'", "'liger'"]),
        ({"sequence_parallel_size": 0}, ["sequence_parallel_size=0", "at least 1"]),
        ({"difficulty_max_rounds": 5}, ["difficulty_max_rounds=5 acts only where groups are filtered"]),
        ({"prune_normalizer": "original"}, ["prune_normalizer='original'", "Set prune_rate"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_told(tmp_path, capsys, over, words):
    assert cli.main(["validate", write(tmp_path, **over), "--kind", "grpo"]) == 1
    told = capsys.readouterr().err
    assert all(word in told for word in words), told


def test_no_file_and_no_yaml(tmp_path, capsys):
    assert cli.main(["validate", str(tmp_path / "none.yaml")]) == 1
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert cli.main(["validate", str(tmp_path / "bad.yaml")]) == 1
    (tmp_path / "list.yaml").write_text("- 1")
    assert cli.main(["validate", str(tmp_path / "list.yaml")]) == 1
    assert "mapping" in capsys.readouterr().err


def test_training_refuses_an_unknown_key_before_anything_is_loaded(tmp_path, capsys):
    path = write(tmp_path, model_name_or_path="no/such-model", prune_rat=0.5)
    assert cli.main(["grpo", "--config", path]) == 2
    assert "Did you mean prune_rate?" in capsys.readouterr().err
    path = write(tmp_path, model_name_or_path="no/such-model", dataset_name="data", lr_schedule="wds")
    assert cli.main(["sft", "--config", path]) == 2
    assert "'wds'" in capsys.readouterr().err


def test_a_misspelt_key_tells_the_kind_too(tmp_path, capsys):
    assert cli.main(["validate", write(tmp_path, num_generation=4)]) == 1
    assert "num_generation: unknown key. Did you mean num_generations?" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_yaml_trains(tmp_path, kind, capsys):
    save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")
    rows = (prompt_dataset(8) if kind == "grpo" else sft_dataset(8)).to_list()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"prune_rate": 0.5, "num_generations": 4, "max_completion_length": 4} if kind == "grpo" else {}
    if kind == "grpo":
        own |= {"reward_funcs": ["tests.helpers.data.length_reward"]}
    path = write(
        tmp_path,
        **own,
        output_dir=str(tmp_path / "out"),
        model_name_or_path=str(tmp_path / "model"),
        dataset_name=str(tmp_path / "data"),
        lr_schedule="wsd",
        per_device_train_batch_size=4,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
    )
    stock = trl.GRPOTrainer, trl.SFTTrainer
    assert cli.main([kind, "--config", path, "--max_steps", "2"]) == 0
    assert (trl.GRPOTrainer, trl.SFTTrainer) == stock
    record = read_run(tmp_path / "out")
    assert record["progress"]["step"] == 2 and "wsd" in record["methods"]
    assert ("cppo" in record["methods"]) is (kind == "grpo")
    assert "***** hf_effi: 2 steps" in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    start = tiny_qwen3(end_tokens=10).state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start)


def test_the_conventions_of_trl_hold(tmp_path, capsys, whole):
    path = write(tmp_path, env={"EXAMPLE": "1"}, max_steps="3", gradient_accumulation_steps="2", **whole)
    assert cli.main(["validate", path]) == 0, "`env` and numbers as text are TRL's conventions"


#: change of a whole GRPO file -> words of what is told
UNRESOLVED = {
    "no reward": ({"reward_funcs": None}, ["no reward: give reward_funcs"]),
    "no data": ({"dataset_name": None}, ["no data: give dataset_name"]),
    "no model": ({"model_name_or_path": None}, ["no model: give model_name_or_path"]),
    "a misspelt reward of TRL": ({"reward_funcs": ["accuracy_rewrd"]}, ["'accuracy_rewrd'", "Did you mean "
        "accuracy_reward?"]),
    "a reward without a module": ({"reward_funcs": ["f"]}, ["'f' is no reward function", "module.function"]),
    "no such module": ({"reward_funcs": ["no_such.f"]}, ["no module 'no_such'", "in this folder"]),
    "no such submodule": ({"reward_funcs": ["json.no_such.f"]}, ["no module 'json.no_such'"]),
    "no such function": ({"reward_funcs": ["json.dumpz"]}, ["module json has no 'dumpz'", "Did you mean dump?"]),
    "a function that is not in this folder's file": ({"reward_funcs": ["mine.scor"]}, ["mine has no 'scor'", "score"]),
    "no such folder of a model": ({"model_name_or_path": "./nowhere"}, ["model_name_or_path: './nowhere' is neither a "
        "folder"]),
    "a folder without a model": ({"model_name_or_path": "empty"}, ["'empty' has no config.json"]),
    "no such reward model": ({"reward_model_name_or_path": "/no/such"}, ["reward_model_name_or_path: '/no/such'"]),
    "no such folder of rows": ({"dataset_name": "./nowhere"}, ["dataset_name: './nowhere' is neither a folder"]),
    "a folder without rows": ({"dataset_name": "empty"}, ["dataset_name: 'empty'", "data files"]),
    "no such split": ({"dataset_train_split": "validation"}, ["has no split 'validation'; it has train"]),
    "no split to evaluate on": ({"eval_strategy": "steps", "eval_steps": 5}, ["has no split 'test'"]),
    "no such configuration": ({"dataset_config": "french"}, ["'french'"]),
    "a mixture": ({"datasets": [{"path": "json", "data_files": "none.json"}]}, ["datasets[0]: there is no file "
        "'none.json'"]),
    "a package": ({"report_to": "swanlab"}, ["report_to: swanlab needs `swanlab`", "pip install swanlab"]),
    "a package of an extra": ({"kernel_patch": {"RMSNorm": "a/b:C"}}, ["kernel_patch needs `kernels`",
    "hf_effi[hub]"]),
    "a package of a reward": ({"reward_funcs": ["accuracy_reward"]}, ["accuracy_reward needs "
        "`math-verify`", "hf_effi[rewards]"]),
}  # fmt: skip


@pytest.mark.parametrize("what", UNRESOLVED)
def test_what_the_run_would_not_find_is_told(tmp_path, capsys, monkeypatch, whole, what):
    change, words = UNRESOLVED[what]
    find = importlib.util.find_spec
    absent = ("swanlab", "kernels", "math_verify")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.py").write_text("raise SystemExit('it is not imported')\ndef score(completions):\n    pass\n")
    settings = {"num_generations": 4, "per_device_train_batch_size": 4, **whole, **REWARD, **change}
    path = write(tmp_path, **{name: value for name, value in settings.items() if value is not None})
    assert cli.main(["validate", path, "--kind", "grpo"]) == 1
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert len(told.splitlines()) == 1 and len(told) < 500


@pytest.mark.parametrize(
    "name", ["mine.score", "mine.Score.__call__".rsplit(".", 1)[0], "mine.alias", "package.inner.late"]
)
def test_rewards_of_this_folder_are_found_without_an_import(tmp_path, capsys, monkeypatch, whole, name):
    monkeypatch.chdir(tmp_path)
    text = "from json import dumps as alias\nraise SystemExit('imported')\ndef score(): pass\nclass Score: pass\n"
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "package" / "inner.py").write_text("def __getattr__(name): return print")
    settings = {"num_generations": 4, "per_device_train_batch_size": 4, **whole, "reward_funcs": [name]}
    assert cli.main(["validate", write(tmp_path, **settings)]) == 0, capsys.readouterr().err


def test_what_cannot_be_looked_up_is_a_note(tmp_path, capsys, whole):
    assert cli.main(["validate", write(tmp_path, **{**whole, "model_name_or_path": "no/such-model"})]) == 0
    assert "note: model_name_or_path: 'no/such-model' has no copy here" in capsys.readouterr().out
    assert cli.main(["validate", write(tmp_path, **{**whole, "dataset_name": "no/such-rows"})]) == 0
    assert "note: dataset_name: 'no/such-rows' has no copy here" in capsys.readouterr().out
    mixture = [{"path": "json", "data_files": "https://example.com/rows.json"}]
    assert cli.main(["validate", write(tmp_path, **whole, datasets=mixture)]) == 0
    assert "read from an address" in capsys.readouterr().out


def test_a_copy_in_the_cache_is_found_by_its_revision(tmp_path, capsys, monkeypatch, whole):
    import huggingface_hub

    cache = tmp_path / "cache" / "models--me--run"
    (cache / "snapshots" / "a").mkdir(parents=True)
    (cache / "snapshots" / "a" / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "first").write_text("a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for revision, noted in (("first", False), ("second", True)):
        path = write(tmp_path, **{**whole, "model_name_or_path": "me/run", "model_revision": revision})
        assert cli.main(["validate", path]) == 0
        assert ("has no copy here" in capsys.readouterr().out) is noted


@pytest.mark.parametrize(
    "error, words",
    [
        ("RepositoryNotFoundError", "no such repository on the Hub"),
        ("RevisionNotFoundError", "has no revision 'main'"),
        ("GatedRepoError", "is gated"),
        ("ConnectionError", None),
    ],
)
def test_the_hub_is_asked_where_it_may_be(tmp_path, capsys, monkeypatch, whole, error, words):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(self, *args, **kwargs):
        cls = getattr(errors, error, ConnectionError)
        raise cls.__new__(cls) if error != "ConnectionError" else ConnectionError("x")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    path = write(tmp_path, **{**whole, "model_name_or_path": "no/such-model"})
    assert cli.main(["validate", path]) == (1 if words else 0)
    shown = capsys.readouterr()
    assert words in shown.err if words else "could not be looked up on the Hub: ConnectionError" in shown.out


def test_a_key_of_the_other_kind_is_told_by_its_kind(tmp_path, capsys, whole):
    for arguments in ([], ["--kind", "sft"]):
        path = write(tmp_path, packing=True, prune_rate=0.5, **whole)
        assert cli.main(["validate", path, *arguments]) == 1
        assert "prune_rate: a GRPO key, which does not act in `hf-effi sft`" in capsys.readouterr().err
    assert cli.main(["sft", "--config", path]) == 2
    assert "prune_rate: a GRPO key" in capsys.readouterr().err
    assert cli.main(["validate", write(tmp_path, packing=True, **whole, **REWARD), "--kind", "grpo"]) == 1
    assert "packing: a SFT key" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["eval_strategy", "save_strategy", "logging_strategy"])
@pytest.mark.parametrize("command", ["validate", "sft --config"])
def test_the_no_of_yaml_has_to_be_quoted(tmp_path, capsys, whole, key, command):
    path = write(tmp_path, **whole)
    with open(path, "a") as file:
        file.write(f"{key}: no\n")
    assert cli.main([*command.split(), path]) in (1, 2)
    assert f'{key}: YAML reads an unquoted no as false. Quote it: {key}: "no".' in capsys.readouterr().err


def test_completion_completes(capsys):
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit && bashcompinit\n")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def offered(*words):
        line = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _hf_effi; echo "${{COMPREPLY[@]}}"'
        return subprocess.run(["bash", "-c", script + line], capture_output=True, text=True, check=True).stdout.split()

    assert offered("hf-effi", "val") == ["validate"]
    assert "cppo" in offered("hf-effi", "describe", "cp")
    assert offered("hf-effi", "validate", "--k") == ["--kind"]
    assert offered("hf-effi", "plan", "mem") == ["memory"]


@pytest.mark.parametrize("given", [False, True])
def test_notices_to_programmers_are_not_shown_unless_the_file_has_the_key(tmp_path, given):
    """
    TRL's and transformers' FutureWarnings about names that nobody wrote; in a process of its own, as pytest shows them
    all.
    """
    code = (
        "import sys, warnings\n"
        "from hf_effi import cli_train\n"
        "def script(kind, arguments):\n"
        "    warnings.warn('`gradient_checkpointing` is deprecated', FutureWarning)\n"
        "    warnings.warn('the data is odd', UserWarning)\n"
        "    return 0\n"
        "cli_train._train = script\n"
        "sys.exit(cli_train.train('sft', sys.argv[1:]))\n"
    )
    path = write(tmp_path, **({"gradient_checkpointing": False} if given else {}))
    command = [sys.executable, "-c", code, "--config", path]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "the data is odd" in done.stderr
    assert ("FutureWarning" in done.stderr) is given
    shown = subprocess.run(
        [sys.executable, "-W", "default", *command[1:]], capture_output=True, text=True, env=environment
    )
    assert "FutureWarning" in shown.stderr, "who asks for them gets them"
