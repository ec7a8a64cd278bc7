"""`hf-effi demo --model FOLDER`: the comparison on the user's own model, and what it says where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_effi import cli
from hf_effi.demo import own_model, toy
from hf_effi.demo.own_model import additions, answer_reward, is_right, read_data
from hf_effi.report.result_record import check_record

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def saved(folder: Path, **changes: Any) -> Path:
    """Save the toy model, with changes to its tokenizer."""
    t = toy()
    t.model.save_pretrained(folder)
    for name, value in changes.items():
        setattr(t.tokenizer, name, value)
    t.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{a}+{b}=", "answer": {a + b}}}\n' for a in range(6) for b in range(5)))
    return path


def call(*arguments: Any) -> int:
    return cli.main(["demo", *map(str, arguments)])


def test_the_comparison_prints_the_table_of_the_demo(model: Path, data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert call("--model", model, "--data", data, "--quick", "--output-dir", out) == 0
    said = capsys.readouterr().out
    for words in ("19,136 parameters, 26 prompts of rows.jsonl, 4 held out", "TRL GRPOTrainer", "step speed-up"):
        assert words in said
    result = json.loads((out / "results.json").read_text())
    check_record(result, "results.json")
    assert [row["arm"] for row in result["rows"]] == ["stock", "everything"]
    assert all(row["steps"] == 4 and row["rows"]["generated"] == 64 for row in result["rows"])
    assert result["rows"][1]["rows"]["trained"] < 64
    assert all(figure["goal"] is None for figure in result["headline"])
    assert str(tmp_path) not in result["command"]


def test_a_chat_template_and_the_built_in_additions(tmp_path: Path, capsys) -> None:
    folder = saved(tmp_path / "chat", chat_template=TEMPLATE)
    own = own_model.OwnSettings(folder, quick=True)
    work, text = own_model.prepare(own, 2)
    assert "of built-in additions" in text
    assert work.prompts[0]["prompt"][0]["role"] == "user" and work.prompts[0]["prompt"][0]["content"].startswith(
        "What"
    )
    arguments = ("--model", folder, "--quick", "--arms", "exact", "--json", "--output-dir", tmp_path / "out")
    assert call(*arguments, "--max-completion", 8) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in result["rows"]] == ["stock", "exact"]


def test_data_in_a_folder_and_in_messages(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "answer": i + 1, "more": None} for i in range(9)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=Dataset.from_list(rows[:5])).save_to_disk(str(tmp_path / "two"))
    assert read_data(tmp_path / "one")[0] == {"prompt": [{"role": "user", "content": "0+1="}], "answer": "1"}
    assert len(read_data(tmp_path / "two")) == 5
    with pytest.raises(ValueError, match="has no chat template. Give text prompts"):
        own_model.prepare(own_model.OwnSettings(model, tmp_path / "one", quick=True), 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows"),
        ("{", "line 1 is not JSON"),
        ('{"prompt": "1+1="}', "row 1 has no answer (it has prompt)"),
        ('{"question": "1+1=", "result": 2}', "row 1 has no prompt and no answer (it has question, result)"),
        ('{"prompt": 3, "answer": 2}', "the prompt of row 1 is a int"),
        ("[1]", "must hold one object per row"),
        ('{"prompt": "1+1=", "answer": 2}', "has 1 rows: a step needs 2 prompts"),
    ],
)
def test_data_that_cannot_be_used(model: Path, tmp_path: Path, capsys, content: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert call("--model", model, "--data", path, "--quick", "--output-dir", tmp_path / "out") == 2
    assert said in capsys.readouterr().err


def test_data_that_is_not_there(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, said in (
        ("nope", "no such file or folder"),
        ("folder", "not a folder of"),
        ("binary.jsonl", "cannot be read as .jsonl"),
    ):
        assert call("--model", model, "--data", tmp_path / name, "--output-dir", tmp_path / "out") == 2
        assert said in capsys.readouterr().err


def test_a_model_that_cannot_be_used(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, *more: Any) -> str:
        capsys.readouterr()  # the bars of saving
        assert call("--model", folder, "--output-dir", tmp_path / "out", *more) == 2
        said = capsys.readouterr().err
        assert said.startswith("hf-effi demo: --model ") and said.count("\n") == 1
        return said

    assert "there is no such folder. Give a local one" in refused(tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    assert "holds no model: it has no config.json" in refused(tmp_path / "empty")
    toy().model.save_pretrained(tmp_path / "bare")
    assert "has no tokenizer that can be loaded" in refused(tmp_path / "bare")
    assert "the tokenizer has no pad token" in refused(saved(tmp_path / "pad", pad_token=None))
    assert "the tokenizer has no end token" in refused(saved(tmp_path / "end", eos_token=None))
    whole = saved(tmp_path / "whole")
    said = refused(whole, "--max-completion", 250)
    assert "and a completion up to 250, but the model reads 256" in said
    monkeypatch.setattr(own_model, "free_bytes", lambda: 2**19)
    said = refused(whole)
    assert "19,136 parameters: 2 arms in training need at least 0.0 GiB (16 bytes for each" in said
    monkeypatch.setattr(own_model, "free_bytes", lambda: None)
    assert own_model.check_model(whole, 10, 10, arms=1000) == 19_136  # a system that does not tell


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "x"], "--data acts only with --model FOLDER"),
        (["--learning-rate", "1e-5"], "--learning-rate acts only with --model"),
        (["--max-completion", "8"], "--max-completion acts only with --model"),
        (["--model", "x", "--learning-rate", "2"], "must lie between 0 and 1, got 2.0"),
        (["--model", "x", "--max-completion", "0"], "must be at least 1, got 0"),
        (["--model", "x", "--quick", "--steps", "8"], "Drop --quick or --steps"),
        (["--model", "x", "--arms", "nope"], "unknown arm 'nope'"),
    ],
)
def test_options_that_cannot_act(tmp_path: Path, capsys, arguments: list[str], said: str) -> None:
    assert call(*arguments, "--output-dir", tmp_path / "out") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("27 + 45 = 72", "72", True),
        ("72 is the sum of 27 and 45", "72", False),
        ("1,072", "1072", True),
        ("72.0", "72", True),
        ("-3", "-3", True),
        ("", "72", False),
        ("The city is\nParis\n", "paris", True),
        ("Paris, of course", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_what_is_right(text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer) == right
    messages = [[{"role": "assistant", "content": text}]]
    assert answer_reward(messages, [answer]) == answer_reward([text], [answer]) == [float(right)]


def test_the_built_in_additions_are_right_and_differ() -> None:
    rows = additions()
    assert len({row["prompt"] for row in rows}) == len(rows) == 2000
    for row in rows[:50]:
        first, second = (int(word.strip("?")) for word in row["prompt"].split() if word.strip("?").isdigit())
        assert first + second == int(row["answer"]) and 10 <= first < 100
