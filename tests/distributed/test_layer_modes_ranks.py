"""Two ranks: the same plan from different measurements, and the weights of plain checkpointing."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainingArguments

from hf_effi.callbacks.layer_modes import ActivationOffloadCallback, MemoryBudgetCallback, _largest_of_ranks
from tests.helpers import assert_bitwise_equal, lm_dataset, run_distributed, tiny_qwen3, weights_of


def _train(folder: str, callbacks: list[Any]) -> dict[str, Any]:
    args = TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        ddp_find_unused_parameters=False,
    )
    model = tiny_qwen3(num_hidden_layers=3, use_cache=False)
    trainer = Trainer(model, args, train_dataset=lm_dataset(16, length=24), callbacks=callbacks)
    trainer.train()
    return weights_of(trainer.model)


def _ranks(folder: str) -> dict[str, Any]:
    budget = MemoryBudgetCallback(430_000 / 2**30)
    runs = {"plain": _train(folder, []), "budget": _train(folder, [budget])}
    runs["offload"] = _train(folder, [ActivationOffloadCallback()])
    import torch.distributed as dist

    rank = dist.get_rank()
    mine = {0: {"forward_seconds": 1.0 + rank, "kept_bytes": 5 - rank}}
    return {**runs, "modes": tuple(budget.modes), "largest": _largest_of_ranks(mine, 10 + rank, 3.0 + rank, "cpu")}


def test_two_ranks_make_one_plan(tmp_path):
    first, second = run_distributed(_ranks, 2, str(tmp_path))
    assert first["modes"] == second["modes"]
    assert "keep" in first["modes"] and set(first["modes"]) != {"keep"}
    assert first["largest"] == second["largest"] == ({0: {"forward_seconds": 2.0, "kept_bytes": 5.0}}, 11, 3.0)
    for name in ("budget", "offload"):
        assert_bitwise_equal(first["plain"], first[name])
        assert_bitwise_equal(first[name], second[name])
