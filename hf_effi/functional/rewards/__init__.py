"""What rewards compute, as pure functions of texts, numbers and token ids."""

from __future__ import annotations

from .answers import (
    boxed_answers,
    choice_of,
    last_formula,
    marked_answers,
    marked_choices,
    minerva_answer,
    text_after,
    text_within,
)
from .benchmark import (
    TIES_WEIGHTS,
    TiesScore,
    best_of_credit,
    ties_score,
)
from .bleu import (
    COUNTINGS,
    SMOOTHINGS,
    corpus_bleu,
    sentence_bleu,
)
from .code import (
    fraction_passed,
    last_fence,
    outputs_agree,
)
from .domain import (
    length_band,
    text_in_tag,
)
from .formats import (
    soft_overlong,
    tag_conditions,
)
from .instructions import (
    INSTRUCTIONS,
    check_instruction,
    count_sentences,
    loose_forms,
)
from .json_schema import (
    Schema,
    field_f1,
    read_schema,
    structure_score,
)
from .json_text import (
    JSONText,
    read_json,
)
from .length import (
    ExponentialBudget,
    LinearBudget,
    NDecayBudget,
    band_reward,
    check_budget,
    exponential_budget,
    linear_budget,
    n_decay_budget,
    triangular_reward,
)
from .matching import (
    normal_tokens,
    same_math,
    token_f1,
    without_fence,
)
from .numbers import (
    numbers_in,
    parse_number,
    plain_characters,
)
from .tables import (
    TABLE_FORMATS,
    read_tables,
    table_scores,
)
from .texts import texts_of
from .voting import (
    Vote,
    answer_classes,
    generator_rewards,
    is_answer,
    majority_vote,
)

__all__ = [
    "COUNTINGS",
    "ExponentialBudget",
    "INSTRUCTIONS",
    "JSONText",
    "LinearBudget",
    "NDecayBudget",
    "SMOOTHINGS",
    "Schema",
    "TABLE_FORMATS",
    "TIES_WEIGHTS",
    "TiesScore",
    "Vote",
    "answer_classes",
    "band_reward",
    "best_of_credit",
    "boxed_answers",
    "check_budget",
    "check_instruction",
    "choice_of",
    "corpus_bleu",
    "count_sentences",
    "exponential_budget",
    "field_f1",
    "fraction_passed",
    "generator_rewards",
    "is_answer",
    "last_fence",
    "last_formula",
    "length_band",
    "linear_budget",
    "loose_forms",
    "majority_vote",
    "marked_answers",
    "marked_choices",
    "minerva_answer",
    "n_decay_budget",
    "normal_tokens",
    "numbers_in",
    "outputs_agree",
    "parse_number",
    "plain_characters",
    "read_json",
    "read_schema",
    "read_tables",
    "same_math",
    "sentence_bleu",
    "soft_overlong",
    "structure_score",
    "table_scores",
    "tag_conditions",
    "text_after",
    "text_in_tag",
    "text_within",
    "ties_score",
    "texts_of",
    "token_f1",
    "triangular_reward",
    "without_fence",
]
