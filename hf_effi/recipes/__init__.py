"""Settings of papers as functions that return trainer keyword arguments."""

from __future__ import annotations

from .ascending_quality import cdma, cma
from .stability_gap import stability_gap

__all__ = ["cdma", "cma", "stability_gap"]
"""Settings of papers, as functions that return trainer arguments and configs, and launch files."""
