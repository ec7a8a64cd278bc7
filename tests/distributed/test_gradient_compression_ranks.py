"""torch's hooks on two gloo ranks: the bytes that are sent, equal weights, the loss beside DDP's, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi.errors import RefusedError
from hf_effi.recipes import register_gradient_compression
from tests.helpers import lm_dataset, push_args, run_distributed, tiny_qwen3, weights_of


def trainer_of(folder: str, **over: Any) -> Any:
    from transformers import Trainer

    settings = {
        "per_device_train_batch_size": 2, "save_strategy": "no", "ddp_find_unused_parameters": False, "max_steps": 8,
        "learning_rate": 1e-2,
    }  # fmt: skip
    model = tiny_qwen3(num_hidden_layers=1)
    rows = lm_dataset(8, length=8)
    return Trainer(model, push_args(folder, **{**settings, **over}), train_dataset=rows)


def sent(call: Any) -> tuple[Any, int]:
    """Return what `call` returns, and the bytes that went into an all-reduce of this process meanwhile."""
    import torch.distributed as dist

    original, count = dist.all_reduce, []

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        return call(), sum(count)
    finally:
        dist.all_reduce = original


def compressed(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, options in ((None, {}), ("fp16", {}), ("powersgd", {"rank": 2, "start_steps": 2})):
        trainer = trainer_of(folder)
        if kind is not None:
            register_gradient_compression(trainer, kind, **options)
        _, nbytes = sent(trainer.train)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[str(kind)] = {"bytes": nbytes, "losses": losses, "weights": weights_of(trainer.model)}
    found["entries"] = sum(p.numel() for p in trainer.model.parameters())
    with pytest.raises(RefusedError, match="DDP already") as error:
        register_gradient_compression(trainer, "fp16")
    found["late"] = str(error.value)
    with pytest.raises(RefusedError, match="bf16 hook needs NCCL"):
        register_gradient_compression(trainer_of(folder), "bf16")
    cut = trainer_of(f"{folder}/cut", save_strategy="steps", save_steps=4)
    register_gradient_compression(cut, "fp16")
    cut.train()
    resumed = trainer_of(f"{folder}/cut", save_strategy="steps", save_steps=4)
    register_gradient_compression(resumed, "fp16")
    resumed.train(resume_from_checkpoint=f"{folder}/cut/checkpoint-4")
    found["resumed"] = all(torch.equal(a, weights_of(resumed.model)[n]) for n, a in weights_of(cut.model).items())
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    register_gradient_compression(model, "fp16")
    _, found["bare"] = sent(lambda: model(torch.ones(1, 4)).sum().backward())
    return found


def trls(folder: str) -> dict[str, Any]:
    """SFT and GRPO with fp16 on the way: bytes over those of the gradients, and weights."""
    from trl import GRPOTrainer, SFTConfig, SFTTrainer

    from tests.helpers import length_reward, prompt_dataset, sft_dataset, tiny_tokenizer
    from tests.helpers.grpo import grpo_args

    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    over = {"max_length": 16, "max_steps": 2, "save_strategy": "no", "ddp_find_unused_parameters": False}
    sft = SFTTrainer(
        tiny_qwen3(**sizes), push_args(folder, SFTConfig, **over), train_dataset=sft_dataset(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    grpo = GRPOTrainer(
        tiny_qwen3(**sizes), length_reward, args=grpo_args(folder, max_steps=2), train_dataset=prompt_dataset(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    found = {}
    for name, trainer in (("sft", sft), ("grpo", grpo)):
        register_gradient_compression(trainer, "fp16")
        _, nbytes = sent(trainer.train)
        entries = sum(p.numel() for p in trainer.model.parameters())
        found[name] = {"halves": nbytes / entries, "weights": weights_of(trainer.model)}
    return found


def test_trls_trainers_take_it(tmp_path: Path) -> None:
    first, second = run_distributed(trls, 2, str(tmp_path))
    for name in ("sft", "grpo"):
        assert 4 <= first[name]["halves"] < 4.1, "two updates of two bytes; the rest are TRL's own counts"
        weights = first[name]["weights"]
        assert all(torch.equal(weights[key], second[name]["weights"][key]) for key in weights)


def test_fewer_bytes_and_the_loss_stays(tmp_path: Path) -> None:
    first, second = run_distributed(compressed, 2, str(tmp_path))
    whole = 4 * first["entries"]
    assert first["None"]["bytes"] == 0, "DDP itself sends in C++"
    assert first["fp16"]["bytes"] == 8 * whole // 2
    # Two whole gradients, then six of rank 2: of a matrix of n x m it is 2 (n + m) numbers.
    assert 2 * whole < first["powersgd"]["bytes"] < 2 * whole + 6 * 0.25 * whole
    for kind, gap in (("fp16", 1e-2), ("powersgd", 0.5)):
        weights = first[kind]["weights"]
        assert all(torch.equal(weights[name], second[kind]["weights"][name]) for name in weights), "equal on the ranks"
        assert abs(first[kind]["losses"][-1] - first["None"]["losses"][-1]) < gap
        assert first[kind]["losses"][-1] < first[kind]["losses"][0] - 0.5
    assert first["resumed"] and first["bare"] == 2 * (16 + 4) and "before train()" in first["late"]
