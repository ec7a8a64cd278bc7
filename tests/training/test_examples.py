"""Every example runs on the tiny model and does what it says; the notebooks are their scripts."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.rewards

import hf_effi
from hf_effi import cli, read_run
from hf_effi.demo import toy
from hf_effi.schedules import wsd
from tests.helpers import save_tiny
from tests.helpers.distributed import child_environment

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "make_notebooks.py")
MAKER = runpy.run_path(str(EXAMPLES / "make_notebooks.py"))


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example as its command does and return its variables."""

    def start(name: str, *options: str) -> dict[str, Any]:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, "--output-dir", str(tmp_path / "out"), *options])
        return runpy.run_path(path, run_name="__main__")

    return start


def logged(trainer: Any, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def test_lr_schedule(run, capsys):
    done = run("lr_schedule", "--max-steps", "10")
    planned = [1e-3 * multiplier for multiplier in wsd(10, warmup_fraction=0.1, decay_fraction=0.2).trace()]
    assert logged(done["trainer"], "learning_rate") == pytest.approx(planned[:10])
    assert "learning rate 1.00e-03" in capsys.readouterr().out


def test_grpo_filter_prune(run, capsys):
    done = run("grpo_filter_prune")
    generated = sum(logged(done["trainer"], "effi/rows_generated"))
    assert sum(logged(done["trainer"], "effi/rows_trained")) <= generated / 2
    assert sum(logged(done["trainer"], "effi/dropped/pruned")) > 0
    easy, hard = (sum(logged(done["trainer"], f"effi/dropped/{reason}")) for reason in ("too_easy", "too_hard"))
    assert easy + hard > 0
    assert "'pruned'" in capsys.readouterr().out


def test_curriculum(run, capsys):
    done = run("curriculum")
    assert done["seen"] == sorted(done["seen"]) and done["seen"][0] < done["seen"][-1]
    assert "batch by batch: " in capsys.readouterr().out


def test_fused_lora(run, capsys):
    done = run("fused_lora")
    stock, patched = logged(done["stock"], "loss"), logged(done["patched"], "loss")
    assert patched == pytest.approx(stock, abs=1e-5) and stock[-1] < stock[0]
    assert "FusedLoRALinear x3" in capsys.readouterr().out
    assert "forward" not in vars(done["patched"].model.base_model.model.model.layers[0].self_attn.q_proj)


def test_memory(run, capsys):
    done = run("memory")
    stock = run("lr_schedule", "--max-steps", "3")["trainer"]
    tiled = logged(done["trainer"], "loss")
    assert tiled[0] == pytest.approx(logged(stock, "loss")[0], abs=1e-4)
    stats = done["offload"].stats
    assert 0 < stats["offloaded_bytes"] == stats["restored_bytes"]
    assert done["plan"].chosen.activations == "selective"  # not all fits, and recomputing attention costs least
    told = capsys.readouterr().out
    assert "<- the fastest that fits" in told and "to switch on: activation_checkpointing=True" in told


def test_one_shot_rl(run, capsys):
    done = run("one_shot_rl")
    (row,) = done["chosen"]
    assert len(done["history"].visits[row]) >= 2 and done["trainer"].state.global_step == 3
    assert set(done["trainer"].train_dataset["prompt"]) == {toy().prompts[row]["prompt"]}
    assert f"row {row}: " in capsys.readouterr().out


def test_resume(run, capsys):
    done = run("resume")
    whole, resumed, start = (m.state_dict() for m in (done["whole"].model, done["resumed"].model, toy().model))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    assert "resumed at step 3 of 4: largest difference of a weight 0.0e+00" in capsys.readouterr().out


def test_push_to_hub_without_push(run, tmp_path, capsys):
    done = run("push_to_hub")
    assert logged(done["again"], "loss") == logged(done["trainer"], "loss")
    assert done["recipe"].args.lr_schedule == "wsd"
    assert "hf_effi recipe" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "The card of" in capsys.readouterr().out


def test_push_needs_a_name(run):
    with pytest.raises(SystemExit):
        run("push_to_hub", "--push")


def test_sft_packed_sequence_parallel(run, capsys):
    done = run("sft_packed_sequence_parallel")
    rows = done["trainer"].train_dataset
    assert len(rows) < len(done["rows"]) and max(map(len, rows["input_ids"])) <= 64
    assert "each row on 1 of 1 ranks" in capsys.readouterr().out


def test_deficient_rounds(run, tmp_path, capsys):
    # The loss comes from a module that TRL calls experimental, and says so when it is imported.
    done = run("deficient_rounds", "--max-steps", "2", "--samples", "4")
    (chosen, pairs, _), *_ = done["history"]
    assert len(done["history"]) == 2 and 0 < chosen < len(done["rows"]) / 2 and pairs > 0
    assert done["trainer"].args.loss_type == "simpo" and done["trainer"].state.global_step == 2
    weights = done["model"].state_dict()
    again = run("deficient_rounds", "--max-steps", "2", "--samples", "4")  # nothing is left to do
    assert again["history"] == [] and all(torch.equal(v, weights[n]) for n, v in again["model"].state_dict().items())
    assert "round 1: loss" in capsys.readouterr().out


def test_reward_bench(run, tmp_path, capsys):
    done = run("reward_bench", "--max-steps", "20")
    assert done["after"].overall > done["before"].overall and done["after"].counts == {"Sums": 10, "Others": 10}
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 21
    assert "Sums: " in capsys.readouterr().out
    # A folder and rows of one's own, by the scores that are there.
    bare = {"chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}"}
    done["demo"].tokenizer.chat_template = bare["chat_template"]
    folder = save_tiny(done["model"], done["demo"].tokenizer, tmp_path / "model")
    (tmp_path / "rows").mkdir()
    done["Dataset"].from_list(done["held_out"]).to_json(tmp_path / "rows" / "test.jsonl")
    with pytest.raises(SystemExit):
        run("reward_bench", "--model", folder, "--dataset", str(tmp_path / "rows"))
    assert f"{done['after'].overall:.3f} over" in capsys.readouterr().out


def test_train_from_yaml(run, tmp_path, capsys):
    run("train_from_yaml")
    record = read_run(tmp_path / "out")
    assert record["progress"]["step"] == 2
    assert {"wsd", "cppo", "difficulty_filter"} <= set(record["methods"])
    told = capsys.readouterr().out
    assert "valid for `hf-effi grpo`" in told and "2 steps with the methods" in told


def test_the_yaml_is_valid_but_for_what_is_not_installed(capsys, tmp_path):
    # Without a GPU, transformers refuses the default of bf16.
    text = (EXAMPLES / "grpo.yaml").read_text(encoding="utf-8") + "use_cpu: true\nbf16: false\n"
    path = tmp_path / "grpo.yaml"
    path.write_text(text, encoding="utf-8")
    if importlib.util.find_spec("math_verify") is None:
        assert cli.main(["validate", str(path)]) == 1
        problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-effi validate:")]
        assert len(problems) == 1 and "pip install 'hf_effi[rewards]'" in problems[0]
        path.write_text(text.replace("accuracy_reward", "think_format_reward"), encoding="utf-8")
    assert cli.main(["validate", str(path)]) == 0


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """Return the options for a model and data of one's own, and let the configs' defaults of a GPU stay out."""
    demo = toy()
    prompts = demo.prompts.add_column("solution", [str(answer) for answer in demo.prompts["answer"]])
    for name, rows in (("texts", demo.texts), ("prompts", prompts)):
        (tmp_path / name).mkdir()
        rows.to_json(tmp_path / name / "train.jsonl")
    cpu = {"use_cpu": True, "bf16": False, "report_to": "none"}
    grpo = partial(hf_effi.EffiGRPOConfig, **cpu, max_completion_length=8)
    monkeypatch.setattr(hf_effi, "EffiGRPOConfig", grpo)
    monkeypatch.setattr(hf_effi, "EffiSFTConfig", partial(hf_effi.EffiSFTConfig, **cpu))
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, **cpu))
    # The true one needs math_verify.
    monkeypatch.setattr(trl.rewards, "accuracy_reward", lambda completions, **_: [len(c) % 2.0 for c in completions])
    model = save_tiny(demo.model, demo.tokenizer, tmp_path / "model")
    return {name: ["--model", model, "--dataset", str(tmp_path / name)] for name in ("texts", "prompts")}


#: with tests of their own for a model and data of one's own, or without
OTHERWISE = {"deficient_rounds", "reward_bench", "train_from_yaml"}


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS if path.stem not in OTHERWISE])
def test_a_model_and_data_of_ones_own(run, own_files, name):
    options = own_files["prompts" if name in ("grpo_filter_prune", "one_shot_rl", "resume") else "texts"]
    done = run(name, *options, "--max-steps", "2", *(["--stop-at", "1"] if name == "resume" else []))
    trainer = next(done[key] for key in ("trainer", "whole", "stock") if key in done)
    assert trainer.state.global_step == 2
    assert trainer.accelerator.unwrap_model(trainer.model).config.vocab_size == len(toy().tokenizer)


def test_a_yaml_with_a_model_and_data_of_ones_own(run, own_files, tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text("reward_funcs: [hf_effi.demo.task.exact_answer_reward]\nmax_completion_length: 8\n")
    with config.open("a") as file:
        file.write("use_cpu: true\nbf16: false\nreport_to: none\n")
    run("train_from_yaml", *own_files["prompts"], "--config", str(config))
    assert read_run(tmp_path / "out")["progress"]["step"] == 2


def test_two_ranks_share_a_row(run, tmp_path, capsys):
    """The command of the docstring: the loss of two ranks is that of one."""
    run("sft_packed_sequence_parallel", "--sequence-parallel-size", "1")
    script = [str(EXAMPLES / "sft_packed_sequence_parallel.py"), "--output-dir", str(tmp_path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, *script, "--sequence-parallel-size", "2"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [capsys.readouterr().out, done.stdout]
    assert "each row on 2 of 2 ranks" in told[1]
    losses = [[float(x) for x in re.findall(r"^loss (.*)$", text, re.MULTILINE)[0].split()] for text in told]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4) and len(losses[0]) == 3


@pytest.mark.parametrize("name", MAKER["NOTEBOOKS"])
def test_notebook_is_its_script_and_shows_what_it_prints(name, monkeypatch, tmp_path):
    committed = (EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = MAKER["notebook_of"](EXAMPLES / f"{name}.py")
    monkeypatch.chdir(tmp_path)
    scope = MAKER["run"](notebook)
    assert scope["trainer"].state.global_step == scope["trainer"].state.max_steps
    assert notebook["cells"][-1]["outputs"], "the last cell says what the run did"
    # Another processor takes another time and may round otherwise: numbers are left out, with the spaces that pad
    # them.
    times_or_numbers = re.compile(r'^ *"\*{5}.*\n|[\s+-]*\d[\d.e+-]*', re.MULTILINE)
    shape = [times_or_numbers.sub(" #", text) for text in (committed, MAKER["text_of"](notebook))]
    assert shape[0] == shape[1], "run `python examples/make_notebooks.py`"


def test_scripts_are_short_listed_and_tested():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    assert len(SCRIPTS) >= 8 and len(MAKER["NOTEBOOKS"]) == 3
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80, path.name
        # Its folder comes first on the path of a script: examples/kernels.py would stand for the package that peft
        # imports.
        assert path.stem != "kernels" and importlib.util.find_spec(path.stem) is None, path.name
        assert f"python examples/{path.name}" in text.split('"""')[1], f"{path.name} does not say how to run it"
        assert f"[{path.name}]({path.name})" in table and f'run("{path.stem}"' in tests
    for target in re.findall(r"\]\(([^)#]+)", table):
        assert (EXAMPLES / target).exists(), target
    notebooks = {path.stem for path in EXAMPLES.glob("*.ipynb")}
    assert notebooks == set(MAKER["NOTEBOOKS"])
