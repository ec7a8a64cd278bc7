"""Rows of the table: orthogonal updates, and attention logits held under a threshold."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="muon",
        title="Muon for matrices, AdamW for the rest",
        kind="optimizer",
        goals=("optimizer",),
        summary="Makes the update of each matrix orthogonal; experts and fused projections in their parts.",
        entry_points=("hf_effi.optim:muon", "hf_effi.optim:MuonAdamW", "hf_effi.optim:MatrixView"),
        paper="Muon is Scalable for LLM Training",
        paper_id="2502.16982",
        authors="Liu, Jingyuan and others",
        status="experimental",
        tests=("tests/unit/test_muon.py", "tests/training/test_optimizers.py"),
        bench="bench/optimizers.py",
    ),
    Method(
        key="mars_m",
        title="MARS-M: Muon on gradients of less variance",
        kind="optimizer",
        goals=("optimizer",),
        summary="Corrects each gradient by the one before it, and makes the momentum of that orthogonal.",
        entry_points=("hf_effi.optim:mars_m", "hf_effi.optim:MarsM"),
        paper="MARS-M: When Variance Reduction Meets Matrices",
        paper_id="2510.21800",
        authors="Liu, Yifeng and others",
        status="experimental",
        tests=("tests/unit/test_mars_m.py", "tests/training/test_optimizers.py"),
        bench="bench/optimizers.py",
    ),
    Method(
        key="qk_clip",
        title="QK-Clip: attention logits under a threshold",
        kind="callback",
        goals=("optimizer",),
        summary="After an update, scales the query and key rows of exactly the heads whose logits exceeded.",
        entry_points=(
            "hf_effi.callbacks:QKClipCallback",
            "hf_effi.functional.qk_clip:max_logits",
            "hf_effi.functional.qk_clip:clip_factors",
            "hf_effi.functional.qk_clip:projection_factors",
        ),
        paper="Kimi K2: Open Agentic Intelligence",
        paper_id="2507.20534",
        authors="Bai, Yifan and others",
        status="experimental",
        tests=("tests/unit/test_qk_clip.py", "tests/training/test_qk_clip.py"),
        bench="bench/qk_clip.py",
    ),
)
