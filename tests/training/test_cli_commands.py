"""Every command as a newcomer meets it: its help, its JSON, and one clear sentence when it was called wrongly."""

from __future__ import annotations

import json
import re

import pytest
import torch

from hf_effi import cli
from hf_effi.demo import command as demo
from tests.helpers import prompt_dataset, save_tiny, tiny_qwen3, tiny_tokenizer

COMMANDS = [
    "env",
    "list",
    "describe",
    "plan",
    "plan lr",
    "plan lr show",
    "plan lr transfer",
    "plan lr cooldown",
    "plan lr extend",
    "plan lr predict",
    "plan memory",
    "plan optimizer",
    "report",
    "preview-order",
    "average",
    "accelerate-config",
    "demo",
    "grpo",
    "sft",
    "validate",
    "completion",
]

#: command line -> what its JSON must have
JSON = {
    "env --json": ["machine", "versions", "commit"],
    "describe wsd --json": ["key", "paper", "authors", "card"],
    "validate full.yaml --json": ["valid", "problems", "notes"],
    "validate gpu.yaml --kind grpo --json": ["valid", "problems", "notes"],
    "plan lr show --steps 20 --schedule wsd --schedule rex --json": ["steps", "schedules"],
    "plan lr transfer --steps 50 --from cosine --to wsd --lr 1e-3 --json": ["lr", "factor", "bound_ratio"],
    "plan lr cooldown --steps 50 --json": ["rows", "best_fraction_at_fixed_lr"],
    "plan lr extend --old-steps 100 --new-steps 200 --json": ["cooldown_fraction", "plateau_factor"],
    "plan lr predict --run state --steps 50 --lr 1e-3 --schedule wsd --json": ["law", "predictions"],
    "plan memory model --seq-len 16 --json": ["rows", "chosen"],
    "plan optimizer --params 300M --tokens 6B --json": ["learning_rate", "inside", "training_arguments", "sentence"],
    "report run --json": ["run"],
    "report --compare run other --json": ["run", "other"],
    "preview-order shuffled rows.jsonl --column q --json": ["samples", "first_batches"],
    "accelerate-config ddp 2 --json": ["path"],
    "demo --quick --output-dir demo --json": ["rows"],
}

#: command line -> exit code, and words of the sentence on stderr
WRONG = {
    "env --what": (2, ["hf-effi env", "--what", "`hf-effi env --help`"]),
    "list extra": (2, ["hf-effi list", "extra"]),
    "describe cpo": (2, ["'cpo'", "cppo"]),
    "describe": (2, ["METHOD"]),
    "plan": (2, ["|".join(cli.PLANNERS), "`hf-effi plan --help`"]),
    "plan lrr": (2, ["'lrr'", "'memory'"]),
    "plan lr": (2, ["show|transfer", "`hf-effi plan lr --help`"]),
    "plan lr show --steps 9 --schedule wds": (2, ["'wds'", "wsd"]),
    "plan lr show --steps -5 --schedule wsd": (2, ["--steps", "'-5'", "at least 1"]),
    "plan lr show --steps many --schedule wsd": (2, ["--steps", "'many'", "whole number"]),
    "plan lr show --steps 9 --schedule wsd --plot x.nope": (2, ["x.nope", ".svg"]),
    "plan lr show --steps 9 --schedule wsd --plot rows.jsonl/x.png": (1, ["cannot write rows.jsonl/x.png"]),
    "plan lr transfer --steps 9 --from cosine --to wsd --lr nan": (2, ["--lr", "above 0"]),
    "plan lr cooldown --steps 0": (2, ["--steps", "at least 1"]),
    "plan lr extend --old-steps 100 --new-steps 50": (2, ["new_steps=50", "100"]),
    "plan lr predict --run none.json --steps 9 --lr 1 --schedule wsd": (1, ["cannot read none.json"]),
    "plan lr predict --run rows.jsonl --steps 9 --lr 1 --schedule wsd": (1, ["rows.jsonl", "no trainer_state.json"]),
    "plan lr predict --run short --steps 9 --lr 1 --schedule wsd": (2, ["short", "at least 4"]),
    "plan memory no/such-model --seq-len 16": (2, ["'no/such-model'", "no model config"]),
    "plan memory none.json --seq-len 16": (2, ["'none.json'", "config.json"]),
    "plan memory empty --seq-len 16": (2, ["'empty'", "no model config"]),
    "plan memory model --seq-len -5": (2, ["seq_len=-5", "at least 1"]),
    "plan memory model --seq-len 16 --gpu-gib -3": (2, ["gpu_gib=-3.0", "above 0"]),
    "plan memory model --seq-len 16 --optimizer adamm": (2, ["'adamm'", "adamw_torch"]),
    "plan optimizer --params 300M": (2, ["--tokens"]),
    "plan optimizer --params 0 --tokens 6B": (2, ["--params", "'0'", "300M"]),
    "plan optimizer --params 300M --tokens 6X": (2, ["--tokens", "'6X'"]),
    "plan optimizer --params 300M --tokens 6B --optimizer lion": (2, ["'lion'", "adamw", "muon"]),
    "plan optimizer --params 300M --tokens 6B --unique-tokens 7B": (2, ["unique_tokens", "more than tokens"]),
    "report": (2, ["folder", "--compare"]),
    "report nowhere": (1, ["nowhere is not a folder", "output_dir"]),
    "report empty": (1, ["empty has no effi/effi_run.json", "output_dir"]),
    "report damaged": (1, ["damaged", "cannot be read"]),
    "report run --output rows.jsonl/page.html": (1, ["cannot write rows.jsonl/page.html"]),
    "preview-order shufled rows.jsonl --column q": (2, ["'shufled'", "'shuffled'"]),
    "preview-order shuffled none.jsonl --column q": (1, ["none.jsonl: there is no such file"]),
    "preview-order shuffled torn.jsonl --column q": (1, ["torn.jsonl", "cannot be read"]),
    "preview-order shuffled rows.jsonl --column grade": (1, ["'grade'", "['q', 'word']"]),
    "preview-order shuffled rows.jsonl --column word": (1, ["row 0", "word='a'", "not a number"]),
    "preview-order shuffled rows.jsonl --column q --buckets 3": (2, ["--buckets", "does not act"]),
    "preview-order shuffled rows.jsonl --column q --batch-size 0": (2, ["--batch-size", "at least 1"]),
    "average": (2, ["OUT_DIR, --runs, --interpolate and --delta", "`hf-effi average --help`"]),
    "average empty": (2, ["--output is missing"]),
    "average empty --output made": (1, ["no whole checkpoint-N", "'empty'"]),
    "average empty --output model": (1, ["output_dir='model' exists already"]),
    "average empty --output made --weights f1": (1, ["kind='f1'", "greater_is_better"]),
    "average --interpolate model nowhere --output made": (1, ["no folder 'nowhere'"]),
    "accelerate-config fsdp 4": (2, ["'fsdp'", "fsdp2"]),
    "accelerate-config ddp 3": (2, ["num_gpus=3", "--num_processes"]),
    "demo --steps 3": (2, ["--steps", "multiple of 4"]),
    "demo --quick --output-dir rows.jsonl/x": (1, ["cannot write to rows.jsonl/x"]),
    "validate none.yaml": (1, ["none.yaml: No such file"]),
    "validate empty": (1, ["empty: Is a directory"]),
    "validate tab.yaml": (1, ["line 2", "Indent with spaces"]),
    "validate twice.yaml": (1, ["max_steps is set in line 1 and again in line 3"]),
    "sft --config twice.yaml": (2, ["max_steps is set in line 1 and again in line 3"]),
    "validate nothing.yaml": (1, ["is empty", "key: value"]),
    "validate number.yaml": (1, ["holds int", "mapping"]),
    "validate binary.yaml": (1, ["binary.yaml", "utf-8"]),
    "validate control.yaml": (1, ["control.yaml", "not a YAML file"]),
    "validate type.yaml": (1, ["max_steps: 'many' is str", "int"]),
    "validate name.yaml --kind grpo": (1, ["'wsdd' is not a schedule", "Did you mean wsd?"]),
    "validate key.yaml": (1, ["max_step: unknown key", "max_steps"]),
    "validate least.yaml": (1, ["save_steps: -3 must be at least 0"]),
    "validate wrong_on_gpu.yaml --kind grpo": (1, ["prune_rate must be in [0, 1)"]),
    "grpo": (2, ["nothing to train", "--config"]),
    "grpo --config": (2, ["--config needs a file"]),
    "grpo --config=key.yaml": (2, ["max_step: unknown key"]),
    "grpo --config tab.yaml": (2, ["line 2", "Indent with spaces"]),
    "validate text.yaml": (
        1,
        ["reward_funcs: 'json.dumps' is text, but must be a list", "reward_funcs: [json.dumps]"],
    ),
    "validate ok.yaml": (1, ["no model", "no data"]),
    "grpo --config ok.yaml": (2, ["no model", "no data", "no reward"]),
    "grpo --config name.yaml": (2, ["'wsdd' is not a schedule", "Did you mean wsd?"]),
    "grpo --config tiny.yaml --reward_funcs f": (1, ["'f'", "accuracy_reward"]),
    "grpo --config tiny.yaml --reward_funcs no_such.f": (1, ["reward_funcs: No module named 'no_such'"]),
    "grpo --config tiny.yaml --reward_funcs json.dumpz": (1, ["reward_funcs", "'dumpz'", "module.function"]),
    "grpo --config tiny.yaml --reward_funcs json.dumps --dataset_name words": (1, ["no `prompt` column", "word"]),
    "sft --config tiny.yaml --dataset_name words": (1, ["nothing to train on", "q, word", "`text`"]),
    "grpo --config gpu.yaml": (2, ["no GPU", "use_cpu: true", "bf16: false"]),
    "grpo --config ok.yaml --prune_rate 2": (2, ["prune_rate", "2.0"]),
    "grpo --config tiny.yaml --model_name_or_path no/such --reward_funcs json.dumps": (1, ["model 'no/such'"]),
    "sft --config ok.yaml --max_steps x": (2, ["max_steps", "'x'"]),
    "completion fish": (2, ["'fish'", "'bash'"]),
    "nonsense": (2, ["'nonsense'", "'validate'"]),
}


TINY = "use_cpu: true\nbf16: false\nreport_to: none\nmodel_name_or_path: model\ndataset_name: data\n"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    history = [{"step": s, "loss": 2 + s**-0.5, "learning_rate": 1e-3 * (1 - s / 90)} for s in range(4, 81, 4)]
    state = {"log_history": history, "global_step": 80, "max_steps": 80}
    files = {
        "rows.jsonl": "".join(json.dumps({"q": q, "word": "a"}) + "\n" for q in (3, 1, 2)),
        "torn.jsonl": '{"q": 1',
        "damaged/effi_run.json": "{",
        "state/trainer_state.json": json.dumps(state),
        "short/trainer_state.json": json.dumps({**state, "log_history": history[:2]}),
        "run/trainer_state.json": json.dumps(state),
        "other/trainer_state.json": json.dumps(state),
        "data/train.jsonl": "".join(json.dumps(row) + "\n" for row in prompt_dataset(4).to_list()),
        "ok.yaml": "use_cpu: true\nbf16: false\nreport_to: none\n",
        "words/train.jsonl": '{"q": 1, "word": "a"}\n',
        "tiny.yaml": TINY,
        "name.yaml": "use_cpu: true\nbf16: false\nlr_schedule: wsdd\n",
        "full.yaml": f"{TINY}reward_funcs: [json.dumps]\n",
        "gpu.yaml": "prune_rate: 0.5\nreport_to: none\nmodel_name_or_path: model\ndataset_name: data\n"
        "reward_funcs: [json.dumps]\n",
        "wrong_on_gpu.yaml": "prune_rate: 1.5\nreport_to: none\n",
        "tab.yaml": "output_dir: out\n\tbf16: false\n",
        "nothing.yaml": "",
        "twice.yaml": "max_steps: 3\nuse_cpu: true\nmax_steps: 4\n",
        "control.yaml": "a: \0",
        "number.yaml": "5\n",
        "text.yaml": "reward_funcs: json.dumps\n",
        "type.yaml": "max_steps: many\n",
        "key.yaml": "max_step: 3\n",
        "least.yaml": "use_cpu: true\nsave_steps: -3\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (folder / "empty").mkdir()
    save_tiny(tiny_qwen3(), tiny_tokenizer(), folder / "model")
    return folder


@pytest.fixture(autouse=True)
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def run(line: str) -> int:
    try:
        return cli.main(line.split())
    except SystemExit as stopped:  # argparse
        return stopped.code


@pytest.mark.parametrize("line", COMMANDS)
def test_help_teaches(line, capsys):
    assert run(f"{line} --help") == 0
    text = capsys.readouterr().out
    example = re.search(r"^example:\n(.+)$", text, re.MULTILINE)
    assert example and "hf-effi" in example[1], "no example"
    assert re.search(r"^exit codes: 0 done, 1 .+, 2 .+$", text, re.MULTILINE)
    usage, what = text.split("\n\n")[:2]
    assert usage.startswith("usage: hf-effi") and len(what.split()) >= 3 and what.endswith(".")


def test_the_first_help_names_every_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{line}\b", text, re.MULTILINE) for line in COMMANDS if " " not in line)


@pytest.mark.parametrize("line", JSON)
def test_json_is_all_there_is_on_stdout(line, capsys, monkeypatch):
    def told(*args, **kwargs):
        print("1/2  Teaching ...")
        return {"rows": []}

    monkeypatch.setattr(demo, "run_demo", told)
    assert run(line) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(JSON[line]) <= set(found)


def test_json_of_list_and_report_have_the_numbers(capsys):
    assert run("list --json") == 0
    assert {"key", "authors", "paper_id"} <= set(json.loads(capsys.readouterr().out)[0])
    assert run("report run --json") == 0
    facts = json.loads(capsys.readouterr().out)["run"]["facts"]
    assert facts["steps"] == 80 and facts["runs"] == 1 and 2 < facts["loss at the end"] < 2.2


def test_report_json_writes_a_page_only_when_asked(workplace, capsys):
    assert run("report other --json") == 0 and not (workplace / "other" / "report.html").exists()
    assert run("report other --json --output other/page.html") == 0 and (workplace / "other" / "page.html").exists()


def test_json_tells_failures_by_exit_code(capsys):
    assert run("validate key.yaml --json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["valid"] is False and "unknown key" in found["problems"][0] and found["notes"] == []
    assert run("plan memory model --seq-len 16 --gpu-gib 1e-6 --json") == 1
    assert json.loads(capsys.readouterr().out)["chosen"] is None


def test_what_only_this_machine_refuses_is_a_note(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run("validate gpu.yaml") == 0
    text = capsys.readouterr().out
    assert "gpu.yaml: valid for `hf-effi grpo`" in text
    assert "note: this machine has no GPU" in text and "use_cpu: true" in text and "bf16: false" in text
    assert run("validate gpu.yaml --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["valid"] is True and found["problems"] == [] and "no GPU" in found["notes"][0]
    assert run("validate full.yaml --json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of a TRL script, about its own defaults
@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_call_gets_one_clear_sentence(line, capsys, monkeypatch):
    if "--config gpu.yaml" in line and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, words = WRONG[line]
    assert run(line) == code
    shown = capsys.readouterr()
    assert shown.out == "", "errors go to stderr"
    assert all(word in shown.err for word in words), shown.err
    assert "Traceback" not in shown.err
    lines = [text for text in shown.err.strip().splitlines() if text.startswith("hf-effi")]
    assert lines and max(map(len, lines)) < 500
    assert line.startswith(("grpo", "sft")) or "usage:" not in shown.err, "it hides the sentence"  # TRL's: one line
