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
            "tests/distributed/test_safe_checkpoints_killed.py",
            "tests/distributed/test_elastic_resume.py",
            "tests/distributed/test_grpo_elastic.py",
            "tests/training/test_exactness_matrix.py",
            "tests/distributed/test_exactness_matrix_ranks.py",
        ),
        bench="bench/crash.py",
    ),
    Method(
        key="rewind",
        title="Rewind after a bad update",
        kind="callback",
        goals=("safety",),
        summary="Goes back to a copy in host memory where a loss is not finite or spikes, and on with other data.",
        entry_points=(
            "hf_effi.callbacks:RewindCallback",
            "hf_effi.checkpoint:MemorySnapshot",
            "hf_effi.checkpoint:RewindCost",
            "hf_effi.checkpoint:measure_rewind",
            "hf_effi.functional.spikes:robust_z",
            "hf_effi.functional.spikes:is_spike",
        ),
        paper="PaLM: Scaling Language Modeling with Pathways",
        paper_id="2204.02311",
        authors="Chowdhery, Aakanksha and others",
        status="experimental",
        tests=(
            "tests/unit/test_spikes_and_stragglers.py",
            "tests/training/test_rewind.py",
            "tests/distributed/test_rewind_and_straggler_ranks.py",
        ),
        bench="bench/rewind.py",
    ),
)
