"""
What a card may name of `hf_effi.rewards`: class -> kind of value -> arguments of that kind.

Nothing that starts a program or reads a file stands here: a card may be somebody else's.
"""

from __future__ import annotations

_PART = {"key": "column after_tag within_tag name"}
_TOKENS = {**_PART, "flag": "case punctuation articles units"}
REWARDS: dict[str, dict[str, str]] = {
    "ChoiceReward": {**_PART, "flag": "strict"},
    "ExactMatchReward": _PART,
    "InstructionReward": {"key": "column kwargs_column name", "flag": "loose fraction"},
    "LastNumberReward": {**_PART, "flag": "strict percent", "words": "marks", "number": "tolerance"},
    "LengthMatchReward": {"key": "column name", "flag": "over_only", "number": "scale"},
    "MathReward": {**_PART, "flag": "strict units", "words": "places", "word": "comparison"},
    "NormalizedMatchReward": _TOKENS,
    "SoftOverlongReward": {"number": "max_tokens cache_tokens", "key": "name"},
    "TagFormatReward": {"words": "tags", "flag": "order only opened empty partial", "key": "name"},
    "TokenF1Reward": _TOKENS,
    # Verifiers of its own are for the reader to pass.
    "VerifierReward": {"key": "column name", "number": "alpha non_stop_penalty", "word": "how", "numbers": "stop_ids"},
    "BLEUReward": {
        "key": "column name",
        "number": "max_n smoothing_value",
        "numbers": "weights ignore_ids",
        "word": "smoothing",
    },
    "ClassInTagReward": {"word": "tag", "words": "labels", "key": "column name"},
    "JSONReward": {"plain": "schema weights", "word": "gate", "key": "column after name"},
    "LengthBandReward": {"plain": "low high largest", "word": "unit", "key": "name"},
    "TableReward": {"word": "format", "key": "column name", "plain": "weights"},
    "LengthBudgetReward": {
        "budget": "budget",
        "word": "shape",
        "gate": "gate_on_correct",
        "number": "largest",
        "key": "name",
    },
    "ExactSpanReward": {"key": "column name", "flag": "boxed"},
}
#: what a reward, a cap and a prompt may have as their budget
BUDGETS: dict[str, dict[str, str]] = {
    "ExponentialBudget": {"number": "start decay least", "plain": "every_steps"},
    "LinearBudget": {"number": "start end"},
    "NDecayBudget": {"number": "start end decays"},
}
