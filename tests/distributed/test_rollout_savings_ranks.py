"""Cheaper rollouts on two ranks: prompts and completions of unequal length, and as many forwards on each of them."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.trainers.grpo.decoding import SparseDecoding
from tests.helpers import assert_bitwise_equal, grpo_args, prompt_dataset, run_distributed, run_grpo, tiny_qwen3
from tests.helpers.tokenizer import PAD_ID


def run(savings: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    texts: list[str] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        texts.extend(completions)
        return [float(len(text) + place % 3) for place, text in enumerate(completions)]

    rows = prompt_dataset(16)
    longer = [text * (1 + 2 * (index % 2)) for index, text in enumerate(rows["prompt"])]
    args = grpo_args(
        tempfile.mkdtemp(), EffiGRPOConfig, rollout_savings=savings, exact_savings="off", num_generations=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_completion_length=16,
    )  # fmt: skip
    dataset = rows.remove_columns("prompt").add_column("prompt", longer)
    trainer = run_grpo(EffiGRPOTrainer, args, reward_funcs=reward, train_dataset=dataset)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, texts


def both() -> list[Any]:
    return [run("off"), run("prefill,compact")]


def test_two_ranks_train_as_without_it() -> None:
    ranks = run_distributed(both, 2)
    for (stock, texts), (ours, our_texts) in ranks:
        assert texts == our_texts
        assert_bitwise_equal(stock, ours)
    assert ranks[0][0][1] != ranks[1][0][1]
    assert_bitwise_equal(ranks[0][1][0], ranks[1][1][0], what="ranks")


def waiting() -> list[tuple[int, int, list[list[int]]]]:
    """What `generate` does where ranks share their weights: the first one to finish goes on until the last."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model, calls, found = tiny_qwen3(end_tokens=10), [0], []
    model.register_forward_pre_hook(lambda *args: calls.__setitem__(0, calls[0] + 1))
    ids = torch.full((6, 4 + 5 * rank), 30 + rank)
    for decoding in (None, SparseDecoding(True, True, copy_cost=0.0)):
        config = GenerationConfig(
            do_sample=True, max_new_tokens=4 + 20 * rank, pad_token_id=PAD_ID, disable_compile=True,
            eos_token_id=model.generation_config.eos_token_id,
        )  # fmt: skip
        torch.manual_seed(rank)
        calls[0] = 0
        if decoding is None:
            tokens = model.generate(ids, generation_config=config, synced_gpus=True)
        else:
            with decoding.within(model):
                tokens = model.generate(ids, generation_config=config, synced_gpus=True)
        found.append((calls[0], tokens.shape[1], tokens.tolist()))
    dist.destroy_process_group()
    return found


def test_ranks_that_share_their_weights_call_as_many_forwards() -> None:
    ranks = run_distributed(waiting, 2)
    for stock, ours in ranks:
        assert stock == ours
    assert ranks[0][0][0] == ranks[1][0][0]  # forwards
    assert ranks[0][0][1] - 4 < ranks[1][0][1] - 9  # tokens: the first rank waited
