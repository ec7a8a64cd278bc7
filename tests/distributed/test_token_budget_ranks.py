"""Token-budget batches at two ranks: each row once, as many batches per rank, the gradient of one big batch."""

from __future__ import annotations

import os

import torch

from tests.helpers import run_distributed, weights_of
from tests.helpers.sampling import StopAt, ragged_trainer

LENGTHS = [3 + (7 * i) % 14 for i in range(31)]
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def budget():
    from hf_effi.samplers import TokenBudgetBatchSampler

    return TokenBudgetBatchSampler(LENGTHS, 48, cost=(1.0, 0.05), seed=2)


def train(folder: str):
    from transformers import Trainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    over = {"gradient_accumulation_steps": 4 // world, "dataloader_num_workers": 1}
    whole = ragged_trainer(folder, LENGTHS, budget(), **over)
    whole.train()
    first = ragged_trainer(folder, LENGTHS, budget(), [StopAt(3)], **over)
    first.train()
    second = ragged_trainer(folder, LENGTHS, budget(), **over)
    second.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-3"))

    sampler = budget()
    places = -(-sampler.batches_per_rank // 4) * 4  # all rows in one update
    one = ragged_trainer(folder, LENGTHS, sampler, gradient_accumulation_steps=places // world, max_steps=1, **SGD)
    one.train()
    refused = None
    if world > 1:
        try:
            ragged_trainer(folder, LENGTHS, budget(), average_tokens_across_devices=False).train()
        except ValueError as error:
            refused = str(error)
        gradient = None
    else:
        big = ragged_trainer(folder, LENGTHS, trainer_cls=Trainer, per_device_train_batch_size=31, max_steps=1, **SGD)
        big.train()
        gradient = weights_of(big.model)
    return {
        "seen": whole.seen,
        "resumed": first.seen + second.seen,
        "steps": (whole.state.max_steps, whole.state.global_step, second.state.global_step),
        "weights": weights_of(whole.model),
        "resumed_weights": weights_of(second.model),
        "one_update": weights_of(one.model),
        "one_update_seen": one.seen,
        "big_batch": gradient,
        "refused": refused,
    }


def updates(runs, accumulation):
    """Return the rows of each update, all ranks."""
    steps = range(0, len(runs[0]), accumulation)
    return [sorted(row for seen in runs for batch in seen[i : i + accumulation] for row in batch) for i in steps]


def test_two_ranks(tmp_path):
    (alone,) = run_distributed(train, 1, str(tmp_path / "one"))
    two = run_distributed(train, 2, str(tmp_path / "two"))
    assert len(two[0]["seen"]) == len(two[1]["seen"])
    assert updates([run["seen"] for run in two], 2) == updates([alone["seen"]], 4)
    epoch = [row for run in two for batch in run["seen"][: len(run["seen"]) // 2] for row in batch]
    assert sorted(epoch) == list(range(31))
    for run in two:
        assert run["resumed"] == run["seen"]
        assert run["steps"] == alone["steps"]
        assert "average_tokens_across_devices=False" in run["refused"]
        torch.testing.assert_close(run["resumed_weights"], run["weights"], rtol=0, atol=0)
        torch.testing.assert_close(run["weights"], alone["weights"], rtol=0, atol=1e-5)
        # One update of learning rate 1 is the gradient: unequal micro-batches on both ranks, and one batch of all
        # rows.
        assert len({len(batch) for batch in run["one_update_seen"]}) > 1
        torch.testing.assert_close(run["one_update"], alone["big_batch"], rtol=0, atol=1e-6)
    torch.testing.assert_close(alone["one_update"], alone["big_batch"], rtol=0, atol=1e-6)
