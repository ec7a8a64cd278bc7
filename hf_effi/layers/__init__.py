"""Which layers see which tokens: random layerwise token dropping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "TokenDropping": "hf_effi.layers.random_ltd",
    "drop_layer_tokens": "hf_effi.layers.random_ltd",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .random_ltd import TokenDropping as TokenDropping
    from .random_ltd import drop_layer_tokens as drop_layer_tokens

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
