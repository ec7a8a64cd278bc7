"""
Whatever the package writes is written aside and renamed: `hf_effi/_files.py` is the only place that opens a target.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.contract._sources import PACKAGE, python_files, tree_of

#: what puts bytes under the name that it is given
WRITERS = {"write_text", "write_bytes", "save_file", "save_pretrained", "copytree", "savefig"}
#: (file, function) that may: why
ALLOWED = {
    ("callbacks/_averaging.py", "_save"): "into a folder that save_aside renames, or one in progress of a checkpoint",
    ("callbacks/weight_averaging.py", "_in_a_nameless_file"): "in place of memory, and gone with the process",
    ("checkpoint/staging.py", "write_file"): "into the folder in progress of a checkpoint, which is renamed",
    ("checkpoint/merge_files.py", "write"): "into a folder that save_aside renames",
    ("checkpoint/convert.py", "_write_single"): "into a folder that save_aside renames",
    ("data/token_writer.py", "write"): "into a folder that save_aside renames",
    ("data/token_writer.py", "_write_numbers"): "into the same",
    ("schedules/branch.py", "copy"): "into a folder that save_aside renames",
    ("hub/_worker.py", "<module>"): "the answer of a process, to its standard output",
    ("demo/policy.py", "fine_tune"): "sealed by sft_settings.json, which is written last",
    ("demo/run.py", "_save_policy"): "into a folder that save_aside renames",
    ("report/reward_calls.py", "in_another_process"): "into a temporary folder that is gone with the call",
    ("report/reward_child.py", "main"): "into the same",
    ("_plots.py", "*"): "into memory",
    ("report/range_plot.py", "*"): "into memory",
    ("report/schedule_plot.py", "*"): "a picture where the user asked for it",
    ("report/plan_lr.py", "*"): "a picture where the user asked for it",
}


def _opens_for_writing(call: ast.Call) -> bool:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    modes = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    return name == "open" and any(
        isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwaxbt+")
        and set(mode.value) & set("wax+")
        for mode in modes
    )  # fmt: skip


def _writes(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id in WRITERS or _opens_for_writing(call)
    if not isinstance(call.func, ast.Attribute):
        return False
    owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    return call.func.attr in WRITERS or (owner, call.func.attr) in (("torch", "save"), ("json", "dump")) or (
        _opens_for_writing(call)
    )  # fmt: skip


def _calls(node: ast.AST, function: str = "<module>") -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(child, ast.Call):
            yield function, child
        yield from _calls(child, inside)


def found_writes() -> set[tuple[str, str]]:
    return {
        (str(path.relative_to(PACKAGE)), function)
        for path in python_files(PACKAGE.name)
        if path.name != "_files.py"
        for function, call in _calls(tree_of(path))
        if _writes(call)
    }


def _allowed(place: tuple[str, str]) -> bool:
    return place in ALLOWED or (place[0], "*") in ALLOWED


def test_nobody_else_writes_a_target_in_place():
    wrong = sorted(place for place in found_writes() if not _allowed(place))
    assert not wrong, f"use save_aside, save_text, save_json, save_bytes or save_state of hf_effi._files: {wrong}"


def test_the_list_holds_nothing_that_is_gone():
    used = {place if place in ALLOWED else (place[0], "*") for place in found_writes()}
    assert set(ALLOWED) <= used, f"gone: {sorted(set(ALLOWED) - used)}"


def test_the_scan_sees_what_it_looks_for():
    code = (
        "def f(p):\n torch.save(1, p)\n p.write_text('')\n open(p, 'wb')\n p.open(mode='a')\n open(p)\n p.open('rb')\n"
    )
    assert [call.lineno for _, call in _calls(ast.parse(code)) if _writes(call)] == [2, 3, 4, 5]
    assert Path(PACKAGE / "_files.py").exists()
