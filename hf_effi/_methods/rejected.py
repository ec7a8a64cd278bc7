"""Rows of the table: what was measured or counted and did not win. Their code stays in `bench/`."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = ()
