"""
Every upstream name, signature, dict key and behaviour that hf_effi leans on. One line in a table is one seam.

The Effi trainers call `super()` and edit what it returns. Nothing upstream promises these private names, so that this
file has to fail first, by name, when one moves; then it is decided what to do, and the cap in setup.cfg is raised.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest

from hf_effi._compat import release_of
from tests.contract._seams import (
    CALLS,
    CONSTANTS,
    EVENTS,
    GRPO,
    GRPO_CONFIG,
    HELPERS_CALLED,
    PUBLIC_MODULES,
    READS,
    SIGNATURES,
    TRAINER,
    UTILS,
    listed,
    own_classes,
)
from tests.contract._sources import python_files, shown
from tests.contract._sources import tree_of as source_tree
from tests.contract._upstream import attributes_read, calls_in_order, parameters_of, resolve, tree_of

# --- the tables are complete ---------------------------------------------------------------------------------------


def test_every_override_is_listed():
    upstream = resolve(GRPO)
    wrong = [
        f"{file}:{method.lineno}: {owner.name}.{method.name}"
        for file, owner in own_classes()
        if file.startswith("hf_effi/trainers") and owner.name.endswith(("Mixin", "Trainer"))
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and hasattr(upstream, method.name)
        if method.name not in {"__init__", *listed(GRPO), *listed(TRAINER)}
    ]
    assert not wrong, "overrides of an upstream method that SIGNATURES does not list:\n" + "\n".join(wrong)


def test_every_private_import_is_listed():
    """Names of `trl`, `transformers` and `accelerate` below their top level: no upstream promise covers them."""
    paths = {*SIGNATURES, *CONSTANTS}
    known = paths | {path.rpartition(".")[0] for path in paths}  # a class is listed through its methods
    wrong = []
    for path in python_files("hf_effi"):
        for node in ast.walk(source_tree(path)):
            if not isinstance(node, ast.ImportFrom) or not node.module or node.level:
                continue
            package, _, rest = node.module.partition(".")
            if package not in {"trl", "transformers", "accelerate"} or not rest or node.module in PUBLIC_MODULES:
                continue
            for alias in node.names:
                if f"{node.module}:{alias.name}" not in known:
                    wrong.append(f"{shown(path)}:{node.lineno}: {node.module}:{alias.name}")
    assert not wrong, "private upstream names that no table lists:\n" + "\n".join(wrong)


def test_every_config_field_we_read_is_listed():
    from transformers import TrainingArguments
    from trl import GRPOConfig

    fields = set(GRPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    wrong = set()
    for path in python_files("hf_effi/trainers"):
        for node in ast.walk(source_tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Attribute, ast.Name)):
                head = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                if head == "args" and node.attr in fields and node.attr not in GRPO_CONFIG:
                    wrong.add(f"{shown(path)}:{node.lineno}: args.{node.attr}")
    assert not wrong, "fields of GRPOConfig that GRPO_CONFIG does not list:\n" + "\n".join(sorted(wrong))


# --- names and signatures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    expected = SIGNATURES[path]
    if isinstance(expected, dict):
        installed = release_of(path.split(".")[0])
        expected = expected[max(release for release in expected if release <= installed)]
    assert parameters_of(path) == expected, f"{path}: the parameters moved"


def test_fused_head_calls_these_globals():
    """`FusedLMHead` gives the forward that TRL adds other values for them."""
    code = resolve(f"{UTILS}:add_fused_lm_head").__code__
    (forward,) = [part for part in code.co_consts if getattr(part, "co_name", "") == "_fused_forward"]
    assert {"_ChunkedLogProbFunction", "_use_triton"} <= set(forward.co_names)
    # `GRPOScheduleCallback` moves it there.
    assert "temperature" in forward.co_freevars


@pytest.mark.parametrize("path", CONSTANTS)
def test_constant(path):
    assert resolve(path) == CONSTANTS[path], f"{path} changed"


@pytest.mark.parametrize("path", CALLS)
def test_our_override_is_still_called(path):
    missing = [name for name in CALLS[path].split() if name not in calls_in_order(path)]
    assert not missing, f"{path} no longer calls self.{missing}: an override of it would never run"


@pytest.mark.parametrize("path", HELPERS_CALLED)
def test_helper_is_still_used(path):
    called = {n.func.id for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    missing = set(HELPERS_CALLED[path].split()) - called
    assert not missing, f"{path} no longer calls {sorted(missing)}"


@pytest.mark.parametrize("path", READS)
def test_attributes_are_still_read(path):
    missing = set(READS[path].split()) - attributes_read(path)
    assert not missing, f"{path} no longer reads self.{sorted(missing)}: setting it has no effect there"


def test_trainer_takes_this_class_as_a_batch_sampler_that_knows_its_rank():
    source = inspect.getsource(resolve(f"{TRAINER}._get_dataloader"))
    assert source.count("isinstance(sampler, BatchRebalanceSampler)") == 2, (
        "see hf_effi/trainers/mixins/token_budget.py"
    )
    assert 'dataloader_params["batch_sampler"] = sampler' in source and "prepared_bs.num_processes = 1" in source


def test_config_fields():
    from trl import GRPOConfig

    wrong = []
    for name, default in GRPO_CONFIG.items():
        field = GRPOConfig.__dataclass_fields__.get(name)
        if field is None:
            wrong.append(f"GRPOConfig.{name} is gone")
        elif field.default != default:
            wrong.append(f"GRPOConfig.{name} defaults to {field.default!r}, was {default!r}")
    assert not wrong, "; ".join(wrong)
    assert "lr_scheduler_kwargs" in GRPOConfig._VALID_DICT_FIELDS


def test_trainer_state_fields():
    fields = {field.name for field in dataclasses.fields(resolve(f"{EVENTS}:TrainerState"))}
    needed = {"stateful_callbacks", "log_history", "global_step", "epoch", "max_steps", "is_world_process_zero"}
    assert needed <= fields, f"TrainerState lost {sorted(needed - fields)}"
