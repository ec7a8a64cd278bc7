"""`torch_compile=True` with each patch of ours: the run of the uncompiled model, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_effi import EffiTrainer, EffiTrainingArguments, PatchCallback, SelectiveCheckpointCallback
from hf_effi.callbacks import RandomLTDCallback
from hf_effi.errors import RefusedError
from hf_effi.kernels import tile_mlp
from hf_effi.memory import stream_layers, tile_loss
from tests.helpers import lm_dataset, push_args, tiny_qwen3, weights_of


def lora() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_qwen3(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


def patched(*patches: Any) -> dict[str, Any]:
    return {"callbacks": lambda: [PatchCallback(*patches)]}


CASES: dict[str, dict[str, Any]] = {
    "tile_mlp": patched(tile_mlp),
    "stream_layers": patched(stream_layers),
    "tile_loss": patched(tile_loss),
    "SwiGLUMLP": {"kernel_patch": {"SwiGLUMLP": "hf_effi"}},
    "LoRALinear": {"kernel_patch": {"LoRALinear": "hf_effi"}, "model": lora},
    "int8": {"kernel_patch": {"LoRALinear": "int8"}, "model": lora},
    "selective": {"callbacks": lambda: [SelectiveCheckpointCallback()], "activation_checkpointing": True},
}


def train(folder: Path, compiled: bool, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    case = dict(case)
    model: Callable[[], Any] = case.pop("model", tiny_qwen3)
    callbacks = case.pop("callbacks", list)()
    torch._dynamo.reset()
    if compiled:
        case |= {"torch_compile": True, "torch_compile_backend": "eager"}
    effi = "kernel_patch" in case
    args = push_args(
        folder, EffiTrainingArguments if effi else TrainingArguments, max_steps=2, save_strategy="no", **case
    )
    trainer = (EffiTrainer if effi else Trainer)(model(), args, train_dataset=lm_dataset(16), callbacks=callbacks)
    trainer.train()
    return {name.replace("_orig_mod.", ""): weight for name, weight in weights_of(trainer.model).items()}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_model_trains_as_the_other(tmp_path: Path, name: str) -> None:
    expected, found = (train(tmp_path, compiled, CASES[name]) for compiled in (False, True))
    assert expected.keys() == found.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5, msg=key)


def test_random_ltd_is_refused(tmp_path: Path) -> None:
    """A layer would be compiled anew for each number of tokens that it keeps."""
    case = {
        "callbacks": lambda: [RandomLTDCallback(4, 8, multiple=2)],
        "model": lambda: tiny_qwen3(num_hidden_layers=3),
    }
    with pytest.raises(RefusedError, match="torch_compile=True would compile a layer anew"):
        train(tmp_path, True, case)
