"""
A model that transformers loads with `tp_plan="auto"`, on two gloo processes: the run of one process, or a refusal by
name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_effi
from hf_effi import samplers
from hf_effi.callbacks.reptile import ReptileCallback
from tests.engines.runs import (
    LENGTH,
    ROWS,
    WSD,
    Measured,
    Outcome,
    Place,
    Transformed,
    by_loss,
    denoising,
    lm,
    shuffled,
)
from tests.helpers import lm_dataset, run_distributed, save_tiny, tiny_qwen3, tiny_tokenizer
from tests.helpers.cpu_engines import run_on_cpu

SETTINGS = {"per_device_train_batch_size": 4}


def start() -> Any:
    return tiny_qwen3(num_hidden_layers=3, vocab_size=256)


def effi(place: Place, **over: Any) -> Outcome:
    made = {"train_sampler": shuffled(), "train_dataset": lm_dataset(ROWS, length=LENGTH)}
    chosen = {"cls": hf_effi.EffiTrainer, "config": hf_effi.EffiTrainingArguments}
    return lm(place, made=made, **chosen, **{**WSD, "max_steps": 4, **SETTINGS, **over})


def denoised(place: Place, **over: Any) -> Outcome:
    return lm(place, cls=Transformed, made={"batch_transform": denoising()}, **{**SETTINGS, **over})


RUN: dict[str, Callable[..., Outcome]] = {
    "EffiTrainer": effi,
    "ul2_denoising": denoised,
    "stream_layers": lambda place, **over: lm(
        place, hf_effi.PatchCallback(hf_effi.memory.stream_layers), **SETTINGS, **over
    ),
    "random_ltd": lambda place, **over: lm(
        place, hf_effi.callbacks.RandomLTDCallback(4, LENGTH, multiple=2), **SETTINGS, **over
    ),
}

#: case -> words of the refusal
REFUSED: dict[str, tuple[Callable[..., Outcome], str]] = {
    "weight_averaging": (lambda place, **over: lm(place, hf_effi.WeightAveragingCallback(2), **over), "in shards"),
    "reptile": (lambda place, **over: lm(place, ReptileCallback(2, 0.5), **over), "has them in parts"),
    "gradient_snr": (
        lambda place, **over: lm(
            place, hf_effi.callbacks.GradientSNRCallback(), gradient_accumulation_steps=3, **over
        ),
        "shards of tensor parallelism",
    ),
    "hypergradient": (
        lambda place, **over: lm(place, hf_effi.callbacks.HypergradientCallback(), **over),
        "shards of tensor parallelism",
    ),
    "self_paced": (
        lambda place, **over: lm(
            place, cls=Measured, made={"train_sampler": samplers.SelfPacedSampler(ROWS, by_loss, share=0.5)}, **over
        ),
        "tensor parallelism do not allow",
    ),
    "tile_mlp": (
        lambda place, **over: lm(place, hf_effi.PatchCallback(hf_effi.kernels.tile_mlp), **over),
        "has hooks of its own",
    ),
    "sequence_parallel": (lambda place, **over: effi(place, sequence_parallel_size=2, **over), "parallelism"),
}


def train_all(folder: str) -> dict[str, Outcome]:
    run_on_cpu("tp")
    name = str(Path(folder) / "model")
    if torch.distributed.get_rank() == 0:
        save_tiny(start(), tiny_tokenizer(), name)
    torch.distributed.barrier()

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(name, tp_plan="auto", dtype=torch.float32)

    found = {key: run(Place("tp", Path(folder) / key), model=model) for key, run in RUN.items()}
    for key, (run, _) in REFUSED.items():
        try:
            found[key] = run(Place("tp", Path(folder) / key), model=model)
        except ValueError as error:
            found[key] = Outcome(refused=str(error))
    return found


def test_tensor_parallel_runs_are_those_of_one_process(tmp_path: Path) -> None:
    ranks = run_distributed(train_all, 2, str(tmp_path), timeout=900)
    for key, run in RUN.items():
        expected, found = run(Place("ddp", tmp_path / f"one {key}"), model=start), ranks[0][key]
        assert found.weights.keys() == expected.weights.keys()
        gaps = [float((found.weights[name] - weight).abs().max()) for name, weight in expected.weights.items()]
        assert max(gaps) <= 1e-6, key
        assert found.series("loss") == pytest.approx(expected.series("loss"), rel=1e-5)
    for key, (_, words) in REFUSED.items():
        for rank in ranks:
            assert words in rank[key].refused, (key, rank[key].refused or "it trained")
