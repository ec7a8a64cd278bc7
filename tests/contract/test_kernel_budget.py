"""A new Triton kernel has to be compiled for each card: by source, so also where nothing can be compiled."""

from __future__ import annotations

import ast
import json

import pytest

from tests.contract._sources import python_files, tree_of
from tests.helpers.offline_triton import ARCHITECTURES, BUDGET

RECORDED = json.loads(BUDGET.read_text(encoding="utf-8"))


def kernels():
    """Names of the functions under `@triton.jit` that are launched; the others are called by these."""
    return sorted(
        node.name
        for path in python_files("hf_effi")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef)
        and any("triton." in ast.unparse(decorator) for decorator in node.decorator_list)
        and node.name.endswith("_kernel")
    )


def test_all_kernels_are_found():
    assert {"_lm_head_fwd_kernel", "_attention_merge_bwd_kernel", "_quantize_rows_fwd_kernel"} <= set(kernels())
    other = [
        f"{path.name}: {node.name}"
        for path in python_files("hf_effi")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef)
        and any(
            ast.unparse(d).startswith(("triton.", "jit")) and ast.unparse(d) != "triton.jit"
            for d in node.decorator_list
        )
    ]
    assert not other, "autotuning and heuristics launch variants that the budget would not see"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("kernel", kernels())
def test_every_kernel_has_a_budget(kernel, architecture):
    """An entry is called by its kernel, without `_fwd` where there is no other: `lm_head_bwd log_probs bfloat16`."""
    entries = {name.split()[0] for name in RECORDED[f"sm_{architecture}"]}
    name = kernel.removeprefix("_").removesuffix("_kernel")
    assert entries & {name, name.removesuffix("_fwd")}, "add it to tests/helpers/offline_triton.py and record again"
