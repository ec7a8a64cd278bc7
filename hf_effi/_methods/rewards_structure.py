"""Rows of the table: rewards of structured and measured outputs."""

from __future__ import annotations

from .row import Method

_TRAINED = "tests/training/test_rewards_structure.py"

ROWS: tuple[Method, ...] = (
    Method(
        key="structured_rewards",
        title="Rewards of JSON and tables (RL-Struct)",
        kind="reward",
        goals=("rewards",),
        summary="Scores a text as JSON or as a table by parts, each of them in the log, whatever a model wrote.",
        entry_points=(
            "hf_effi.rewards:JSONReward",
            "hf_effi.rewards:TableReward",
            "hf_effi.functional.rewards:read_json",
            "hf_effi.functional.rewards:read_schema",
            "hf_effi.functional.rewards:structure_score",
            "hf_effi.functional.rewards:field_f1",
            "hf_effi.functional.rewards:read_tables",
            "hf_effi.functional.rewards:table_scores",
        ),
        doors=("hf_effi.rewards:structured",),
        paper="RL-Struct: A Lightweight Reinforcement Learning Framework for Reliable Structured Output in LLMs",
        paper_id="2512.00319",
        authors="Hu, Ruike and Wu, Shulei",
        status="experimental",
        tests=("tests/unit/test_rewards_structures.py", _TRAINED),
        bench="bench/rewards.py",
    ),
    Method(
        key="tensor_bleu",
        title="BLEU on token ids (TensorBLEU)",
        kind="reward",
        goals=("rewards",),
        summary="Rewards completions by BLEU with their references, of a whole batch at once and on token ids.",
        entry_points=(
            "hf_effi.rewards:BLEUReward",
            "hf_effi.functional.rewards:sentence_bleu",
            "hf_effi.functional.rewards:corpus_bleu",
        ),
        paper="TensorBLEU: Vectorized GPU-based BLEU Score Implementation for Per-Sentence In-Training Evaluation",
        paper_id="2510.05485",
        authors="Filipek, Adam",
        status="experimental",
        tests=("tests/unit/test_rewards_bleu.py", _TRAINED),
        bench="bench/rewards.py",
    ),
    Method(
        key="domain_rewards",
        title="Rewards of classes, lengths and judges (TimeMaster, LongWriter-Zero)",
        kind="reward",
        goals=("rewards",),
        summary="Puts a reward together from a class in a tag, a band of lengths and a judge that is held in check.",
        entry_points=(
            "hf_effi.rewards:ClassInTagReward",
            "hf_effi.rewards:LengthBandReward",
            "hf_effi.rewards:CappedReward",
            "hf_effi.rewards:GatedReward",
            "hf_effi.rewards:classification",
            "hf_effi.rewards:long_form",
            "hf_effi.functional.rewards:length_band",
            "hf_effi.functional.rewards:text_in_tag",
        ),
        doors=("hf_effi.rewards:RunPreset",),
        paper="TimeMaster: Training Time-Series Multimodal LLMs to Reason via Reinforcement Learning",
        paper_id="2506.13705",
        authors="Zhang, Junru and others",
        status="experimental",
        tests=("tests/unit/test_rewards_domain.py", _TRAINED),
        bench="bench/rewards.py",
    ),
)
