"""
`AttentionCheckMixin`: a model that was given `hf_effi_varlen` and never calls it is refused before it is trained.
"""

from __future__ import annotations

from typing import Any

from ...attention.varlen import check_varlen_attention
from ...attention.varlen_masks import VARLEN_ATTENTION
from ...patching import is_sharded


class AttentionCheckMixin:
    """
    Call [`~hf_effi.attention.check_varlen_attention`] on models whose config names `hf_effi_varlen`.

    One forward over four tokens. Weights that are sharded when the trainer is built (ZeRO-3) are not looked at.

    Raises:
        RefusedError: the layers of the model compute their attention in their own code.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        configs = (getattr(module, "config", None) for module in self.model.modules())
        named = any(getattr(config, "_attn_implementation", None) == VARLEN_ATTENTION for config in configs)
        if named and not is_sharded(self.model):
            check_varlen_attention(self.model)
