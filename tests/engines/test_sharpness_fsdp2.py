"""Sharpness on two gloo processes: equal on all ranks, that of one process, and from shards that of whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_effi.callbacks import CausesCallback, SharpnessProbe
from tests.engines.runs import LENGTH, Place, finish
from tests.helpers import assert_bitwise_equal, lm_dataset, run_distributed, tiny_qwen3
from tests.helpers.cpu_engines import run_on_cpu

OFF = {"gradients": False, "outliers": False, "weight_norms": False, "stragglers": False}


def run(place: Place, *parts: Any, **over: Any) -> Any:
    return finish(
        Trainer(
            tiny_qwen3(num_hidden_layers=1),
            place.arguments(max_steps=2, **over),
            train_dataset=lm_dataset(16, length=LENGTH),
            callbacks=[CausesCallback(**OFF, parts=parts)] if parts else [],
        )
    )


def both(engine: str, folder: str) -> dict[str, Any]:
    run_on_cpu(engine)
    probe = SharpnessProbe(rows=4, steps=(0, 1), every=0, iterations=8, hessian=True)
    with_it, without = run(Place(engine, Path(folder) / "a"), probe), run(Place(engine, Path(folder) / "b"))
    records = [(record.hessian, record.preconditioned, record.rho, record.products) for record in probe.curve]
    return {"records": records, "weights": (with_it.weights, without.weights), "sharded": with_it.more["sharded"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> dict[str, Any]:
    return {
        engine: run_distributed(both, 2, engine, str(tmp_path_factory.mktemp(engine)), timeout=600)
        for engine in ("ddp", "fsdp2")
    }


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ranks_agree_and_train_the_weights_of_the_run_without(found: Any, engine: str) -> None:
    first, second = found[engine]
    assert str(first["records"]) == str(second["records"]) and len(first["records"]) == 2
    assert first["sharded"] is (engine == "fsdp2") and first["weights"][0]
    assert_bitwise_equal(*first["weights"])


def test_shards_have_the_sharpness_of_whole_weights(found: Any) -> None:
    whole, parts = (found[engine][0]["records"] for engine in ("ddp", "fsdp2"))
    for one, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(one, rel=2e-3, nan_ok=True)
    assert whole[0][0] > 0 and whole[1][1] > 0


def test_two_processes_have_the_sharpness_of_one_before_training(found: Any, tmp_path: Path) -> None:
    trainer = Trainer(
        tiny_qwen3(num_hidden_layers=1),
        Place("ddp", tmp_path).arguments(),
        train_dataset=lm_dataset(16, length=LENGTH),
    )
    probe = SharpnessProbe(rows=4, iterations=8)
    alone = probe.probe(trainer.model, trainer.create_optimizer(), 0, trainer).hessian
    assert found["ddp"][0]["records"][0][0] == pytest.approx(alone, rel=1e-5)
