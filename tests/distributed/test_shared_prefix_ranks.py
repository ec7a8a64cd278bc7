"""Two ranks with shared prompts: the run of padded rows, and equal weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import assert_bitwise_equal, run_distributed, weights_of


def _train(folder: str, shared: bool) -> dict[str, Any]:
    from tests.training.test_shared_prefix import run, series

    trainer = run(folder, shared, ddp_find_unused_parameters=False, max_steps=3)
    seen = trainer.state.num_input_tokens_seen
    return {"weights": weights_of(trainer.model), "loss": series(trainer, "loss"), "seen": seen}


def _both(folder: str) -> list[dict[str, Any]]:
    return [_train(folder, shared) for shared in (False, True)]


def test_two_ranks(tmp_path):
    (padded, shared), (_, other) = run_distributed(_both, 2, str(tmp_path))
    assert_bitwise_equal(shared["weights"], other["weights"])
    assert shared["loss"] == pytest.approx(padded["loss"], rel=1e-4)
    assert shared["seen"] < 0.75 * padded["seen"]
    for name, weight in padded["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, rtol=1e-3, atol=2e-4)
