"""The bench of conversions, on small models: it comes to its end, and its figure is the one that is promised."""

from __future__ import annotations

import json
from pathlib import Path

from bench import checkpoint_conversion


def test_it_runs(tmp_path: Path) -> None:
    assert checkpoint_conversion.main(["--smoke", "--folder", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "checkpoint_conversion.json").read_text(encoding="utf-8"))
    figures = {figure["name"]: figure for figure in result["headline"]}
    assert figures["largest_difference_after_conversion"]["value"] == 0
    assert figures["largest_difference_after_conversion"]["met"] is True
    assert [row["to"] for row in result["rows"] if row["part"] == "cost"] == ["fsdp2", "single"]
