"""Rewards that can be checked, for `reward_funcs=` of any GRPO trainer: batched, picklable, safe on hostile texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "AnswerReward": "hf_effi.rewards.answers",
    "BLEUReward": "hf_effi.rewards.bleu",
    "CappedReward": "hf_effi.rewards.domain",
    "ChoiceReward": "hf_effi.rewards.answers",
    "ClassInTagReward": "hf_effi.rewards.domain",
    "CodeIOReward": "hf_effi.rewards.code",
    "ExactMatchReward": "hf_effi.rewards.answers",
    "ExactSpanReward": "hf_effi.rewards.label_free",
    "GatedReward": "hf_effi.rewards.domain",
    "InstructionReward": "hf_effi.rewards.formats",
    "Isolation": "hf_effi.rewards._isolation",
    "JSONReward": "hf_effi.rewards.structures",
    "Language": "hf_effi.rewards.code",
    "LastNumberReward": "hf_effi.rewards.answers",
    "LengthBandReward": "hf_effi.rewards.domain",
    "LengthBudgetReward": "hf_effi.rewards.length",
    "LengthMatchReward": "hf_effi.rewards.formats",
    "MajorityVoteReward": "hf_effi.rewards.label_free",
    "MathReward": "hf_effi.rewards.math",
    "NormalizedMatchReward": "hf_effi.rewards.answers",
    "ProgramResult": "hf_effi.rewards._program",
    "Reward": "hf_effi.rewards.base",
    "RunPreset": "hf_effi.rewards.presets",
    "Sandbox": "hf_effi.rewards.sandbox",
    "SandboxLimits": "hf_effi.rewards._program",
    "SoftOverlongReward": "hf_effi.rewards.formats",
    "StepReward": "hf_effi.rewards.steps",
    "TableReward": "hf_effi.rewards.structures",
    "TagFormatReward": "hf_effi.rewards.formats",
    "TokenF1Reward": "hf_effi.rewards.answers",
    "VerifierReward": "hf_effi.rewards.verifier",
    "choice_reward": "hf_effi.rewards.answers",
    "classification": "hf_effi.rewards.presets",
    "exact_match_reward": "hf_effi.rewards.answers",
    "instruction_reward": "hf_effi.rewards.formats",
    "last_number_reward": "hf_effi.rewards.answers",
    "long_form": "hf_effi.rewards.presets",
    "math_reward": "hf_effi.rewards.math",
    "normalized_match_reward": "hf_effi.rewards.answers",
    "probe_isolation": "hf_effi.rewards._isolation",
    "strict_math_reward": "hf_effi.rewards.math",
    "strict_number_reward": "hf_effi.rewards.answers",
    "structured": "hf_effi.rewards.presets",
    "texts_of": "hf_effi.functional.rewards",
    "think_answer_format_reward": "hf_effi.rewards.formats",
    "token_f1_reward": "hf_effi.rewards.answers",
    "train_long_think_short": "hf_effi.rewards.length",
    "tulu_verifiers": "hf_effi.rewards.verifier",
    "verifier_reward": "hf_effi.rewards.verifier",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..functional.rewards import texts_of as texts_of
    from ._isolation import Isolation as Isolation
    from ._isolation import probe_isolation as probe_isolation
    from ._program import ProgramResult as ProgramResult
    from ._program import SandboxLimits as SandboxLimits
    from .answers import AnswerReward as AnswerReward
    from .answers import ChoiceReward as ChoiceReward
    from .answers import ExactMatchReward as ExactMatchReward
    from .answers import LastNumberReward as LastNumberReward
    from .answers import NormalizedMatchReward as NormalizedMatchReward
    from .answers import TokenF1Reward as TokenF1Reward
    from .answers import choice_reward as choice_reward
    from .answers import exact_match_reward as exact_match_reward
    from .answers import last_number_reward as last_number_reward
    from .answers import normalized_match_reward as normalized_match_reward
    from .answers import strict_number_reward as strict_number_reward
    from .answers import token_f1_reward as token_f1_reward
    from .base import Reward as Reward
    from .bleu import BLEUReward as BLEUReward
    from .code import CodeIOReward as CodeIOReward
    from .code import Language as Language
    from .domain import CappedReward as CappedReward
    from .domain import ClassInTagReward as ClassInTagReward
    from .domain import GatedReward as GatedReward
    from .domain import LengthBandReward as LengthBandReward
    from .formats import InstructionReward as InstructionReward
    from .formats import LengthMatchReward as LengthMatchReward
    from .formats import SoftOverlongReward as SoftOverlongReward
    from .formats import TagFormatReward as TagFormatReward
    from .formats import instruction_reward as instruction_reward
    from .formats import think_answer_format_reward as think_answer_format_reward
    from .label_free import ExactSpanReward as ExactSpanReward
    from .label_free import MajorityVoteReward as MajorityVoteReward
    from .length import LengthBudgetReward as LengthBudgetReward
    from .length import train_long_think_short as train_long_think_short
    from .math import MathReward as MathReward
    from .math import math_reward as math_reward
    from .math import strict_math_reward as strict_math_reward
    from .presets import RunPreset as RunPreset
    from .presets import classification as classification
    from .presets import long_form as long_form
    from .presets import structured as structured
    from .sandbox import Sandbox as Sandbox
    from .steps import StepReward as StepReward
    from .structures import JSONReward as JSONReward
    from .structures import TableReward as TableReward
    from .verifier import VerifierReward as VerifierReward
    from .verifier import tulu_verifiers as tulu_verifiers
    from .verifier import verifier_reward as verifier_reward

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
