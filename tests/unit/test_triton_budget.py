"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 and keeps to its recorded registers and shared memory."""

from __future__ import annotations

import json

import pytest

from hf_effi._compat import version_of
from tests.helpers import run_distributed
from tests.helpers.offline_triton import ARCHITECTURES, BUDGET, LIMITS, REGISTERS, compile_all, tools_missing

REASON = tools_missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
RECORDED = json.loads(BUDGET.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def compiled(request):
    return request.param, run_distributed(compile_all, 1, request.param)[0]


def test_kernels_fit_on_the_chip(compiled):
    architecture, kernels = compiled
    for name, used in kernels.items():
        assert used["spilled_bytes"] == 0, name
        assert used["shared_bytes"] <= LIMITS[architecture], name
        assert used["registers"] * used["threads"] <= REGISTERS, name


def test_kernels_keep_to_the_budget(compiled):
    if RECORDED["triton"] != version_of("triton"):
        pytest.skip(f"recorded with triton {RECORDED['triton']}, not with {version_of('triton')}")
    architecture, kernels = compiled
    budget = RECORDED[f"sm_{architecture}"]
    assert kernels.keys() == budget.keys(), "record again: python -m tests.helpers.offline_triton"
    over = {
        f"{name}: {key}": (used[key], budget[name][key])
        for name, used in kernels.items()
        for key in ("registers", "spilled_bytes", "shared_bytes")
        if used[key] > budget[name][key]
    }
    assert not over, "more than recorded"
