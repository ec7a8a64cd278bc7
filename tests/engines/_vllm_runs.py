"""What the vLLM tests run: a GRPO training whose completions come from a server."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from trl import GRPOConfig

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from tests.helpers import grpo_args, run_grpo, tiny_qwen3
from tests.helpers.vllm_gloo import trl_client_on_cpu
from tests.helpers.vllm_server import Relay, Server, TinyServer

#: All there are in TRL 1.16.
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
#: Difficulty filter with refill rounds, pruning, and two optimizer steps per generation.
METHODS: dict[str, Any] = {
    "difficulty_range": (0, 1),
    "prune_rate": 0.5,
    "steps_per_generation": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
}


#: of a vLLM to run the same tests on, set by `make test-vllm`
REAL_URL = "HF_EFFI_TEST_VLLM_URL"
#: a file of this name collects what was measured
FIGURES = "HF_EFFI_TEST_VLLM_FIGURES"
on_tiny_server = pytest.mark.skipif(REAL_URL in os.environ, reason="a check of our own server, not of vLLM")


def tiny_model(seed: int = 0) -> Any:
    """Of a shape that vLLM's attention on CPUs takes, too."""
    return tiny_qwen3(seed, end_tokens=10, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)


@contextlib.contextmanager
def served(noise: float = 0.0, faults: Any = ()) -> Iterator[Server]:
    """A server with other weights than the trainer's, and TRL's client made to talk to it from a CPU."""
    real = os.environ.get(REAL_URL)
    server = Relay(real, noise, faults) if real else TinyServer(tiny_model(seed=5), noise, faults)
    with trl_client_on_cpu(), server:
        yield server


def train_on(server: Server, cls: type = EffiGRPOTrainer, folder: Any = None, **over: Any) -> Any:
    """Train on a server; arguments of [`tests.helpers.run_grpo`] and fields of the config alike."""
    outer = (
        "model",
        "reward_funcs",
        "train_dataset",
        "resume_from_checkpoint",
        "train",
        "peft_config",
        "eval_dataset",
        "rollout_noise",
    )
    kwargs = {name: over.pop(name) for name in outer if name in over}
    config = EffiGRPOConfig if issubclass(cls, EffiGRPOTrainer) else GRPOConfig
    settings = {"use_vllm": True, "vllm_mode": "server"}
    settings |= {"vllm_server_base_url": server.url, "vllm_group_port": server.group_port}
    kwargs.setdefault("model", tiny_model())
    return run_grpo(cls, grpo_args(folder or tempfile.mkdtemp(), config, **settings, **over), **kwargs)


def train(cls: type = EffiGRPOTrainer, noise: float = 0.0, faults: Any = (), **over: Any) -> Any:
    """Train on a server of its own, which ends with the training."""
    with served(noise, faults) as server:
        trainer = train_on(server, cls, **over)
    trainer.server = server
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def note(**figures: Any) -> None:
    """Keep what was measured, for the summary of `make test-vllm`."""
    with open(os.environ[FIGURES], "a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
