"""Rows of the table: how the tokens of a corpus lie on the disk."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="token_files",
        title="Token files",
        kind="recipe",
        goals=("faster steps", "data order"),
        summary="Tokenises a corpus once into one flat file that gives rows of any length, in any order.",
        entry_points=(
            "hf_effi.data:TokenBlocks",
            "hf_effi.data:TokenFile",
            "hf_effi.data:MegatronTokenFile",
            "hf_effi.data:NanotronTokenFile",
            "hf_effi.data:write_token_file",
            "hf_effi.functional.data:shuffled_index",
        ),
        paper="none: a file format",
        paper_id="",
        status="experimental",
        tests=(
            "tests/unit/test_token_files.py",
            "tests/training/test_token_files.py",
            "tests/distributed/test_token_file_ranks.py",
        ),
        bench="bench/token_files.py",
    ),
)
