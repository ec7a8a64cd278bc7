"""Runs the printed examples of the pure functions, so that the documentation cannot drift from the code."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import hf_effi.functional
import hf_effi.selection

EXTRA_MODULES = (
    "hf_effi.attention.projections",
    "hf_effi.optim.matrix_views",
    "hf_effi.optim.muon_adamw",
    "hf_effi.errors",
    "hf_effi._run_record",
    "hf_effi.callbacks.grpo_schedule",
    "hf_effi.report.preview_order",
    "hf_effi.rewards.length",
    "hf_effi.samplers.curricula",
    "hf_effi.samplers.learned",
    "hf_effi.samplers.mixture",
    "hf_effi.samplers.multistage",
    "hf_effi.data.scores",
    "hf_effi.kernels.fused_lora",
    "hf_effi.kernels.low_bit",
    "hf_effi.methods",
    "hf_effi.memory.offload",
    "hf_effi.recipes.long_context",
    "hf_effi.optim.apollo_rule",
    "hf_effi.optim.frugal_rule",
    "hf_effi.report.plan_memory",
    "hf_effi.data.metadata",
    "hf_effi.data.shared_prefix",
    "hf_effi.selection.allocation",
    "hf_effi.selection.filters",
    "hf_effi.selection.pruners",
    "hf_effi.selection.rates",
    "hf_effi.selection.reinforce",
    "hf_effi.trainers.grpo.rewards",
    "hf_effi.trainers.grpo.config",
    "hf_effi.trainers.grpo.settings",
)


class FencedParser(doctest.DocTestParser):
    """Docstrings follow the Hugging Face style: examples stand between code fences, which are no output."""

    def parse(self, string: str, name: str = "<string>"):
        lines = ["" if line.strip().startswith("```") else line for line in string.splitlines()]
        return super().parse("\n".join(lines), name)


def modules() -> list[str]:
    found = [
        info.name
        for root in (hf_effi.functional, hf_effi.selection)
        for info in pkgutil.walk_packages(root.__path__, root.__name__ + ".")
        if not info.ispkg
    ]
    return sorted([*found, *EXTRA_MODULES])


@pytest.mark.parametrize("name", modules())
def test_examples_print_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(parser=FencedParser(), exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in finder.find(module, name, extraglobs={"torch": torch}):
        runner.run(test)
    assert runner.failures == 0, (
        f"{runner.failures} of {runner.tries} examples in {name} failed; see the output above."
    )
