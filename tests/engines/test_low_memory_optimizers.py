"""APOLLO under FSDP2 on two gloo processes: one process with the joint batch, and resumed; the table has the rest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.errors import RefusedError
from hf_effi.optim import apollo, frugal, use_optimizer
from hf_effi.optim.engines import check_engine
from tests.engines.runs import LENGTH, ROWS, Place, finish, lm
from tests.helpers import assert_bitwise_equal, lm_dataset, run_distributed, tiny_qwen3, weights_of
from tests.helpers.cpu_engines import run_on_cpu

OPTIONS = {"rank": 4, "update_gap": 2}
STEPS = {"max_steps": 4, "weight_decay": 0.1, "lr_scheduler_type": "constant"}


def model() -> Any:
    return tiny_qwen3(num_hidden_layers=1)


def run(place: Place, optim: str, **over: Any) -> Any:
    settings = {"cls": EffiTrainer, "config": EffiTrainingArguments, "optim": optim, **STEPS, **over}
    return lm(place, model=model, **settings)


def on_fsdp2(folder: str) -> dict[str, Any]:
    run_on_cpu("fsdp2")
    place = Place("fsdp2", Path(folder))
    whole = run(place, "apollo", optim_args=OPTIONS, save_strategy="steps", save_steps=3)
    again = run(place, "apollo", optim_args=OPTIONS, resume=f"{folder}/checkpoint-3")
    return {"whole": whole, "again": again}


def test_apollo_on_shards_is_apollo_on_one_process_and_is_resumed(tmp_path):
    found, _ = run_distributed(on_fsdp2, 2, str(tmp_path / "fsdp2"), timeout=600)
    args = Place("ddp", tmp_path / "one").arguments(TrainingArguments, per_device_train_batch_size=4, **STEPS)
    alone = Trainer(model(), args, train_dataset=lm_dataset(ROWS, length=LENGTH))
    use_optimizer(alone, "apollo", **OPTIONS)
    finish(alone)
    expected = weights_of(alone.model)
    ours = found["whole"]
    assert ours.more["sharded"] and ours.weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert (ours.weights[name] - weight).abs().max() <= 1e-6, name
    assert_bitwise_equal(found["again"].weights, ours.weights)


@pytest.mark.parametrize(("version", "factory"), [(1, apollo), (2, frugal)])
def test_what_cannot_be_right_under_fsdp(version, factory):
    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=SimpleNamespace(fsdp_version=version))
    args = SimpleNamespace(hf_deepspeed_config=None)
    trainer = SimpleNamespace(args=args, is_fsdp_enabled=True, accelerator=SimpleNamespace(state=state))
    with pytest.raises(RefusedError, match="version 1 of FSDP makes one flat tensor|FSDP shards them"):
        check_engine(trainer, factory)
