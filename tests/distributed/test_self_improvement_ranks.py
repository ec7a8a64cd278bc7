"""Two processes share the work of a round, get the rows of one process, and fail together; multistage agrees too."""

from __future__ import annotations

import os

import torch
from datasets import Dataset

from hf_effi.data import SelfImprovement
from hf_effi.samplers import MultistageSampler
from tests.helpers import run_distributed
from tests.helpers.sampling import StopAt, sampler_trainer

BASE = [{"prompt": "a>", "completion": "a"}]


def problem(level, rng):
    return "".join(rng.choice("abc") for _ in range(level)) + ">"


def rounds(folder: str):
    """
    Return the rows of two rounds, how many prompts this process answered, and what a failure on rank 1 raises here.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    asked: list[str] = []

    def answer(prompts):
        asked.extend(prompts)
        return [None if prompt[0] == "b" else prompt[:-1] for prompt in prompts]

    def failing(prompts):
        if rank == world - 1:
            raise RuntimeError("out of memory")
        return [""] * len(prompts)

    rows = []
    for _ in range(2):  # a script that is started again after round 1
        improve = SelfImprovement(folder, BASE, problem, levels=(3, 4), per_round=7)
        rows.append(improve.extend(answer))
        improve.finish()
    improve = SelfImprovement(folder + "-failing", BASE, problem, levels=(3,), per_round=7)
    try:
        improve.extend(failing)
    except (ValueError, RuntimeError) as error:
        return rows, len(asked), str(error), improve.history
    return rows, len(asked), "", improve.history


def losses(model, rows):
    return [float(row % 2) for row in rows]


def multistage(folder: str):
    """Train, stop in stage 2 and resume; return the order, the same on every process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ids = [[10 + row % 2] * 8 for row in range(32)]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids, "row": list(range(32))})

    def make(callbacks):
        sampler = MultistageSampler(ids, losses, window=12, num_samples=8, threshold_rows=8, switch_rows=4)
        return sampler_trainer(
            folder,
            train_dataset=data,
            train_sampler=sampler,
            num_train_epochs=4,
            per_device_train_batch_size=4 // world,
            callbacks=callbacks,
        )

    first, second = make([StopAt(5)]), make([])
    first.train()
    second.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-5"))
    return first.seen + second.seen, second.train_sampler.history, second.train_sampler.threshold


def both(folder: str):
    return multistage(folder + "/multistage"), rounds(folder + "/rounds")


def test_two_processes_agree_with_one(tmp_path):
    wanted_order, (wanted_rows, asked_alone, message, _) = both(str(tmp_path / "one"))
    assert message == "out of memory" and asked_alone == 14
    found = run_distributed(both, 2, str(tmp_path / "two"))
    for order, (rows, _, error, history) in found:
        assert order == wanted_order
        assert rows == wanted_rows
        assert "out of memory" in error and history == []
    assert [asked for _, (_, asked, _, _) in found] == [8, 6]
    assert [entry["stage"] for entry in wanted_order[1]] == [0, 1, 2, 2]
