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
        ),
        bench="bench/crash.py",
    ),
    Method(
        key="checkpoint_merging",
        title="Merging the checkpoints of a finished run (MWA, LCSC)",
        kind="checkpoint",
        goals=("schedule", "adapters"),
        summary="Averages the checkpoints that a run left, weighed by its log, the trend, or searched coefficients.",
        entry_points=(
            "hf_effi.checkpoint:plan_average",
            "hf_effi.checkpoint:search_coefficients",
            "hf_effi.functional.merging:trend_weights",
            "hf_effi.functional.merging:metric_weights",
            "hf_effi.functional.merging:concatenate_lora",
            "hf_effi.functional.coefficient_search:search_weights",
        ),
        doors=("hf_effi.checkpoint:average_checkpoints",),
        paper="Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging",
        paper_id="2504.18580",
        authors="Yu, Shi Jie and Choi, Sehyun",
        status="experimental",
        tests=(
            "tests/unit/test_merging.py",
            "tests/training/test_average_checkpoints.py",
            "tests/training/test_merge_folders.py",
            "tests/unit/test_bench_merging.py",
        ),
        bench="bench/merging.py",
    ),
    Method(
        key="model_merging",
        title="Merging models of one base: interpolation, instruction delta, runs",
        kind="checkpoint",
        goals=("continual",),
        summary="Mixes a model with what fine-tuning made of it, adds an instruction delta after continued "
        "pre-training, and averages runs over seeds.",
        entry_points=(
            "hf_effi.checkpoint:interpolate",
            "hf_effi.checkpoint:write_interpolation",
            "hf_effi.checkpoint:add_instruction_delta",
            "hf_effi.checkpoint:average_runs",
        ),
        paper="Balancing Continuous Pre-Training and Instruction Fine-Tuning: Optimizing Instruction-Following "
        "in LLMs",
        paper_id="2410.10739",
        authors="Jindal, Ishan and others",
        status="experimental",
        tests=("tests/unit/test_merging.py", "tests/training/test_merge_folders.py"),
        bench="bench/merging.py",
    ),
)
