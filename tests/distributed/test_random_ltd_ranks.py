"""Two ranks: different subsets, equal weights."""

from __future__ import annotations

from typing import Any

import torch

from hf_effi.callbacks import RandomLTDCallback
from tests.helpers import assert_bitwise_equal, run_distributed, tiny_qwen3, weights_of
from tests.helpers.sampling import sampler_trainer


def _train(folder: str) -> dict[str, Any]:
    from transformers import Trainer

    callback = RandomLTDCallback(2, 8, ramp_fraction=1, multiple=2)
    trainer = sampler_trainer(
        folder, Trainer, callbacks=[callback], model=tiny_qwen3(num_hidden_layers=3), max_steps=2
    )
    trainer.train()
    dropping = callback.dropping
    draw = dropping.draw(1, torch.zeros(4, 8, 1), None)
    return {"weights": weights_of(trainer.model), "draw": draw, "layer_tokens": dropping.layer_tokens}


def test_two_ranks(tmp_path):
    first, second = run_distributed(_train, 2, str(tmp_path))
    assert not torch.equal(first["draw"], second["draw"])
    assert first["layer_tokens"] == second["layer_tokens"] == 4 * (2 + 16) + 4 * (4 + 16)
    assert_bitwise_equal(first["weights"], second["weights"])
