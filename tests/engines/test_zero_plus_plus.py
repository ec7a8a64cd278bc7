"""The config of ZeRO++ that the docs name: DeepSpeed takes it, and refuses a name that it does not know."""

from __future__ import annotations

import re

import pytest

from tests.contract._sources import ROOT


def test_the_config_of_the_card_is_taken_and_a_misspelled_one_is_not() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    text = (ROOT / "docs/methods/gradient_compression.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(zero_plus_plus = .*?)```", text, re.DOTALL)
    found: dict = {}
    exec(block[1], found)  # the block of our own card
    section = found["zero_plus_plus"]["zero_optimization"]
    config = DeepSpeedZeroConfig(**section)
    assert config.zero_quantized_weights and config.zero_quantized_gradients and config.zero_hpz_partition_size == 8
    with pytest.raises(ValidationError, match="zero_quantised_weights"):
        DeepSpeedZeroConfig(**section, zero_quantised_weights=True)
