"""What a checkpoint says of the updates that a search tries and undoes."""

from __future__ import annotations

from pathlib import Path

from .._record_check import load_trainer_state
from ..functional.probes import stored_plan


def written_in_probe(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint holds weights in the middle of a probe."""
    path = Path(checkpoint) / "trainer_state.json"
    if not path.is_file():
        return False
    state = load_trainer_state(checkpoint)
    return not stored_plan(state.get("stateful_callbacks") or {}).undone(state["global_step"])
