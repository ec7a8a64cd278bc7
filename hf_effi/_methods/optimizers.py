"""Rows of the table: optimizers of all weights with a small state."""

from __future__ import annotations

from .row import Method

_TESTS = (
    "tests/training/test_optimizers.py",
    "tests/distributed/test_low_memory_optimizers_ranks.py",
    "tests/engines/test_low_memory_optimizers.py",
    "tests/engines/test_engines.py",
)

ROWS: tuple[Method, ...] = (
    Method(
        key="apollo",
        title="APOLLO and APOLLO-Mini",
        kind="optimizer",
        goals=("optimizer", "less memory"),
        summary="Steps along the raw gradient, as long as Adam's moments of a small random projection say.",
        entry_points=("hf_effi.optim:APOLLO", "hf_effi.optim:apollo", "hf_effi.optim:apollo_mini"),
        paper="APOLLO: SGD-like Memory, AdamW-level Performance",
        paper_id="2412.05270",
        authors="Zhu, Hanqing and others",
        status="experimental",
        tests=("tests/unit/test_apollo.py", *_TESTS),
        bench="bench/optimizers.py",
    ),
    Method(
        key="frugal",
        title="FRUGAL",
        kind="optimizer",
        goals=("optimizer", "less memory"),
        summary="AdamW on a share of the weights that changes, and the sign of the gradient on the rest.",
        entry_points=("hf_effi.optim:FRUGAL", "hf_effi.optim:frugal"),
        paper="FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        paper_id="2411.07837",
        authors="Zmushko, Philip and others",
        status="experimental",
        tests=("tests/unit/test_frugal.py", *_TESTS),
        bench="bench/optimizers.py",
    ),
)
