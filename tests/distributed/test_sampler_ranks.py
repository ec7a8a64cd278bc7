"""The global order is the same at one and two ranks, also after a resume in the middle of epoch 2."""

from __future__ import annotations

import os

import pytest

from hf_effi.callbacks.sampler import SamplerCallback
from hf_effi.samplers import ShuffledSampler
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


def both(folders):
    """All settings in one pair of processes: starting them is what costs."""
    cases = [("mixin", False, False), ("mixin", False, True), ("mixin", True, True), ("callback", False, True)]
    cases.append(("callback", True, True))
    return [train(folder, *case) for folder, case in zip(folders, cases, strict=True)]


def test_order_is_that_of_one_process(tmp_path):
    sampler, expected = ShuffledSampler(24, seed=2), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        expected += [order[i : i + 4] for i in range(0, 24, 4)]
    found = run_distributed(both, 2, [str(tmp_path / str(i)) for i in range(5)])
    for rank in found:
        for case in rank:
            assert case == expected


if __name__ == "__main__":
    pytest.main([__file__])
