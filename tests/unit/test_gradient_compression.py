"""Bad arguments of compressed gradients."""

from __future__ import annotations

from typing import Any

import pytest

from hf_effi.recipes import register_gradient_compression


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("int8", {}, "kind='int8' is not one of 'fp16', 'bf16', 'powersgd'"),
        ("fp16", {"rank": 2}, "rank=2 .* with kind='powersgd'"),
        ("bf16", {"start_steps": 5}, "start_steps=5"),
        ("bf16", {"min_rate": 3.0}, "min_rate=3.0"),
        ("powersgd", {"rank": 0}, "rank=0 must be a whole number, at least 1"),
        ("powersgd", {"start_steps": 1}, "start_steps=1 must be a whole number, at least 2"),
        ("powersgd", {"min_rate": 0.5}, "min_rate=0.5 must be at least 1"),
    ],
)
def test_bad_arguments(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_gradient_compression(None, kind, **options)
