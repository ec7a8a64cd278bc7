"""Methods that keep a run from being lost."""

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="safe_checkpoints",
        title="Crash-safe and asynchronous checkpoints",
        kind="checkpoint",
        goals=("safety", "faster steps"),
        summary="Makes each checkpoint whole or not there, writes it while the training goes on, and resumes from the "
        "newest whole one.",
        entry_points=(
            "hf_effi.checkpoint:SafeCheckpointer",
            "hf_effi.callbacks:SafeCheckpointCallback",
            "hf_effi.trainers.mixins:SafeCheckpointMixin",
            "hf_effi.checkpoint:find_resumable",
            "hf_effi.checkpoint:list_checkpoints",
            "hf_effi.checkpoint:verify_checkpoint",
            "hf_effi.checkpoint:repair_run_dir",
            "hf_effi.functional.save_interval:save_interval",
            "hf_effi.functional.save_interval:lost_fraction",
        ),
        arguments=("safe_checkpoints",),
        paper="DataStates-LLM: Lazy Asynchronous Checkpointing for Large Language Models",
        paper_id="2406.10707",
        authors="Maurya, Avinash and others",
        status="experimental",
        tests=(
            "tests/unit/test_checkpoint_folders.py",
            "tests/unit/test_save_interval.py",
            "tests/training/test_safe_checkpoints.py",
            "tests/training/test_safe_checkpoints_errors.py",
            "tests/training/test_safe_checkpoints_lazy.py",
            "tests/unit/test_checkpoint_copies.py",
            "tests/distributed/test_safe_checkpoints_killed.py",
            "tests/distributed/test_fsdp_checkpoints.py",
            "tests/distributed/test_elastic_resume.py",
        ),
        bench="bench/crash.py",
    ),
    Method(
        key="checkpoint_conversion",
        title="Resume on another layout: one process, DDP, FSDP2",
        kind="checkpoint",
        goals=("safety",),
        summary="Turns a checkpoint of one process or DDP into one of FSDP2 and back, optimizer included.",
        entry_points=("hf_effi.checkpoint:convert_checkpoint",),
        paper="Universal Checkpointing: Efficient and Flexible Checkpointing for Large Scale Distributed Training",
        paper_id="2406.18820",
        authors="Lian, Xinyu and others",
        status="experimental",
        tests=(
            "tests/unit/test_convert_checkpoint.py",
            "tests/training/test_convert_checkpoint.py",
            "tests/distributed/test_fsdp_checkpoints.py",
        ),
        bench="bench/checkpoint_conversion.py",
    ),
)
