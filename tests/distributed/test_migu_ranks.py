"""Two ranks: the masks of one process with the same rows, and of each other, whoever saw which rows."""

from __future__ import annotations

from typing import Any

import torch

from hf_effi.callbacks import MIGUCallback
from hf_effi.data import ReplayStream
from tests.helpers import assert_bitwise_equal, lm_dataset, run_distributed, tiny_qwen3, weights_of
from tests.helpers.sampling import sampler_trainer
from tests.training.test_migu import Rows


def _train(folder: str, ranks: int) -> dict[str, Any]:
    from transformers import Trainer

    rows, migu = Rows("proj"), MIGUCallback(0.7, "hard")
    data = lm_dataset(32, length=8).add_column("row", list(range(32)))
    stream = ReplayStream(data.select(range(8, 32)), data.select(range(8)), 0.25, block=4)
    trainer = sampler_trainer(
        folder,
        Trainer,
        callbacks=[migu, rows],
        model=tiny_qwen3(num_hidden_layers=1),
        train_dataset=stream,
        max_steps=3,
        per_device_train_batch_size=4 // ranks,
        optim="sgd",
    )
    trainer.train()
    seen = trainer.seen
    return {"weights": weights_of(trainer.model), "kept": rows.kept, "seen": seen, "world": trainer.args.world_size}


def test_two_ranks_mask_and_replay_as_one(tmp_path):
    first, second = run_distributed(_train, 2, str(tmp_path), 2)
    one = _train(str(tmp_path / "one"), 1)
    assert first["world"] == 2 and len(one["kept"]) == 3
    assert_bitwise_equal(first["weights"], second["weights"])
    for mine, other, alone in zip(first["kept"], second["kept"], one["kept"], strict=True):
        for name in alone:
            kept = mine[name.removeprefix("module.")] if name not in mine else mine[name]
            assert torch.equal(kept, alone[name]) and torch.equal(kept, other[name]), name
    assert [sorted(batch) for batch in first["seen"]] == [sorted(batch) for batch in one["seen"]]
