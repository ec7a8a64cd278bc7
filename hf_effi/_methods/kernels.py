"""Rows of the table: kernels, and the patches that bring them into a model."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="kernel_patch",
        title="Kernel patches that check themselves and undo cleanly",
        kind="kernel",
        summary="Replaces the computation of modules of one model, checks forward and backward, and undoes it exactly.",
        entry_points=(
            "hf_effi.kernels:patch",
            "hf_effi.callbacks.kernel_patch:KernelPatchCallback",
            "hf_effi.trainers._kernel_mixin:KernelPatchMixin",
        ),
        paper="Liger Kernel: Efficient Triton Kernels for LLM Training",
        paper_id="2410.10989",
        authors="Hsu, Pin-Lun and others",
        status="experimental",
        tests=(
            "tests/unit/test_kernel_patch.py",
            "tests/unit/test_liger_layers.py",
            "tests/training/test_kernel_patch.py",
        ),
        bench="bench/model_patches.py",
    ),
    Method(
        key="fused_lora",
        title="Fused LoRA linears",
        kind="kernel",
        summary="Computes the adapters of projections that share an input together, and keeps that input once.",
        entry_points=("hf_effi.kernels.fused_lora:FusedLoRALinear", "hf_effi.kernels.fused_lora:fused_lora"),
        paper="LoRA: Low-Rank Adaptation of Large Language Models",
        paper_id="2106.09685",
        authors="Hu, Edward J. and others",
        status="experimental",
        tests=("tests/unit/test_fused_lora.py", "tests/training/test_fused_lora.py"),
        bench="bench/model_patches.py",
    ),
    Method(
        key="low_bit_lora",
        title="LoRA on an FP8 or INT8 base",
        kind="kernel",
        summary="Keeps the frozen base in one byte a parameter while it trains, and multiplies in 8 bits.",
        entry_points=(
            "hf_effi.kernels.low_bit_lora:LowBitLoRALinear",
            "hf_effi.kernels.low_bit:quantize_rows",
            "hf_effi.kernels.low_bit:LowBitWeight",
        ),
        paper="FP8 Formats for Deep Learning",
        paper_id="2209.05433",
        status="experimental",
        tests=(
            "tests/unit/test_low_bit.py",
            "tests/unit/test_low_bit_lora.py",
            "tests/unit/test_triton_kernels.py",
            "tests/training/test_low_bit_lora.py",
            "tests/distributed/test_low_bit_lora_ranks.py",
        ),
        bench="bench/low_bit_lora.py",
    ),
    Method(
        key="lm_head",
        title="LM head on live rows",
        kind="kernel",
        summary="Scores labels in tiles in the place of TRL's head; the backward leaves out rows without a gradient.",
        entry_points=("hf_effi.kernels.trl_head:FusedLMHead", "hf_effi.kernels.lm_head:lm_head_log_probs"),
        paper="Cut Your Losses in Large-Vocabulary Language Models",
        paper_id="2411.09009",
        authors="Wijmans, Erik and others",
        status="experimental",
        tests=("tests/unit/test_lm_head.py", "tests/unit/test_triton_kernels.py", "tests/training/test_lm_head.py"),
        bench="bench/gpu/run_all.py",
    ),
    Method(
        key="random_ltd",
        title="Random layerwise token dropping (random-LTD)",
        kind="callback",
        summary="Lets middle layers train on a random subset of the tokens, which grows until none is dropped.",
        entry_points=(
            "hf_effi.callbacks.random_ltd:RandomLTDCallback",
            "hf_effi.parallel.random_ltd:drop_layer_tokens",
            "hf_effi.functional.random_ltd:kept_tokens",
        ),
        paper="Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale Transformers",
        paper_id="2211.11586",
        authors="Yao, Zhewei and others",
        status="experimental",
        tests=("tests/unit/test_random_ltd.py", "tests/training/test_random_ltd.py"),
        bench="bench/random_ltd.py",
    ),
)
