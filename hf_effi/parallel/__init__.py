"""One sequence on several devices: groups, layout, exchange and attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "SequenceGroup": "hf_effi.parallel.groups",
    "SequenceLayout": "hf_effi.parallel.layout",
    "attention_scope": "hf_effi.parallel.attention",
    "check_deepspeed": "hf_effi.parallel.checks",
    "check_model": "hf_effi.parallel.checks",
    "gathered_forward": "hf_effi.parallel.boundary",
    "implementation_of": "hf_effi.parallel.checks",
    "make_sequence_group": "hf_effi.parallel.groups",
    "prove_split": "hf_effi.parallel.proof",
    "sharded_forward": "hf_effi.parallel.boundary",
    "split_batch": "hf_effi.parallel.layout",
    "valid_sizes": "hf_effi.parallel.groups",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .attention import attention_scope as attention_scope
    from .boundary import gathered_forward as gathered_forward
    from .boundary import sharded_forward as sharded_forward
    from .checks import check_deepspeed as check_deepspeed
    from .checks import check_model as check_model
    from .checks import implementation_of as implementation_of
    from .groups import SequenceGroup as SequenceGroup
    from .groups import make_sequence_group as make_sequence_group
    from .groups import valid_sizes as valid_sizes
    from .layout import SequenceLayout as SequenceLayout
    from .layout import split_batch as split_batch
    from .proof import prove_split as prove_split

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
