"""
The objects of the GRPO room use nothing of their trainer that `Host` does not list, and a stock trainer has all of it.

What is looked for by the names of mixins or trainers passes these objects by; this is their table of seams.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from trl import GRPOTrainer

from hf_effi.trainers.grpo.host import Host
from tests.contract._sources import PACKAGE, python_files, shown, tree_of
from tests.helpers import grpo_args, run_grpo

HOST = PACKAGE / "trainers" / "grpo" / "host.py"
#: there under vLLM only, or from the first update on; `_seams.READS` holds who reads them
LATER: set[str] = {"_last_loaded_step", "current_gradient_accumulation_steps"}


def members() -> set[str]:
    """The attributes and methods that `Host` lists."""
    methods = {node.name for node in ast.walk(tree_of(HOST)) if isinstance(node, ast.FunctionDef)}
    return {*Host.__annotations__, *methods}


def used() -> Iterator[tuple[str, str]]:
    """Yield (attribute, place) of everything that is read of, or written to, a `host`."""
    for path in python_files("hf_effi/trainers/grpo"):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name in ("host", "_host"):
                yield node.attr, f"{shown(path)}:{node.lineno}"


def test_objects_use_what_the_protocol_lists() -> None:
    wrong = [f"{place}: {attribute}" for attribute, place in used() if attribute not in members()]
    assert not wrong, "not in Host:\n" + "\n".join(wrong)


def test_the_protocol_lists_what_objects_use() -> None:
    assert members() == {attribute for attribute, _ in used()}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    return run_grpo(GRPOTrainer, grpo_args(tmp_path_factory.mktemp("stock")), train=False)


def test_a_stock_trainer_has_all_of_it(stock: GRPOTrainer) -> None:
    assert {name for name in members() - LATER if not hasattr(stock, name)} == set()
