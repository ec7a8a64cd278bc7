"""Settings of papers, as functions that return trainer keyword arguments, configs, and launch files."""

from __future__ import annotations

from .ascending_quality import cdma, cma
from .stability_gap import stability_gap

__all__ = ["cdma", "cma", "stability_gap"]
