"""The DDP and FSDP2 launch files on two gloo ranks, with the environment that `accelerate launch` makes of them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from hf_effi.errors import RefusedError
from hf_effi.recipes.launch import accelerate_config
from tests.helpers import run_distributed


def launch_environment(kind: str) -> dict[str, str]:
    """Return what accelerate's launcher adds to the environment for the file of two GPUs."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", accelerate_config(kind, 2), "--main_process_port", "0", "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    before = dict(os.environ)
    made = prepare_multi_gpu_env(args)
    return {key: value for key, value in made.items() if before.get(key) != value}


def _pretend_gloo_is_a_gpu_backend() -> None:
    """On a CPU accelerate knows MULTI_CPU only, which ignores FSDP; this is the one thing that is replaced."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def on_cpu(self: Any) -> None:
        self.device = torch.device("cpu")

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = on_cpu


def _train_each(
    folder: str, kind: str, callbacks: tuple[str | None, ...], environment: dict[str, str]
) -> list[dict[str, Any]]:
    os.environ.update(environment)  # accelerate reads it when the arguments are made, and not when it is imported
    if kind == "fsdp2":
        _pretend_gloo_is_a_gpu_backend()
        _refused_by_the_budget(folder)
    return [_train(folder, callback) for callback in callbacks]


def _refused_by_the_budget(folder: str) -> None:
    with pytest.raises(RefusedError, match="sharded parameters"):
        _train(folder, "budget")


def _train(folder: str, callback: str | None) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from hf_effi.callbacks.layer_modes import (
        ActivationOffloadCallback,
        MemoryBudgetCallback,
        SelectiveCheckpointCallback,
    )
    from tests.helpers import lm_dataset, tiny_qwen3

    made = {
        "offload": ActivationOffloadCallback,
        "selective": SelectiveCheckpointCallback,
        "budget": lambda: MemoryBudgetCallback(1),
    }
    args = TrainingArguments(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        ddp_find_unused_parameters=False,
    )
    model = tiny_qwen3(num_hidden_layers=3, use_cache=False)
    callbacks = [made[callback]()] if callback else []
    trainer = Trainer(model, args, train_dataset=lm_dataset(16), callbacks=callbacks)
    trainer.train()
    return {
        "type": str(trainer.accelerator.distributed_type),
        "sharded": type(next(trainer.model.parameters())).__name__ == "DTensor",
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "moved": callbacks[0].stats["prefetched"] if callback == "offload" else None,
    }


def test_fsdp2_trains_as_ddp(tmp_path):
    """Also with the callbacks for layers: FSDP2's hooks stay outside of what they checkpoint."""
    ranks = {}
    for kind, callbacks in (("ddp", (None,)), ("fsdp2", (None, "offload", "selective"))):
        environment = launch_environment(kind)
        assert environment.pop("ACCELERATE_MIXED_PRECISION") == "bf16"  # two ways of sharding are compared in fp32
        assert environment.get("FSDP_VERSION") == ("2" if kind == "fsdp2" else None)
        ranks[kind] = run_distributed(_train_each, 2, str(tmp_path), kind, callbacks, environment)
    for (reference,), runs in zip(ranks["ddp"], ranks["fsdp2"], strict=True):
        assert (reference["type"], reference["sharded"]) == ("DistributedType.MULTI_CPU", False)
        for run in runs:
            assert (run["type"], run["sharded"]) == ("DistributedType.FSDP", True)
            assert len(run["losses"]) == 2
            assert run["losses"] == pytest.approx(reference["losses"], rel=1e-5)
            assert run["norms"] == pytest.approx(reference["norms"], rel=1e-5)
        assert runs[1]["moved"] > 0
