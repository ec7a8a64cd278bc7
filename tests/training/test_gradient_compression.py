"""What compression of gradients refuses, before anything is trained, and that a refused Trainer is the stock one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Trainer

from hf_effi.errors import RefusedError
from hf_effi.recipes import gradient_compression, register_gradient_compression
from tests.helpers import compare_runs, lm_dataset, push_args, tiny_qwen3


def test_what_has_no_hook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="int is neither a Trainer"):
        register_gradient_compression(3, "fp16")
    args = SimpleNamespace(world_size=1, deepspeed=None, fsdp=None)
    trainer = SimpleNamespace(accelerator=None, model_wrapped=None, model=None, args=args)
    with pytest.raises(RefusedError, match="With one process no gradient is sent"):
        register_gradient_compression(trainer, "fp16")
    args.world_size, trainer.local_updates = 2, object()
    with pytest.raises(RefusedError, match="With local_updates no gradient is sent"):
        register_gradient_compression(trainer, "fp16")
    monkeypatch.setattr(gradient_compression, "sharding_engine", lambda args: "DeepSpeed")
    with pytest.raises(RefusedError, match="DeepSpeed sends its gradients itself"):
        register_gradient_compression(trainer, "fp16")


def test_a_refused_trainer_trains_as_stock(tmp_path: Path) -> None:
    runs = []
    for compress in (False, True):
        args = push_args(tmp_path, max_steps=2, save_strategy="no")
        model = tiny_qwen3(num_hidden_layers=1, hidden_size=16, intermediate_size=32)
        trainer = Trainer(model, args, train_dataset=lm_dataset(8, length=8))
        if compress:
            with pytest.raises(RefusedError, match="two or more"):
                register_gradient_compression(trainer, "fp16")
        trainer.train()
        runs.append(trainer)
    compare_runs(*runs)
