"""The global order is the same at one and two ranks, also after a resume in the middle of epoch 2."""

from __future__ import annotations

import os

from hf_effi.callbacks.sampler import SamplerCallback
from hf_effi.samplers import SelfPacedSampler, ShuffledSampler
from tests.helpers import run_distributed
from tests.helpers.sampling import StopAt, sampler_trainer


def train(folder: str, way: str, dispatch: bool, resume: bool):
    from transformers import Trainer

    sampler = ShuffledSampler(24, seed=2)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    over = {
        "per_device_train_batch_size": 4 // world,
        "accelerator_config": {"dispatch_batches": dispatch},
    }

    def make(callbacks):
        if way == "mixin":
            return sampler_trainer(folder, callbacks=callbacks, train_sampler=sampler, **over)
        return sampler_trainer(folder, Trainer, callbacks=[*callbacks, SamplerCallback(sampler)], **over)

    if not resume:
        trainer = make([])
        trainer.train()
        return trainer.seen
    first, second = make([StopAt(8)]), make([])
    first.train()
    second.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-8"))
    return first.seen + second.seen


def scores_of_rows(model, rows):
    """A measure that does not depend on how rows are batched, so that one and two processes must agree."""
    return [float((row * 7) % 24) for row in rows]


def self_paced():
    return SelfPacedSampler(24, scores_of_rows, share=0.3, share_step=0.3)


def learned(folder: str):
    """Processes measure different rows; all must train on the same choice, also after a resume in epoch 2."""
    world = int(os.environ.get("WORLD_SIZE", "1"))

    def make(callbacks):
        batch = 4 // world
        return sampler_trainer(
            folder, callbacks=callbacks, train_sampler=self_paced(), per_device_train_batch_size=batch
        )

    first, second = make([StopAt(8)]), make([])
    first.train()
    second.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-8"))
    return first.seen + second.seen


def both(folders):
    """All settings in one pair of processes: starting them is what costs."""
    cases = [("mixin", False, False), ("mixin", False, True), ("mixin", True, True), ("callback", False, True)]
    cases.append(("callback", True, True))
    orders = [train(folder, *case) for folder, case in zip(folders, cases, strict=True)]
    return orders, learned(folders[0] + "learned")


def test_order_is_that_of_one_process(tmp_path):
    sampler, expected = ShuffledSampler(24, seed=2), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        expected += [order[i : i + 4] for i in range(0, 24, 4)]
    found = run_distributed(both, 2, [str(tmp_path / str(i)) for i in range(5)])
    for orders, _ in found:
        for case in orders:
            assert case == expected
    alone = self_paced()
    rows = []
    for epoch in range(3):
        alone.set_epoch(epoch)
        alone.observe(epoch, scores_of_rows(None, alone.rows_to_measure(epoch)))
        order = list(alone)
        rows += [order[i : i + 4] for i in range(0, 24, 4)]
    assert [of_rank for _, of_rank in found] == [rows, rows]
