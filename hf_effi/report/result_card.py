"""The model card: YAML front matter, the whole recipe as JSON, what was measured, and how to run it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import save_text
from ..hub.model_card import json_block, markdown_table

__all__ = ["front_matter", "markdown_table", "render_card", "write_card"]


def front_matter(data: Mapping[str, Any]) -> str:
    """Return a YAML block. JSON scalars and lists are YAML, so nothing needs quoting rules of its own."""
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in data.items()), "---"])


def render_card(
    *,
    name: str,
    summary: str,
    tags: Sequence[str],
    arguments: Mapping[str, Any],
    table: str,
    command: str,
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
    license_name: str = "apache-2.0",
    metrics: Mapping[str, float] | None = None,
) -> str:
    """
    Return a model card in Markdown.

    Args:
        arguments (`Mapping`): Trainer class name and its exact arguments; written as JSON, so it can be read back.
        table (`str`): What was measured, a Markdown table.
        command (`str`): What to type to get the same model and table.
        metrics (`Mapping[str, float]`, *optional*): Metric name -> value for the front matter's `model-index`.
    """
    header: dict[str, Any] = {
        "library_name": "transformers",
        "license": license_name,
        "pipeline_tag": "text-generation",
        "model_name": name,
        "tags": list(tags),
    }
    if metrics:
        header["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "chains of one-digit sums (held out)", "type": "synthetic"},
                        "metrics": [
                            {"type": "accuracy", "name": metric, "value": round(value, 4)}
                            for metric, value in metrics.items()
                        ],
                    }
                ],
            }
        ]
    parts = [
        front_matter(header),
        f"# {name}",
        summary,
        "## What was measured",
        table,
        *(f"- {note}" for note in notes),
        "## Recipe",
        json_block(arguments),
        "## Run it again",
        f"```bash\n{command}\n```",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def write_card(folder: Path, **fields: Any) -> Path:
    """Write [`render_card`] to `folder/README.md` and return its path."""
    path = folder / "README.md"
    save_text(path, render_card(**fields))
    return path
