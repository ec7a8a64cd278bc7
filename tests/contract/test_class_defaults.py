"""
A trainer that was built without `__init__` misses no attribute of ours.

TRL's tests, and code of users, make a trainer by `__new__`, give it what one method of stock needs, and call that
method. Whatever our overrides read beside that has a default on the class.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer
from trl import GRPOTrainer, SFTTrainer

from hf_effi import EffiGRPOTrainer, EffiSFTTrainer, EffiTrainer
from hf_effi.trainers.mixins.batch_transform import BatchTransformMixin
from hf_effi.trainers.mixins.chunk_flow import ChunkFlowMixin
from hf_effi.trainers.mixins.local_updates import LocalUpdatesMixin
from hf_effi.trainers.mixins.sequence_length import SequenceLengthMixin
from tests.helpers import binary_hash_reward, tiny_tokenizer


class EveryMixin(BatchTransformMixin, ChunkFlowMixin, LocalUpdatesMixin, SequenceLengthMixin, Trainer):
    pass


CLASSES = [EffiTrainer, EffiSFTTrainer, EffiGRPOTrainer, EveryMixin]


def attributes(cls: type, written: bool) -> set[str]:
    """Return the names that a class's own source writes, or reads, of `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    context = ast.Store if written else ast.Load
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, context)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_attribute_of_ours_has_a_default(cls: type) -> None:
    ours = [base for base in cls.__mro__ if base.__module__.startswith("hf_effi.")]
    # A mixin may ask whether it stands above a trainer of TRL.
    stock = [
        base for base in GRPOTrainer.__mro__ + SFTTrainer.__mro__ if base.__module__.startswith(("trl.", "transf"))
    ]
    of_stock = set().union(*(attributes(base, written=True) for base in stock))
    used = set().union(*(attributes(base, written) for base in ours for written in (True, False)))
    assert {name for name in used - of_stock if not hasattr(cls, name)} == set()
    assert len(used & of_stock) > 5 and ours


def test_no_default_is_shared_where_it_is_changed() -> None:
    one, other = (EffiGRPOTrainer.__new__(EffiGRPOTrainer) for _ in range(2))
    one._accounting.clock.seconds["gen"] += 1.0
    one._accounting.count_forward(3, 4, 0)
    assert not other._accounting.clock.seconds and not other._accounting.counts


def bare(cls: type, **own: Any) -> Any:
    """Return a trainer of which only these attributes are set, as TRL's tests make them."""
    trainer = cls.__new__(cls)
    trainer.__dict__.update(own)
    return trainer


def scored(cls: type) -> torch.Tensor:
    trainer = bare(
        cls,
        reward_funcs=[binary_hash_reward],
        reward_processing_classes=[None],
        reward_func_names=["hash"],
        environments=None,
        accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=1, is_main_process=True),
        state=SimpleNamespace(global_step=0),
        args=SimpleNamespace(report_to=[]),
        _log_completion_extra=lambda *args: None,
        _log_metric=lambda *args: None,
    )
    inputs = [{"prompt": "1+1="}] * 4
    return trainer._calculate_rewards(inputs, ["1+1="] * 4, ["2", "3", "4", "55"], [[1]] * 4)


def tokenized(cls: type) -> list[list[int]]:
    trainer = bare(cls, processing_class=tiny_tokenizer(), _tokenizer=tiny_tokenizer(), _is_vlm=False)
    return trainer._tokenize_prompts(["1+1=", "12+1="])[0]


def masked(cls: type) -> torch.Tensor:
    accelerator = SimpleNamespace(is_main_process=True, pad_across_processes=lambda x, **kwargs: x, gather=lambda x: x)
    entropies = torch.arange(8.0).view(2, 4)
    return bare(cls, accelerator=accelerator).get_high_entropy_mask(entropies, torch.ones(2, 4), 0.5)


@pytest.mark.parametrize("call", [scored, tokenized, masked], ids=lambda call: call.__name__)
def test_methods_of_stock_run_on_a_bare_trainer(call: Any) -> None:
    expected, found = call(GRPOTrainer), call(EffiGRPOTrainer)
    assert (
        torch.equal(torch.as_tensor(expected), torch.as_tensor(found))
        if isinstance(found, torch.Tensor)
        else (expected == found)
    )
