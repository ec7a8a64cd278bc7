"""Long sequences: sequence parallelism, tiled compute, activation offload, chunked backpropagation."""

from .attention import attention_scope
from .boundary import gathered_forward, sharded_forward
from .checks import check_deepspeed, check_model, implementation_of
from .groups import SequenceGroup, SequenceParallelError, make_sequence_group, valid_sizes
from .layout import SequenceLayout, split_batch
from .proof import prove_split

__all__ = [
    "SequenceGroup",
    "SequenceLayout",
    "SequenceParallelError",
    "attention_scope",
    "check_deepspeed",
    "check_model",
    "gathered_forward",
    "implementation_of",
    "make_sequence_group",
    "prove_split",
    "sharded_forward",
    "split_batch",
    "valid_sizes",
]
