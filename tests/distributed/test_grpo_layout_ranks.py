"""
Two gloo ranks: each generation is laid out over both, from a dataset or a stream, and resumed from files of both.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.errors import BrokenFileError
from hf_effi.trainers.grpo import resume as _grpo_resume
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_distributed,
    run_grpo,
    weights_of,
)

PROMPTS = 32


def train(
    folder: str, shards: int, resume: str | None = None, cls: type = EffiGRPOTrainer, **over: Any
) -> tuple[Any, list[list[str]]]:
    """Generations of 16 prompts, each used for two updates; `shards=0` is the dataset itself."""
    seen: list[list[str]] = []

    def reward(prompts: list[str], **kwargs: Any) -> list[float]:
        seen.append(list(prompts))
        return binary_hash_reward(prompts=prompts, **kwargs)

    rows = prompt_dataset(PROMPTS)
    settings = {"gradient_accumulation_steps": 2, "num_iterations": 2, "shuffle_dataset": False, "max_steps": 5}
    if cls is EffiGRPOTrainer:
        over = {"prune_rate": 0.5, **over}
    args = grpo_args(folder, EffiGRPOConfig if cls is EffiGRPOTrainer else GRPOConfig, **{**settings, **over})
    data = rows.to_iterable_dataset(num_shards=shards) if shards else rows
    return run_grpo(cls, args, reward_funcs=reward, train_dataset=data, resume_from_checkpoint=resume), seen


def layouts(folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {"seen": [], "weights": []}
    for shards in (0, 1, 4):
        trainer, seen = train(f"{folder}/{shards}", shards, save_strategy="steps", save_steps=3)
        out["seen"].append(seen)
        out["weights"].append(weights_of(trainer.model))
    # Inside the second generation, of the stream that accelerate would have dealt by its shards.
    resumed, _ = train(f"{folder}/resumed", 4, f"{folder}/4/checkpoint-3")
    out["weights"].append(weights_of(resumed.model))
    # Stock, and ours with every method off, which says so.
    warnings: list[str] = []
    _grpo_resume.logger.warning = warnings.append
    over = {"num_iterations": 1, "max_steps": 2}
    out["stock"] = train(f"{folder}/stock", 4, cls=GRPOTrainer, **over)[1]
    out["off"] = train(f"{folder}/off", 4, prune_rate=0.0, exact_savings="off", **over)[1]
    out["warnings"] = [text for text in warnings if "shards" in text]
    torch.distributed.barrier()
    lost = Path(f"{folder}/lost/checkpoint-3")
    if torch.distributed.get_rank() == 0:
        shutil.copytree(f"{folder}/4/checkpoint-3", lost)
        (lost / "effi_rollouts_1.pt").unlink()
    torch.distributed.barrier()
    try:
        train(f"{folder}/again", 4, str(lost))
    except BrokenFileError as error:
        out["error"] = str(error)
    return out


def test_a_generation_is_laid_out_and_resumed_over_both_ranks(tmp_path: Path) -> None:
    ranks = run_distributed(layouts, 2, str(tmp_path))
    prompts = prompt_dataset(PROMPTS)["prompt"]
    for rank, found in enumerate(ranks):
        dataset, stream, shards = found["seen"]
        # Two generations per pass of 16 prompts, 8 on each rank, and the third is the first of the second pass.
        firsts = [0, 16, 0]
        assert [list(dict.fromkeys(seen)) for seen in dataset] == [
            prompts[first + 8 * rank : first + 8 * rank + 8] for first in firsts
        ]
        assert dataset == stream == shards
        for other in found["weights"][1:]:
            assert_bitwise_equal(found["weights"][0], other)
        assert found["stock"][0] == found["stock"][1], "stock generates twice for the same prompts, and skips others"
        assert found["off"] == found["stock"]
    assert [len(found["warnings"]) for found in ranks] == [1, 0]
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "has no effi_rollouts_1.pt, which was written with it" in ranks[0]["error"]
