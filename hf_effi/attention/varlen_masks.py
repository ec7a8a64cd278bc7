"""
What transformers' masks let each token see, against what [`hf_effi.attention.varlen`] computes without building them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask
from transformers.utils import logging

from ..errors import RefusedError
from ..patching import Finding
from ._varlen_probe import Layout, ask, packs_documents, problem_of, running_model

logger = logging.get_logger(__name__)

#: what `attn_implementation=` takes
VARLEN_ATTENTION = "hf_effi_varlen"


_OTHERS = "Use attn_implementation='sdpa' or 'eager'."


class View(NamedTuple):
    """
    What a layer computes within a document.

    Args:
        causal (`bool`): Whether tokens see only what is before them.
        window (`int`, *optional*): How many tokens they see, themselves included.
    """

    causal: bool
    window: int | None

    def sees(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return which keys a query sees, by their places in the row."""
        seen = torch.ones_like(keys, dtype=torch.bool)
        if self.causal:
            seen &= keys <= query
        if self.window is not None:
            seen &= keys > query - self.window
        return seen

    def __str__(self) -> str:
        size = "everything" if self.window is None else f"a window of {self.window} tokens"
        return f"{size}{' before it' if self.causal else ''}"


class Document(NamedTuple):
    """
    One document of a call, the longest.

    Args:
        row (`int`): Its row of the batch.
        places (`Tensor`): Where its tokens are in the row, rising.
    """

    row: int
    places: Tensor


class _Made(NamedTuple):
    """A mask that transformers asked for: its shape, and the function of indices that it is made by."""

    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    function: Callable[..., Tensor]
    local_size: int | None
    use_vmap: bool
    batch: int

    def row(self, query: Tensor, document: Document) -> Tensor:
        """Return which tokens of a document the mask lets one of them see."""
        mask = sdpa_mask(
            batch_size=self.batch,
            q_length=1,
            kv_length=self.kv_length,
            q_offset=query + self.kv_offset,
            kv_offset=self.kv_offset,
            mask_function=self.function,
            allow_is_causal_skip=False,
            use_vmap=self.use_vmap,
            device=document.places.device,
        )
        return mask[document.row, 0, 0, document.places]


class MaskLedger:
    """
    Holds the masks that a forward asked for, and says whether a layer that follows none of them may run.

    Transformers makes one mask for each kind of layer, and hands nothing on of it where attention is of the flash
    kind. A kind that no layer can follow here (chunks, blocks that see both ways) is refused, and a layer that sees
    what no mask says.
    """

    def __init__(self) -> None:
        self._made: list[_Made] = []
        self._views: dict[View, bool] = {}
        self._shape: tuple[int, int] | None = None
        self._read = True
        self._findings: dict[str, Finding | None] = {}
        self._packed = False
        self.calls = 0  # of layers, in probes

    def ask_model(self, layout: Layout) -> None:
        """Ask the model whose forward is running, the first time that it makes masks; see [`ask`]."""
        model, state = running_model(), dict(vars(self))
        findings = {kind: ask(model, kind, VARLEN_ATTENTION) for kind in ("plain", layout)}
        vars(self).update(state)  # what the model ran for the answer left its own masks
        self._findings = findings
        alone = findings.get("packed")
        self._packed = alone is not None and not alone.equal and packs_documents()
        for kind, found in findings.items():
            # A failure would be an error of the model's own here. And a layer that computes its attention itself, with
            # no mask, never comes to ask.
            alone = kind == "plain" and found is not None and found.looked and not found.equal
            if found is not None and (found.failed or alone):
                raise RefusedError(f"The model {problem_of(found, kind)}. {_OTHERS}")

    def said(self, layouts: Iterable[Layout]) -> str | None:
        """Return what the running model's own answers say against these layouts of a call, or `None`."""
        self._read = True
        for layout in (*layouts, *(["packed"] if self._packed else ())):
            found = self._findings.get(layout)
            if found is not None and not found.looked and not found.failed:
                logger.warning_once(f"Whether {VARLEN_ATTENTION} is exact for this model is not known: {found}.")
            elif problem := problem_of(found, layout):
                return problem
        return None

    def note(self, made: _Made) -> None:
        """Note a mask; the first one after a layer ran belongs to the next forward."""
        if self._read:
            self._made, self._views, self._shape, self._read = [], {}, None, False
        self._made.append(made)

    def reach(self) -> int | None:
        """Return the smallest window or chunk among the masks of this forward, `None` where there is none."""
        return min((m.local_size for m in self._made if m.local_size is not None), default=None)

    def problem(
        self, view: View, shape: tuple[int, int], longest: Callable[[], Document], one_kind: bool
    ) -> str | None:
        """
        Return what is wrong with a layer, or `None`.

        Args:
            view ([`View`]): What the layer computes.
            shape (`tuple[int, int]`): Queries and keys of a row.
            longest (`Callable`): Finds the document that is looked at; called once a forward.
            one_kind (`bool`): Whether causal layers and layers open to both sides cannot be in one stack.
        """
        made = [m for m in self._made if (m.q_length, m.kv_length) == shape]
        if not made:
            return None
        if self._read and self._shape == shape and view in self._views:
            return None if self._views[view] else self._unseen(view)
        self._read, self._shape = True, shape
        document = longest()
        last = len(document.places) - 1
        # Neighbours among them: a chunk and a window of one size look alike from the last token of a chunk.
        picked = (
            [last] if shape[0] != shape[1] else sorted({0, last // 3, last // 2, 2 * last // 3, last - 1, last} - {-1})
        )
        queries = [document.places[i] for i in picked]
        rows = [torch.stack([m.row(query, document) for query in queries]) for m in made]
        followed = self._followed(made, rows, queries, document, view)
        for mask, views in zip(made, followed, strict=True):
            if not views:
                size = f" of {mask.local_size} tokens" if mask.local_size is not None else ""
                return f"has layers whose mask{size} is neither causal, nor a sliding window, nor open to both sides"
        one_sided = any(all(v.causal for v in views) for views in followed)
        if one_kind and one_sided and not view.causal:
            return "sees what is behind a token, and the model makes a mask that hides it"
        self._views = {v: any(v in views for views in followed) for v in {view, *self._views}}
        return None if self._views[view] else self._unseen(view)

    def _followed(
        self, made: list[_Made], rows: list[Tensor], queries: list[Tensor], document: Document, view: View
    ) -> list[set[View]]:
        """Return, for each mask, which views give just what it says."""
        options = {view, *self._views, View(True, None), View(False, None)}
        options |= {View(True, m.local_size) for m in made if m.local_size is not None}
        ordered = sorted(options, key=str)
        expected = [torch.stack([option.sees(query, document.places) for query in queries]) for option in ordered]
        # One wait for the device.
        same = torch.stack([(row == wanted).all() for row in rows for wanted in expected]).view(len(rows), -1).tolist()
        return [{option for option, fits in zip(ordered, fit, strict=True) if fits} for fit in same]

    def _unseen(self, view: View) -> str:
        return f"sees {view}, which none of the model's masks says"


LEDGER = MaskLedger()


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """
    What transformers calls to make a mask: notes which one is meant, and returns the padding mask, where there is any.
    """
    if indexer := _indexer_of(kwargs.get("config")):
        raise RefusedError(
            f"{indexer} says that the model chooses tokens by a mask that hf_effi_varlen does not build. Use "
            "attn_implementation='sdpa' or 'eager'."
        )
    padding = flash_attention_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    if not torch.compiler.is_compiling():
        LEDGER.ask_model("packed" if padding is None else "padded")
        made = _Made(
            q_length=q_length,
            kv_length=kv_length,
            q_offset=int(q_offset),
            kv_offset=int(kv_offset),
            function=mask_function,
            local_size=local_size,
            use_vmap=use_vmap,
            batch=batch_size,
        )
        LEDGER.note(made)
    return padding


def _indexer_of(config: Any) -> str | None:
    """Name a setting of sparse attention: such models stop at a mask that is not there, with an error of their own."""
    names = (name for name, value in vars(config).items() if value) if hasattr(config, "__dict__") else ()
    return next((name for name in names if name.startswith(("index_topk", "index_n_heads", "indexer_"))), None)
