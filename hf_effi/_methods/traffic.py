"""Rows of the table: what sends less between processes."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="local_updates",
        title="Local updates (DiLoCo)",
        kind="parallel",
        goals=("faster steps",),
        summary="Lets processes train alone for many updates and joins them by an outer step; no gradient is sent.",
        entry_points=(
            "hf_effi.trainers.mixins:LocalUpdates",
            "hf_effi.trainers.mixins:LocalUpdatesMixin",
            "hf_effi.functional.local_updates:outer_step",
        ),
        paper="DiLoCo: Distributed Low-Communication Training of Language Models",
        paper_id="2311.08105",
        authors="Douillard, Arthur and others",
        status="experimental",
        tests=(
            "tests/unit/test_local_updates.py",
            "tests/training/test_local_updates.py",
            "tests/distributed/test_local_updates_ranks.py",
        ),
        bench="bench/local_updates.py",
    ),
    Method(
        key="gradient_compression",
        title="Compressed gradients",
        kind="recipe",
        goals=("faster steps",),
        summary="Registers torch's hooks, which round or factor the gradients that DDP sends, on a Trainer.",
        entry_points=("hf_effi.recipes:register_gradient_compression",),
        paper="PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
        paper_id="1905.13727",
        authors="Vogels, Thijs and others",
        status="experimental",
        tests=(
            "tests/unit/test_gradient_compression.py",
            "tests/training/test_gradient_compression.py",
            "tests/distributed/test_gradient_compression_ranks.py",
            "tests/engines/test_zero_plus_plus.py",
        ),
        bench="bench/local_updates.py",
    ),
)
