"""Attention over rows of several documents and over shared prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "AttentionPattern": "hf_effi.functional.segment_attention",
    "check_shared_prefix": "hf_effi.attention.shared_prefix",
    "check_varlen_attention": "hf_effi.attention.varlen",
    "merge_attention": "hf_effi.attention.merge",
    "plan_shared_prefix": "hf_effi.functional.shared_prefix",
    "register_varlen_attention": "hf_effi.attention.varlen",
    "set_attention_patterns": "hf_effi.attention.varlen",
    "shared_prefix_attention": "hf_effi.attention.shared_prefix",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..functional.segment_attention import AttentionPattern as AttentionPattern
    from ..functional.shared_prefix import plan_shared_prefix as plan_shared_prefix
    from .merge import merge_attention as merge_attention
    from .shared_prefix import check_shared_prefix as check_shared_prefix
    from .shared_prefix import shared_prefix_attention as shared_prefix_attention
    from .varlen import check_varlen_attention as check_varlen_attention
    from .varlen import register_varlen_attention as register_varlen_attention
    from .varlen import set_attention_patterns as set_attention_patterns

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
