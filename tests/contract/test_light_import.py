"""`import hf_effi` costs no more than `import torch`: it loads no module that torch would not."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from tests.contract._sources import PACKAGE, ROOT
from tests.helpers.distributed import child_environment

HEAVY = (
    "trl",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "liger_kernel",
    "bitsandbytes",
    "matplotlib",
)


@functools.cache
def modules_after(statement: str) -> frozenset[str]:
    """Return the names in `sys.modules` of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"`{statement}` failed in a fresh interpreter:\n{done.stderr}"
    return frozenset(json.loads(done.stdout.splitlines()[-1]))


def beyond_torch(modules: frozenset[str]) -> list[str]:
    """Return what is neither torch's, the standard library's nor our own."""
    extra = modules - modules_after("import torch")
    return sorted(m for m in extra if m.split(".")[0] not in {"hf_effi", *sys.stdlib_module_names})


def test_import_hf_effi_loads_nothing_that_torch_does_not():
    loaded = modules_after("import hf_effi")
    assert beyond_torch(loaded) == []
    assert [name for name in HEAVY if name in loaded] == []


def test_names_and_version_are_there_without_loading():
    code = "import hf_effi, hf_effi.methods; dir(hf_effi); hf_effi.__version__; hf_effi.__all__; hf_effi.METHODS"
    loaded = modules_after(code)
    assert [name for name in (*HEAVY, "torch") if name in loaded] == []


@pytest.mark.parametrize("module", ["hf_effi.functional", "hf_effi._compat", "hf_effi.protocols"])
def test_ground_floor_stays_light(module):
    assert beyond_torch(modules_after(f"import {module}")) == []


def test_every_functional_module_is_usable_with_torch_alone():
    files = sorted((PACKAGE / "functional").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    assert beyond_torch(modules_after("\n".join(f"import {name}" for name in names))) == []


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    import hf_effi

    with pytest.raises(AttributeError, match=r"'hf_effi' has no attribute 'EffiGRPO'.*EffiGRPOTrainer"):
        _ = hf_effi.EffiGRPO
    assert not hasattr(hf_effi, "wsdd")
