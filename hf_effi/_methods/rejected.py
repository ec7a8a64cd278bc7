"""Rows of the table: what was measured or counted and did not win. Their code stays in `bench/`."""

from __future__ import annotations

from .row import Method

_LOW_PRECISION_TESTS = ("tests/unit/test_prototypes_low_precision.py",)

ROWS: tuple[Method, ...] = (
    Method(
        key="sparse_24",
        title="2:4 sparse training of the FFN",
        kind="kernel",
        summary="Trains FFN weights of which two of each four are zero, in both directions, and prunes gradients alike.",
        entry_points=(),
        paper="Accelerating Transformer Pre-training with 2:4 Sparsity",
        paper_id="2404.01847",
        authors="Hu, Yuezhou and others",
        status="rejected",
        tests=("tests/unit/test_prototypes_sparsity.py",),
        bench="bench/sparse_24.py",
    ),
    Method(
        key="structured_ffn",
        title="Structured FFN and self-guided training",
        kind="kernel",
        summary="Replaces FFN weights by products of low-rank or block-diagonal factors, which a dense guide trains at first.",
        entry_points=(),
        paper="Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
        paper_id="2406.16450",
        authors="Wei, Xiuying and others",
        status="rejected",
        tests=("tests/unit/test_prototypes_sparsity.py",),
        bench="bench/structured_ffn.py",
    ),
    Method(
        key="jetfire",
        title="Jetfire: int8 in square blocks",
        kind="kernel",
        summary="Multiplies in int8, with one scale for each block of 32 x 32 of inputs, weights and gradients.",
        entry_points=(),
        paper="Jetfire: Efficient and Accurate Transformer Pretraining with INT8 Data Flow and Per-Block Quantization",
        paper_id="2403.12422",
        status="rejected",
        tests=_LOW_PRECISION_TESTS,
        bench="bench/jetfire.py",
    ),
    Method(
        key="coat",
        title="COAT: moments and activations in fp8",
        kind="callback",
        summary="Keeps Adam's moments in fp8 with their range expanded, and what the backward needs in fp8 by group.",
        entry_points=(),
        paper="COAT: Compressing Optimizer states and Activation for Memory-Efficient FP8 Training",
        paper_id="2410.19313",
        status="rejected",
        tests=_LOW_PRECISION_TESTS,
        bench="bench/coat.py",
    ),
    Method(
        key="int8_fallback",
        title="Int8 with block fallback",
        kind="kernel",
        summary="Multiplies int8 blocks, and gives those with outliers a second int8 term.",
        entry_points=(),
        paper="Accurate INT8 Training Through Dynamic Block-Level Fallback",
        paper_id="2503.08040",
        status="rejected",
        tests=_LOW_PRECISION_TESTS,
        bench="bench/int8_fallback.py",
    ),
    Method(
        key="unit_scaling",
        title="Unit scaling: fp8 with static casts",
        kind="recipe",
        summary="Builds the model so that tensors begin with unit variance and are cast to fp8 without any scale.",
        entry_points=(),
        paper="µnit Scaling: Simple and Scalable FP8 LLM Training",
        paper_id="2502.05967",
        status="rejected",
        tests=_LOW_PRECISION_TESTS,
        bench="bench/unit_scaling.py",
    ),
)
