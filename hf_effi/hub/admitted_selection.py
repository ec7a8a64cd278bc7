"""What a card may name of `hf_effi.selection`: class -> kind of value -> arguments of that kind."""

from __future__ import annotations

_ALLOCATION = {"number": "low high warmup_passes success_at", "rates": "rates"}
SELECTION: dict[str, dict[str, str]] = {
    "BetaRates": {"numbers": "prior", "number": "forget"},
    "D3S": {"plain": "completions tokens", "word": "scope"},
    "EmbeddingRates": {"key": "embeddings", "number": "variance prior max_rows"},
    "FilterChain": {"filters": "filters"},
    "FirstRowsPruner": {"number": "keep", "word": "adv_stats"},
    "Knapsack": _ALLOCATION,
    "LengthBand": {"plain": "bands", "key": "reward"},
    "MaxVariancePruner": {"number": "keep", "plain": "keep_fraction", "word": "scope adv_stats"},
    "RandomPruner": {"number": "keep seed", "plain": "keep_fraction", "word": "scope adv_stats"},
    "ReinforceAdvantages": {"number": "wrong", "flag": "reject"},
    "SourceBands": {"key": "column reward", "plain": "bands default"},
    "VIP": {**_ALLOCATION, "word": "estimator solver"},
    "ZeroVariance": {"key": "reward"},
    "AdaRFT": {
        "plain": "difficulty",
        "number": "size target_reward step_fraction sensitivity start_fraction success_at explore seed",
    },
    "DUMP": {"plain": "source", "number": "size window temperature bonus bins explore seed"},
    "GRESO": {
        "number": "size target_dead p_easy p_hard change p_low p_high least hard_at easy_at success_at explore seed"
    },
    "MoPPS": {
        "plain": "passed tried weak strong",
        "numbers": "band prior",
        "number": "size target forget candidates warm_weight rho momentum success_at explore seed",
        "flag": "forget_unseen",
    },
    "OfflineCurriculum": {
        "plain": "pass_rate",
        "number": "size start root full_at explore seed",
        "flag": "descending",
    },
    "DurationWeights": {"key": "column", "flag": "force"},
    "EntropicAdvantages": {"number": "kl"},
    "HybridGate": {"key": "column", "number": "gamma upper sft_coef success_at"},
    "OBLRBaseline": {"word": "weights", "flag": "leave_one_out"},
    "OPO": {},
    "OTB": {"word": "tail"},
    "ProcessRewards": {"plain": "columns", "word": "how scale", "number": "weight"},
    "Screening": {"number": "initial low high candidates success_at"},
    "BufferedPrompts": {"selector": "selector", "number": "size"},
    "GainRL": {
        "key": "scores_column",
        "number": "size prefix_tokens suffix_tokens inter_weight subset width step accuracy_gain accuracy_target "
        "angle_gain success_at seed",
    },
    "HIVE": {"selector": "selector", "number": "keep"},
    # A value model of its own is for the reader to pass.
    "PCL": {
        "number": "size target candidates explore learning_rate value_steps success_at seed",
        "word": "value",
    },
}
#: what another selector may wrap
SELECTORS = frozenset({"AdaRFT", "DUMP", "GRESO", "GainRL", "MoPPS", "OfflineCurriculum", "PCL", "ShuffledPrompts"})
