"""What every attention layer has to know about the whole batch of which this rank holds a part."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .._compat import CACHE_ARGUMENTS
from ..errors import RefusedError
from ..functional.sequence import (
    causal_document_mask,
    document_boundaries,
    document_ids,
    shard_sequence,
    shift_labels,
)
from .exchange import GatherGradient, gather_sequence
from .groups import SequenceGroup

#: Largest mask of the `sdpa` backend, in elements (bytes): 256 MiB.
MASK_LIMIT = 2**28

#: Inputs that are cut along dimension 1, and what their padding holds.
_SHARDED = {"input_ids": 0, "inputs_embeds": 0, "token_type_ids": 0, "attention_mask": 0, "labels": -100}
#: Inputs that only describe documents.
_DESCRIPTIONS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class SequenceLayout:
    """
    The whole batch of one forward, as this rank's attention sees it after the exchange.

    Args:
        group ([`SequenceGroup`]): The ranks that hold it.
        documents (`Tensor`): `(B, S)` with `S` a multiple of `group.size`, from `document_ids`.
        length (`int`): `S` before padding.
        inputs (`set[str]`): Names of what the model is called with; `position_ids` included, which models also make.
        padding_mask (`Tensor`, *optional*): `(B, S)`, 1 on real tokens, where the batch came without `position_ids`:
            the model that is called then says how it counts them.
    """

    group: SequenceGroup
    documents: Tensor
    length: int
    inputs: set[str] = field(default_factory=lambda: {"position_ids"})
    entered: set[int] = field(default_factory=set)
    padding_mask: Tensor | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @property
    def shard_length(self) -> int:
        """Tokens of a row that a rank holds."""
        return self.documents.size(1) // self.group.size

    @functools.cached_property
    def one_document(self) -> bool:
        """Whether plain causal attention is exact: every row is one document."""
        return not bool(self.documents.any())

    @functools.cached_property
    def boundaries(self) -> tuple[Tensor, int]:
        """`cu_seqlens` of the flattened batch and the longest document."""
        cu_seqlens = document_boundaries(self.documents)
        return cu_seqlens, int(cu_seqlens.diff().max())

    def mask(self, window: int | None) -> Tensor | None:
        """
        Return the `(B, 1, S, S)` mask for backends that take one; `None` where plain causal attention is exact.

        Raises:
            RefusedError: it would have more than `MASK_LIMIT` elements.
        """
        if window is not None and window >= self.documents.size(1):
            window = None
        if window is None and self.one_document:
            return None
        if window not in self._masks:
            rows, length = self.documents.shape
            if rows * length**2 > MASK_LIMIT:
                raise RefusedError(
                    f"attn_implementation='sdpa' would need a mask of {rows} x {length} x {length} = "
                    f"{rows * length**2:,} elements for packed, left-padded or sliding-window attention; the limit is "
                    f"{MASK_LIMIT:,}. Use a backend that takes document boundaries, such as 'flash_attention_2' or a "
                    "varlen backend, or shorter sequences."
                )
            self._masks[window] = causal_document_mask(self.documents, window)
        return self._masks[window]

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the same for `flex_attention`, which keeps blocks instead of elements."""
        documents = self.documents

        def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (documents[row, query] == documents[row, key]) & (query >= key)
            return same if window is None else same & (query - key < window)

        if window not in self._block_masks:
            rows, length = documents.shape
            self._block_masks[window] = create_block_mask(allowed, rows, None, length, length, device=documents.device)
        return self._block_masks[window]

    def gather(self, outputs: Any, gradient: GatherGradient, length: int) -> Any:
        """
        Replace every `(B, S/P, ...)` tensor in a model output by the whole `(B, length, ...)`.

        Other entries stay as they are, except a `loss`, which is the mean over this shard only and becomes `None`.
        """
        rows, part = self.documents.size(0), self.shard_length

        def whole(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(whole(entry) for entry in value)
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == (rows, part):
                return gather_sequence(value, self.group, gradient)[:, :length]
            return value

        for name, value in list(outputs.items()):
            outputs[name] = None if name == "loss" else whole(value)
        return outputs


def tokens_of(inputs: Mapping[str, Any]) -> Tensor:
    """
    Return the input whose dimension 1 is the sequence.

    Raises:
        RefusedError: there is none.
    """
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return inputs[name]
    raise RefusedError(
        f"Sequence parallelism needs input_ids or inputs_embeds; the batch has {', '.join(inputs) or 'nothing'}."
    )


def split_batch(inputs: Mapping[str, Any], group: SequenceGroup) -> tuple[SequenceLayout, dict[str, Any]]:
    """
    Split a whole batch, the same on every rank of `group`, along the sequence.

    Positions stay global (counted by column where none are given; `sharded_forward` and `gathered_forward` then ask
    the model), labels also come as `shift_labels`, and rows are padded at the end to a multiple of `P`.

    Args:
        inputs (`Mapping[str, Any]`): What the model takes: `input_ids` or `inputs_embeds`, and any of `labels`,
            `shift_labels`, `position_ids`, `attention_mask`, `token_type_ids`, `cu_seq_lens_q`, plain options.
        group ([`SequenceGroup`]): The ranks of the sequence.

    Returns:
        `tuple[SequenceLayout, dict[str, Any]]`: The layout, and the inputs of this rank.

    Raises:
        RefusedError: an input that cannot be split, by name.
    """
    tokens = tokens_of(inputs)
    rows, length = tokens.shape[:2]
    _check_inputs(inputs, rows, length)
    positions, counted = inputs.get("position_ids"), None
    documents = document_ids(
        (rows, length),
        position_ids=positions,
        attention_mask=inputs.get("attention_mask"),
        cu_seqlens=inputs.get("cu_seq_lens_q"),
        device=tokens.device,
    )
    missing = -length % group.size
    if positions is None:
        positions = torch.arange(length, device=tokens.device)[None]
        given = inputs.get("attention_mask")
        counted = torch.ones_like(documents) if given is None else given.to(documents)
        counted = F.pad(counted, (0, missing))
    # Padding at the end of a row stays in its last document: causality hides it, and no mask is needed for it.
    documents = torch.cat([documents, documents[:, -1:].expand(-1, missing)], dim=1)
    shard = {
        name: value
        for name, value in inputs.items()
        if name not in _SHARDED and name not in _DESCRIPTIONS and name not in ("position_ids", "shift_labels")
    }
    # Without a mask the padding would be counted as tokens.
    inputs = {"attention_mask": torch.ones_like(documents[:, :length]), **inputs} if missing else inputs
    for name, fill in _SHARDED.items():
        if inputs.get(name) is not None:
            shard[name] = shard_sequence(inputs[name], group.size, group.rank, fill)
    shifted = inputs.get("shift_labels")
    if shifted is None and inputs.get("labels") is not None:
        shifted = shift_labels(inputs["labels"])
    if shifted is not None:
        _check_labels(shifted, inputs.get("attention_mask"))
        shard["shift_labels"] = shard_sequence(shifted, group.size, group.rank, -100)
    shard["position_ids"] = shard_sequence(positions.expand(rows, -1), group.size, group.rank)
    return SequenceLayout(group, documents, length, padding_mask=counted), shard


def _check_labels(shifted: Tensor, mask: Tensor | None) -> None:
    """What padding attends to is the backend's own affair, so what it predicts is the same nowhere."""
    if mask is not None and bool((shifted[:, : mask.shape[1]][mask == 0] != -100).any()):
        raise RefusedError(
            "A padding token would have to predict a label, from keys that differ between backends. Pad on the right "
            "and label padding -100, or give the first token of left-padded rows the label -100."
        )


def _check_inputs(inputs: Mapping[str, Any], rows: int, length: int) -> None:
    for name, value in inputs.items():
        if name in CACHE_ARGUMENTS and value is not None:
            raise RefusedError(f"{name}: a forward with a cache cannot be split along the sequence.")
        if name == "logits_to_keep" and not isinstance(value, Tensor) and value:
            raise RefusedError(f"logits_to_keep={value}: it counts from the end of the whole sequence.")
        if name in _DESCRIPTIONS or not isinstance(value, Tensor) or value.ndim == 0:
            continue
        if name == "position_ids" and value.shape in ((rows, length), (1, length)):
            continue
        if (name in _SHARDED or name == "shift_labels") and value.shape[:2] == (rows, length):
            if name != "attention_mask" or value.ndim == 2:
                continue
        raise RefusedError(
            f"Sequence parallelism cannot split the input {name!r} of shape {tuple(value.shape)} in a batch of "
            f"{rows} x {length} tokens. It splits {', '.join((*_SHARDED, 'shift_labels', 'position_ids'))} of shape "
            f"({rows}, {length}); image inputs and 3-d or 4-d masks and positions are not supported."
        )
