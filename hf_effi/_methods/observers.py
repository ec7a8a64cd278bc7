"""Rows of the table: what watches a run, records it, or completes what a library left out."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="adalora",
        title="AdaLoRA rank allocation",
        kind="callback",
        goals=("adapters",),
        summary="Moves the ranks of PEFT's AdaLoRA between matrices, a call that no stock Trainer makes.",
        entry_points=("hf_effi.callbacks:AdaLoRACallback",),
        paper="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        paper_id="2303.10512",
        authors="Zhang, Qingru and others",
        status="experimental",
        tests=("tests/unit/test_adalora.py", "tests/training/test_adalora.py"),
        bench="bench/adalora.py",
    ),
    Method(
        key="doctors",
        title="Run doctors",
        kind="callback",
        goals=("insight",),
        summary="Says in one sentence what is wrong with a run, while it runs, and what to try.",
        entry_points=(
            "hf_effi:TrainDoctor",
            "hf_effi:GRPODoctor",
            "hf_effi.functional.doctor:diagnose",
            "hf_effi.callbacks:LoaderWaitCallback",
        ),
        paper="none: rules from known failures",
        paper_id="",
        status="experimental",
        tests=(
            "tests/unit/test_doctor.py",
            "tests/training/test_doctor.py",
            "tests/training/test_doctor_schedulers.py",
            "tests/training/test_doctor_padding.py",
            "tests/training/test_doctor_grpo.py",
            "tests/training/test_loader_wait.py",
        ),
        bench="bench/observers.py",
    ),
    Method(
        key="run_record",
        title="Run record",
        kind="callback",
        goals=("insight",),
        summary="Writes one record per run as it goes: settings, data, time, tokens, drops, memory, checkpoints, "
        "logs.",
        entry_points=("hf_effi:read_run",),
        doors=("hf_effi:RunRecordCallback",),
        paper="none: bookkeeping",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_run_record.py", "tests/training/test_run_record.py"),
        bench="bench/observers.py",
    ),
    Method(
        key="straggler_report",
        title="Straggler report",
        kind="callback",
        goals=("insight",),
        summary="Says which process the others wait for, how much slower it is, and how often it is the slowest one.",
        entry_points=(
            "hf_effi.callbacks:StragglerCallback",
            "hf_effi.functional.stragglers:find_straggler",
            "hf_effi.functional.stragglers:StragglerReport",
        ),
        paper="none: bookkeeping",
        paper_id="",
        status="experimental",
        tests=(
            "tests/unit/test_spikes_and_stragglers.py",
            "tests/training/test_straggler.py",
            "tests/distributed/test_rewind_and_straggler_ranks.py",
        ),
        bench="bench/observers.py",
    ),
)
