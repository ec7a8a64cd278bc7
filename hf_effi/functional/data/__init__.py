"""
What comes next, and why: orders, pacing, sampling and difficulty as pure functions of scores, progress and a seed.
"""

from __future__ import annotations

from ._checks import as_labels, check_count, check_number, clean_scores, seeded
from .agreement import keep_by_length, majority_answers
from .apportion import apportion
from .attention_influence import copy_probe, copy_scores, relative_increase, top_heads
from .bijection import shuffled_index
from .contamination import (
    LEAST_TOKENS,
    ContaminationReport,
    auc,
    contamination_report,
    entropy_similarity,
    top_k_entropy,
)
from .deficient import deficient_rows, preference_pairs, text_overlap
from .denoising import (
    UL2_DENOISERS,
    UL2R_DENOISERS,
    Denoiser,
    denoised_lengths,
    fitting_length,
    noise_counts,
    span_mask,
    split_spans,
)
from .difficulty import learnability, pass_rate_difficulty, word_rarity
from .grouping import repeat_layout
from .injection import (
    Interaction,
    continuations,
    count_rows,
    draw_places,
    find_rows,
    measure_interactions,
)
from .irt import fit_rasch, rasch_ability, within_ability
from .lengths import Multigrid, rechunk, root_length, staged_length
from .masked_spans import MaskedSpan, draw_span, plain_span, word_span
from .masking import continues_word, mask_tokens, masking_ratio
from .metadata import cooldown_step, domain_of, join_metadata
from .mixing import mixture_at, mixture_counts, mixture_order
from .naive_bayes import BernoulliBayes
from .ordering import interleave_levels, percentile_within, score_order
from .pacing import (
    competence,
    competence_order,
    cyclical_sizes,
    draw_without_replacement,
    easiest_share,
    refill,
    self_paced_weights,
)
from .packing import (
    batch_costs,
    check_lengths,
    deal_snake,
    fill_to_multiple,
    flop_coefficients,
    pack_best_fit,
    pack_padded,
)
from .replay import replayed
from .scores import (
    INSTRUCT_MINING,
    INSTRUCT_MINING_V1,
    instruct_mining,
    keep_by_judge,
    keep_top,
    kept_shares,
    perplexity,
    rarity_under,
    row_lengths,
    token_counts,
)
from .stability_gap import Dip, StabilityGap, measure_gap, stability_dip

__all__ = [
    "INSTRUCT_MINING",
    "INSTRUCT_MINING_V1",
    "LEAST_TOKENS",
    "UL2R_DENOISERS",
    "UL2_DENOISERS",
    "BernoulliBayes",
    "ContaminationReport",
    "Denoiser",
    "Dip",
    "Interaction",
    "MaskedSpan",
    "Multigrid",
    "StabilityGap",
    "apportion",
    "batch_costs",
    "as_labels",
    "auc",
    "check_count",
    "check_lengths",
    "check_number",
    "clean_scores",
    "competence",
    "competence_order",
    "contamination_report",
    "continuations",
    "continues_word",
    "cooldown_step",
    "copy_probe",
    "copy_scores",
    "count_rows",
    "cyclical_sizes",
    "deal_snake",
    "deficient_rows",
    "denoised_lengths",
    "domain_of",
    "draw_places",
    "draw_span",
    "draw_without_replacement",
    "easiest_share",
    "entropy_similarity",
    "fill_to_multiple",
    "find_rows",
    "fit_rasch",
    "fitting_length",
    "flop_coefficients",
    "instruct_mining",
    "interleave_levels",
    "join_metadata",
    "keep_by_judge",
    "keep_by_length",
    "keep_top",
    "kept_shares",
    "learnability",
    "majority_answers",
    "mask_tokens",
    "masking_ratio",
    "measure_gap",
    "measure_interactions",
    "mixture_at",
    "mixture_counts",
    "mixture_order",
    "noise_counts",
    "pack_best_fit",
    "pack_padded",
    "pass_rate_difficulty",
    "percentile_within",
    "perplexity",
    "plain_span",
    "preference_pairs",
    "rarity_under",
    "rasch_ability",
    "rechunk",
    "refill",
    "replayed",
    "relative_increase",
    "repeat_layout",
    "root_length",
    "row_lengths",
    "score_order",
    "seeded",
    "self_paced_weights",
    "shuffled_index",
    "span_mask",
    "split_spans",
    "stability_dip",
    "staged_length",
    "text_overlap",
    "token_counts",
    "top_heads",
    "top_k_entropy",
    "within_ability",
    "word_rarity",
    "word_span",
]
