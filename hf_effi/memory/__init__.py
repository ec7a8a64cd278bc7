"""Less memory on one device with the same gradients: tiled loss, streamed layers, chunk flow, offload, layer modes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "ActivationOffloader": "hf_effi.memory.offload",
    "ChunkFlow": "hf_effi.memory.chunk_flow",
    "LayerModes": "hf_effi.memory.layer_modes",
    "LayerProbe": "hf_effi.memory.layer_profile",
    "stream_layers": "hf_effi.memory.stream_layer",
    "tile_loss": "hf_effi.memory.tiled_loss",
    "tiled_cross_entropy": "hf_effi.memory.tiled_loss",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .chunk_flow import ChunkFlow as ChunkFlow
    from .layer_modes import LayerModes as LayerModes
    from .layer_profile import LayerProbe as LayerProbe
    from .offload import ActivationOffloader as ActivationOffloader
    from .stream_layer import stream_layers as stream_layers
    from .tiled_loss import tile_loss as tile_loss
    from .tiled_loss import tiled_cross_entropy as tiled_cross_entropy

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
