"""`hf-effi validate`, `grpo`, `sft` and `completion`: TRL's conventions, checked before a model is loaded."""

from __future__ import annotations

import json
import subprocess

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


def test_a_good_file_is_valid(tmp_path, capsys):
    path = write(tmp_path, prune_rate=0.5, num_generations=4, per_device_train_batch_size=8, lr_schedule="wsd")
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
    assert cli.main(["validate", write(tmp_path, packing=True)]) == 0


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


def test_the_conventions_of_trl_hold(tmp_path, capsys):
    path = write(tmp_path, env={"EXAMPLE": "1"}, max_steps="3", gradient_accumulation_steps="2")
    assert cli.main(["validate", path]) == 0, "`env` and numbers as text are TRL's conventions"
    assert cli.main(["validate", write(tmp_path, model_name_or_path="no/such-model")]) == 0, "no model is loaded"


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
