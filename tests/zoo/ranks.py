"""Sequence parallelism: two processes that go through the same cases together."""

from __future__ import annotations

import contextlib
import datetime
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hf_effi import EffiTrainer, EffiTrainingArguments
from tests.helpers import run_distributed

from .cases import Case
from .design import Row
from .features import Feature, Outcome, Pair, run

SIZE = 2


@contextlib.contextmanager
def _split(case: Case) -> Iterator[Pair]:
    model = case.fresh()
    with tempfile.TemporaryDirectory() as folder:
        args = EffiTrainingArguments(
            folder,
            sequence_parallel_size=SIZE,
            use_cpu=True,
            ddp_backend="gloo",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=case.row.get("checkpointing") == "yes",
        )
        trainer = EffiTrainer(model, args, train_dataset=[{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}])
        trainer.current_gradient_accumulation_steps = 1
        labels = F.pad(case.batch["labels"], (0, 1), value=-100)[:, 1:]

        def call(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
            loss = trainer.training_step(model, dict(case.batch), (labels != -100).sum())
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    dist.all_reduce(weight.grad)
                    weight.grad /= SIZE  # as DDP does
            loss = loss.detach().clone()
            dist.all_reduce(loss)
            return loss / SIZE, {}

        expected = {name: value for name, value in case.expected().items() if name != "logits"}
        yield Pair(expected, case.ready(model), call)


SEQUENCE_PARALLEL = Feature("sequence parallelism", _split)


def on_this_rank(jobs: Sequence[tuple[str, str, Row]]) -> list[Outcome]:
    """Run every case, together with the other rank."""
    from .run import everything

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    known = {(family.kind, family.name, family.model_type): family for family in everything()}
    found = []
    for kind, name, model_type, row in jobs:
        mine = run(SEQUENCE_PARALLEL, Case(known[kind, name, model_type], row))
        both: list[Any] = [None] * SIZE
        dist.all_gather_object(both, mine)
        found.append(next((outcome for outcome in both if not outcome.ok), both[0]))
    return found


def run_pair(jobs: Sequence[tuple[str, str, str, Row]], timeout: float = 1800.0) -> list[Outcome]:
    """Return the outcome of sequence parallelism over two ranks for each `(kind, class, model type, row)`."""
    return run_distributed(on_this_rank, SIZE, list(jobs), timeout=timeout)[0] if jobs else []
