"""What is read and made from checkpoints: averages, and exact copies of a training state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "average_checkpoints": "hf_effi.checkpoint.average",
    "restore_snapshot": "hf_effi.checkpoint.snapshot",
    "take_snapshot": "hf_effi.checkpoint.snapshot",
    "written_in_probe": "hf_effi.checkpoint.probes",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .average import average_checkpoints as average_checkpoints
    from .probes import written_in_probe as written_in_probe
    from .snapshot import restore_snapshot as restore_snapshot
    from .snapshot import take_snapshot as take_snapshot

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
