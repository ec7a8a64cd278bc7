"""A checkpoint that a Trainer wrote, converted there and back: a stock Trainer goes on from it to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_effi.checkpoint import SafeCheckpointer, convert_checkpoint
from hf_effi.checkpoint.manifest import read_manifest
from tests.helpers import assert_bitwise_equal, lm_dataset, push_args, tiny_qwen3, weights_of
from tests.training.test_safe_checkpoints_lazy import made


def of_stock(folder: Path) -> Trainer:
    """Without a manifest: the names are found by the model of `config.json`."""
    over = {"max_steps": 4, "weight_decay": 0.1}
    return Trainer(tiny_qwen3(tie_word_embeddings=True), push_args(folder, **over), train_dataset=lm_dataset(40))


def of_a_plain_module(folder: Path) -> Any:
    """With buffers and without `config.json`: the names are those of the manifest."""
    trainer = made(folder, save_steps=2)
    SafeCheckpointer().attach(trainer)
    return trainer


@pytest.mark.parametrize("make", [of_stock, of_a_plain_module])
def test_a_run_goes_on_to_the_bit(tmp_path: Path, make: Any) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    first = tmp_path / "whole" / "checkpoint-2"
    stored = (read_manifest(first) or {}).get("optimizer_parameters")
    assert (stored is None) == (make is of_stock)
    if stored is not None:
        assert stored == [["head.weight"], ["norm.weight", "norm.bias", "head.bias"]]
    there = convert_checkpoint(first, tmp_path / "there" / "checkpoint-2", to="fsdp2")
    back = convert_checkpoint(there, tmp_path / "back" / "checkpoint-2", to="single")
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(back))
    assert again.state.global_step == 4
    assert_bitwise_equal(weights_of(whole.model), weights_of(again.model))
    for name, buffer in whole.model.named_buffers():
        assert bool((dict(again.model.named_buffers())[name] == buffer).all()), name
