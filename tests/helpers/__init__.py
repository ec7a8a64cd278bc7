"""The offline test kit. `from tests.helpers import ...`; names load on first use, so that light tests stay light."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "tokenizer": ("CHAT_TEMPLATE", "EOS_ID", "PAD_ID", "VOCAB_SIZE", "tiny_tokenizer"),
    "models": ("save_tiny", "tiny_gemma", "tiny_gpt2", "tiny_llama", "tiny_mistral", "tiny_qwen3"),
    "data": (
        "TableReward",
        "binary_hash_reward",
        "length_reward",
        "lm_dataset",
        "parity_reward",
        "prompt_dataset",
        "sft_dataset",
        "text_of",
    ),
    "compare": ("Run", "assert_bitwise_equal", "compare_runs", "record_run", "weights_of"),
    "grpo": ("grpo_args", "run_grpo"),
    "distributed": ("ChildFailure", "run_distributed"),
    "hub": ("Fault", "LocalHub", "push_args"),
    "resume": ("kill_and_resume", "run_in_child", "weights_in"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tests.helpers' has no attribute {name!r}. Names: {', '.join(__all__)}.")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
