"""`hf-effi`: output, exit codes, errors that name the fix."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hf_effi import cli
from hf_effi.methods import METHODS


def test_env_json_has_versions_and_no_host_name(capsys):
    import socket

    assert cli.main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert {"torch", "transformers", "trl"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    assert socket.gethostname() not in text


def test_env_text(capsys):
    assert cli.main(["env"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_list_names_every_method(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [method.key for method in METHODS]
    assert cli.main(["list", "--json"]) == 0
    assert [row["key"] for row in json.loads(capsys.readouterr().out)] == [method.key for method in METHODS]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_describe(method, capsys):
    assert cli.main(["describe", method.key]) == 0
    text = capsys.readouterr().out
    assert method.summary in text and method.bench in text
    assert all(entry in text for entry in method.entry_points)


@pytest.mark.parametrize("method", [m for m in METHODS if m.status == "rejected"], ids=lambda method: method.key)
def test_describe_a_rejected_method_says_there_is_nothing_to_import(method, capsys):
    assert cli.main(["describe", method.key]) == 0
    text = capsys.readouterr().out
    assert f"[{method.kind}, rejected]" in text and method.card in text
    assert "no code to import" in text and "hf_effi." not in text


def test_describe_as_json(capsys):
    assert cli.main(["describe", "wsd", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["key"] == "wsd" and found["card"] == "docs/methods/wsd.md"


def test_unknown_method_names_the_nearest(capsys):
    assert cli.main(["describe", "cpo"]) == 2
    captured = capsys.readouterr()
    assert "'cpo'" in captured.err and "cppo" in captured.err and captured.out == ""


def test_unlike_method_names_all(capsys):
    assert cli.main(["describe", "zzz"]) == 2
    text = capsys.readouterr().err
    assert all(method.key in text for method in METHODS)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["demo", "--arms", "stock,foo"], "'foo'"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--steps", "6"], "multiple of 4"),
    ],
)
def test_bad_demo_arguments_stop_before_any_training(arguments, word, capsys, tmp_path):
    assert cli.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named_before_any_training(monkeypatch, capsys, tmp_path):
    from hf_effi import _compat

    monkeypatch.setattr(_compat, "is_available", lambda package: package != "jinja2")
    assert cli.main(["demo", "--quick", "--output-dir", str(tmp_path / "out")]) == 1
    assert "jinja2" in (text := capsys.readouterr().err) and "hf_effi[report]" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["describe"], ["plan"], ["plan", "nonsense"]])
def test_wrong_calls_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


def test_a_planner_is_one_line(monkeypatch, capsys):
    class Planner:
        @staticmethod
        def add_arguments(parser):
            parser.add_argument("--steps", type=int)

        @staticmethod
        def run(args):
            print(args.steps)
            return 3

    monkeypatch.setitem(sys.modules, "fake_planner", Planner)
    monkeypatch.setitem(cli.PLANNERS, "fake", ("fake_planner", "what it plans", "hf-effi plan fake"))
    assert cli.main(["plan", "fake", "--steps", "7"]) == 3
    assert capsys.readouterr().out == "7\n"


def test_module_runs_and_help_is_light():
    code = (
        "import sys; sys.argv = ['hf-effi', '--help']\n"
        "from hf_effi import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    done = subprocess.run([sys.executable, "-m", "hf_effi", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hf_effi ")


def test_describe_a_schedule_prints_formula_defaults_and_a_curve(capsys):
    assert cli.main(["describe", "wsd"]) == 0
    printed = capsys.readouterr().out
    assert "f(x)" in printed and "decay_offset='inside'" in printed and "2404.06395" in printed
    assert "1.00 |***" in printed


def test_preview_order_reaches_its_command(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"quality": q}) + "\n" for q in (3, 1, 2, 5, 4, 0)))
    assert cli.main(["preview-order", "quality-ascending", str(rows), "--column", "quality"]) == 0
    assert "batch 1: rows [5, 1, 2, 0, 4, 3]" in capsys.readouterr().out
    assert cli.main(["preview-order", "quality-ascending", str(rows), "--column", "grade"]) == 1
    assert "grade" in capsys.readouterr().err
