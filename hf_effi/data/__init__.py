"""What makes, changes or scores rows: scorers, collators, batch transforms, self-improvement, token files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "AttentionInfluence": "hf_effi.data.attention_influence",
    "BatchTransform": "hf_effi.data.batch_transform",
    "ColumnScore": "hf_effi.data.scores",
    "ContaminationProbe": "hf_effi.data.contamination",
    "Denoiser": "hf_effi.functional.data",
    "GreedyAnswers": "hf_effi.data.self_improvement",
    "InjectedDataset": "hf_effi.data.injected_dataset",
    "Injection": "hf_effi.data.injection",
    "InjectionPlan": "hf_effi.data.injection",
    "InjectionResult": "hf_effi.data.injection",
    "MaskedSpanPrompts": "hf_effi.data.masked_spans",
    "MaskingRatioCurriculum": "hf_effi.data.masking",
    "MetadataCollator": "hf_effi.data.metadata",
    "MetadataConditioning": "hf_effi.data.metadata",
    "MegatronTokenFile": "hf_effi.data.token_files",
    "ModelScore": "hf_effi.data.scores",
    "Multigrid": "hf_effi.functional.data",
    "NanotronTokenFile": "hf_effi.data.token_files",
    "ReplayStream": "hf_effi.data.replay_stream",
    "RowCorrect": "hf_effi.data.row_measures",
    "RowLoss": "hf_effi.data.row_measures",
    "RowScorer": "hf_effi.data.scores",
    "SAMICollator": "hf_effi.data.sami",
    "SELF_CRITIQUE": "hf_effi.data.contamination",
    "SelfImprovement": "hf_effi.data.self_improvement",
    "SharedPrefixCollator": "hf_effi.data.shared_prefix",
    "StepLabelCollator": "hf_effi.data.step_labels",
    "TokenBlocks": "hf_effi.data.token_blocks",
    "TokenFile": "hf_effi.data.token_files",
    "UL2Denoising": "hf_effi.data.denoising",
    "UL2R_DENOISERS": "hf_effi.functional.data",
    "UL2_DENOISERS": "hf_effi.functional.data",
    "add_score": "hf_effi.data.scores",
    "contamination_scores": "hf_effi.data.contamination",
    "copy_head_scores": "hf_effi.data.attention_influence",
    "group_by_prompt": "hf_effi.data.shared_prefix",
    "masked_heads": "hf_effi.data.attention_influence",
    "model_fingerprint": "hf_effi.data.scores",
    "repeat_rows": "hf_effi.data.few_rows",
    "retrieval_heads": "hf_effi.data.attention_influence",
    "write_token_file": "hf_effi.data.token_writer",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..functional.data import UL2_DENOISERS as UL2_DENOISERS
    from ..functional.data import UL2R_DENOISERS as UL2R_DENOISERS
    from ..functional.data import Denoiser as Denoiser
    from ..functional.data import Multigrid as Multigrid
    from .attention_influence import AttentionInfluence as AttentionInfluence
    from .attention_influence import copy_head_scores as copy_head_scores
    from .attention_influence import masked_heads as masked_heads
    from .attention_influence import retrieval_heads as retrieval_heads
    from .batch_transform import BatchTransform as BatchTransform
    from .contamination import SELF_CRITIQUE as SELF_CRITIQUE
    from .contamination import ContaminationProbe as ContaminationProbe
    from .contamination import contamination_scores as contamination_scores
    from .denoising import UL2Denoising as UL2Denoising
    from .few_rows import repeat_rows as repeat_rows
    from .injected_dataset import InjectedDataset as InjectedDataset
    from .injection import Injection as Injection
    from .injection import InjectionPlan as InjectionPlan
    from .injection import InjectionResult as InjectionResult
    from .masked_spans import MaskedSpanPrompts as MaskedSpanPrompts
    from .masking import MaskingRatioCurriculum as MaskingRatioCurriculum
    from .metadata import MetadataCollator as MetadataCollator
    from .metadata import MetadataConditioning as MetadataConditioning
    from .replay_stream import ReplayStream as ReplayStream
    from .row_measures import RowCorrect as RowCorrect
    from .row_measures import RowLoss as RowLoss
    from .sami import SAMICollator as SAMICollator
    from .scores import ColumnScore as ColumnScore
    from .scores import ModelScore as ModelScore
    from .scores import RowScorer as RowScorer
    from .scores import add_score as add_score
    from .scores import model_fingerprint as model_fingerprint
    from .self_improvement import GreedyAnswers as GreedyAnswers
    from .self_improvement import SelfImprovement as SelfImprovement
    from .shared_prefix import SharedPrefixCollator as SharedPrefixCollator
    from .shared_prefix import group_by_prompt as group_by_prompt
    from .step_labels import StepLabelCollator as StepLabelCollator
    from .token_blocks import TokenBlocks as TokenBlocks
    from .token_files import MegatronTokenFile as MegatronTokenFile
    from .token_files import NanotronTokenFile as NanotronTokenFile
    from .token_files import TokenFile as TokenFile
    from .token_writer import write_token_file as write_token_file

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
