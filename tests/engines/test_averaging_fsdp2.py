"""Averages under FSDP2 on two gloo processes: those of DDP, from shards, saved whole, resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_effi
from hf_effi.callbacks import EMACallback
from tests.engines.runs import LENGTH, Place
from tests.helpers import assert_bitwise_equal, lm_dataset, run_distributed, tiny_qwen3
from tests.helpers.cpu_engines import run_on_cpu
from tests.helpers.resume import weights_in
from tests.helpers.sampling import StopAt

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "lr_scheduler_type": "constant"}
AVERAGES = {
    "ema": lambda **more: EMACallback(0.5, evaluate_on="both", **more),
    "window": lambda **more: hf_effi.WeightAveragingCallback(
        2, every_steps=1, kind="trend", evaluate_on="average", **more
    ),
}


def train(place: Place, *callbacks: Any, resume: str | None = None, **over: Any) -> Any:
    trainer = Trainer(
        tiny_qwen3(num_hidden_layers=1, tie_word_embeddings=True),
        place.arguments(**{**EVALUATED, **over}),
        train_dataset=lm_dataset(16, length=LENGTH),
        eval_dataset=lm_dataset(4, length=LENGTH, seed=1),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> dict[str, list[float]]:
    names = ("loss", "eval_loss", "eval_averaged_loss")
    return {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name.removeprefix("module."): value.detach().cpu().clone() for name, value in (state or {}).items()}


def all_cases(engine: str, folder: str) -> dict[str, Any]:
    run_on_cpu(engine)
    found: dict[str, Any] = {}
    for name, make in AVERAGES.items():
        place = Place(engine, Path(folder) / name)
        trainer = train(place, make(swap_in=name == "window"))
        found[name] = losses(trainer), whole_weights(trainer), files(place)
    if engine == "ddp":
        return found
    place = Place(engine, Path(folder) / "again")
    train(place, AVERAGES["ema"](), StopAt(2))
    torch.distributed.barrier()
    trainer = train(place, AVERAGES["ema"](), resume=str(place.folder / "checkpoint-2"))
    found["resumed"] = losses(trainer), whole_weights(trainer), files(place)
    stored = sorted(path.name for path in (place.folder / "checkpoint-2").glob("effi_*"))
    try:
        train(Place(engine, Path(folder) / "no"), EMACallback(save_with_checkpoints=True), max_steps=1)
        found["refused"] = ""
    except hf_effi.errors.RefusedError as error:
        found["refused"] = str(error)
    return found | {"stored": stored}


def files(place: Place) -> dict[str, torch.Tensor]:
    torch.distributed.barrier()  # the first process writes
    return weights_in(place.folder / "averaged")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return {
        engine: run_distributed(all_cases, 2, engine, str(tmp_path_factory.mktemp(engine)), timeout=600)
        for engine in ("ddp", "fsdp2")
    }


def assert_near(one, other):
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", AVERAGES)
def test_fsdp2_has_the_averages_and_the_evaluations_of_ddp(found, name):
    (ddp, _), (fsdp2, other_rank) = found["ddp"], found["fsdp2"]
    for key in ("loss", "eval_loss", "eval_averaged_loss"):
        assert fsdp2[name][0][key] == pytest.approx(ddp[name][0][key], rel=1e-5)
        assert fsdp2[name][0][key] == other_rank[name][0][key]
    assert len(fsdp2[name][0]["eval_loss"]) == 3
    assert_near(fsdp2[name][1], ddp[name][1])  # of "window" this is the average, swapped in
    assert_near(fsdp2[name][2], ddp[name][2])
    assert "lm_head.weight" not in fsdp2[name][2], "tied weights are saved once"
    gaps = [(fsdp2[name][1][key] - value).abs().max().item() for key, value in fsdp2[name][2].items()]
    assert max(gaps) == 0 if name == "window" else max(gaps) > 1e-5


def test_shards_are_stored_by_each_process_and_resumed_to_the_bit(found):
    rank = found["fsdp2"][0]
    assert rank["stored"] == ["effi_average_0.pt", "effi_average_1.pt"]
    whole, again = rank["ema"], rank["resumed"]
    assert again[0]["eval_averaged_loss"] == whole[0]["eval_averaged_loss"]
    assert_bitwise_equal(again[1], whole[1])
    assert_bitwise_equal(again[2], whole[2])


def test_a_model_beside_each_checkpoint_is_refused_by_name(found):
    assert "would gather the whole weights at each checkpoint" in found["fsdp2"][0]["refused"]
