"""
Every block of code in README and docs runs, or is checked as far as it goes: Python asserts, commands parse, YAML is
valid.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hf_effi import METHODS, cli, cli_resolve
from hf_effi.cli_train import make_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Languages of blocks, each with a test below.
CHECKED = {"python", "bash", "yaml"}


def blocks(language: str = "python") -> list[tuple[str, int, str]]:
    """Return page, first line and code of each block."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 2
            found.append((page.relative_to(ROOT).as_posix(), line, match.group(1)))
    return found


def each(language: str) -> pytest.MarkDecorator:
    params = [pytest.param(*block, id=f"{block[0]}:{block[1]}") for block in blocks(language)]
    return pytest.mark.parametrize(("page", "line", "code"), params)


@each("python")
def test_block_runs(page: str, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Blank lines in front, so that a traceback names the line of the page.
    exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), {"__name__": "__docs__"})


def test_every_block_asserts_its_effect() -> None:
    for page, line, code in blocks():
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code))), (
            f"{page}:{line} asserts nothing"
        )


@each("bash")
def test_commands_exist(page: str, line: int, code: str) -> None:
    for command in code.replace("\\\n", " ").splitlines():
        for part in command.partition(" #")[0].split("&&"):
            if words := shlex.split(part):
                check_command(words)


def check_command(words: list[str]) -> None:
    """Fail where a command of ours has a name or an option that does not exist. Nothing is run."""
    while re.match(r"[A-Z_]+=", words[0]):  # a variable of the command
        words = words[1:]
    if words[:3] == ["accelerate", "launch", "-m"]:
        assert words[3] == "hf_effi"
        words = ["hf-effi", *words[4:]]
    if words[:2] == ["accelerate", "launch"]:  # a script of the reader's, with a launch file of ours
        for inner in re.findall(r"\$\((.*?)\)", " ".join(words)):
            check_command(shlex.split(inner))
        return
    program, *arguments = words
    if program in ("bash", "sbatch"):  # a launch file of ours, a script of ours and options of `EffiGRPOConfig`
        files = [word for word in arguments if "/" in word and word.endswith((".sh", ".py"))]
        assert len(files) == 2 and all((ROOT / file).exists() for file in files), words
        check_command(["hf-effi", "grpo", *(word.replace("--dataset", "--dataset_name") for word in arguments)])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets), words
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).exists(), words
    elif program == "python":
        assert (ROOT / words[1]).exists(), words
    elif program == "hf-effi" and arguments[0] in ("grpo", "sft"):
        known = {f.name for cls in make_parser(arguments[0]).dataclass_types for f in dataclasses.fields(cls)}
        given = {word.removeprefix("--") for word in arguments if word.startswith("--")}
        assert given <= known | {"config"}, words
    elif program == "hf-effi":
        cli.build_parser(arguments).parse_args(arguments)  # exits where it does not understand
    else:
        assert program in ("pip", "git", "cd", "torchrun"), f"{program}: a command that nothing here checks"


@each("yaml")
def test_yaml_is_valid(
    page: str,
    line: int,
    code: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without a GPU, transformers refuses the default of bf16.
    config = {"use_cpu": True, "bf16": False, "output_dir": "out", **yaml.safe_load(code)}
    if "packing" not in config:  # an excerpt names no model, no data and no reward
        config = {"reward_funcs": ["think_format_reward"], **config}
    config = {"model_name_or_path": "me/model", "dataset_name": "me/rows", **config}
    monkeypatch.setattr(cli_resolve, "_is_installed", lambda package: True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(["validate", str(tmp_path / "run.yaml")]) == 0, capsys.readouterr().err


def test_no_block_escapes() -> None:
    for page in PAGES:
        languages = re.findall(r"^```(.*)\n(?:.*\n)*?^```$", page.read_text(encoding="utf-8"), re.MULTILINE)
        # code of other tools, messages, and what a tiny model cannot run
        others = {"text"} if page.name in ("migrating.md", "vllm.md", "qerl.md") else set()
        assert set(languages) <= CHECKED | others, f"{page.name}: {set(languages) - CHECKED} is run by nothing"


def test_readme_snippets_are_short_and_there_are_three() -> None:
    snippets = [code for page, _, code in blocks() if page == "README.md"]
    assert len(snippets) == 3
    for code in snippets:
        lines = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(lines) < 10, code


def test_every_card_shows_code() -> None:
    shown = {page for page, _, _ in blocks()}
    assert {method.card for method in METHODS if method.status != "rejected"} <= shown
