"""
Settings of the stack that change who generates or computes for GRPO: ours with savings off is stock, on has its
weights.
"""

from __future__ import annotations

from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, grpo_args, run_grpo, weights_of

#: a cache of 16 pages for a machine without a GPU, whose free memory would say how many there are
CACHE = {
    "num_blocks": 16,
    "page_size": 16,
    "max_batch_tokens": 64,
    "max_requests_per_batch": 16,
    "use_cuda_graph": False,
    "use_async_batching": False,
    "seed": 3,
}
#: the layers of Liger that need no Triton are none: what is left is the flag itself, and what TRL makes of it
NO_TRITON = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)


def train(folder: Any, cls: type, **over: Any) -> Any:
    settings = {"max_steps": 2, "num_generations": 4, "adam_epsilon": 1e-4, **over}
    return run_grpo(cls, grpo_args(folder, GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig, **settings))


def assert_ours_is_stock(folder: Any, **setting: Any) -> None:
    stock = train(folder / "stock", GRPOTrainer, **setting)
    off = train(folder / "off", EffiGRPOTrainer, exact_savings="off", **setting)
    on = train(folder / "on", EffiGRPOTrainer, **setting)
    assert max(entry.get("grad_norm", 0) for entry in stock.state.log_history) > 0, "there was a gradient"
    assert_bitwise_equal(weights_of(off.model), weights_of(stock.model))
    assert on.exact_savings == ("trim", "sort", "skip", "pack", "share")
    expected = weights_of(stock.model)
    assert max(float((weight - expected[name]).abs().max()) for name, weight in weights_of(on.model).items()) <= 1e-6


def test_continuous_batching(tmp_path: Any) -> None:
    setting = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": CACHE}
    assert_ours_is_stock(tmp_path, **setting)
    chosen = train(
        tmp_path / "chosen", EffiGRPOTrainer, difficulty_range=[0, 1], prune_rate=0.5, num_generations=2, **setting
    )
    (first, *_) = [entry for entry in chosen.state.log_history if "effi/rows_generated" in entry]
    assert first["effi/rows_generated"] > first["effi/rows_trained"] > 0 and first["effi/dropped/pruned"] > 0


def test_liger_layers_under_grpo(tmp_path: Any) -> None:
    pytest.importorskip("liger_kernel")
    with pytest.warns(FutureWarning, match="use_liger_kernel"):
        assert_ours_is_stock(tmp_path, use_liger_kernel=True, liger_kernel_config=NO_TRITON, max_steps=1)
