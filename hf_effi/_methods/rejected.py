"""Rows of the table: what was measured or counted and did not win. Their code stays in `bench/`."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="sparse_24",
        title="2:4 sparse training of the FFN",
        kind="kernel",
        summary="Trains FFN weights of which two of each four are zero, in both directions, and prunes gradients alike.",
        entry_points=(),
        paper="Accelerating Transformer Pre-training with 2:4 Sparsity",
        paper_id="2404.01847",
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
        status="rejected",
        tests=("tests/unit/test_prototypes_sparsity.py",),
        bench="bench/structured_ffn.py",
    ),
)
