"""What only a real vLLM can show, for CPUs: `make test-vllm`. Its log-probs, its weights, its death, and colocate mode."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from hf_effi import EffiGRPOTrainer
from hf_effi.trainers._vllm_server import VLLMServerError
from tests.engines._vllm_runs import METHODS, REAL_URL, logged, note, served, tiny_model, train, train_on
from tests.helpers import assert_bitwise_equal, prompt_dataset, run_distributed, save_tiny, tiny_tokenizer, weights_of
from tests.helpers.vllm_gloo import trl_client_on_cpu

pytestmark = pytest.mark.skipif(REAL_URL not in os.environ, reason="needs vLLM for CPUs: run `make test-vllm`")

PROMPTS = [tiny_tokenizer()(text)["input_ids"] for text in prompt_dataset(4)["prompt"]]


def worst_difference(generation: Any, model: Any) -> float:
    """The largest |log p of vLLM - log p of transformers| over some completions that vLLM samples."""
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    _, completions, logps, _ = generation.generate(prompts=repeated, images=None, num_generations=2)
    model, worst = model.eval(), 0.0
    for prompt, completion, known in zip(repeated, completions, logps, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            mine = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float(), dim=-1)
        mine = mine.gather(1, torch.tensor(completion)[:, None])[:, 0]
        worst = max(worst, float((mine - torch.tensor([value[0] for value in known])).abs().max()))
    return worst


def test_log_probs_are_those_of_transformers_and_follow_the_weights() -> None:
    with served() as server:
        trainer = train_on(server, learning_rate=1e-2)
        stale = worst_difference(trainer.vllm_generation, trainer.model)
        trainer.vllm_generation.sync_weights()
        fresh = worst_difference(trainer.vllm_generation, trainer.model)
    note(what="server: |log p(vLLM) - log p(transformers)|", last_update_not_sent=stale, sent=fresh)
    assert fresh < 1e-4 < 1e-2 < stale


def test_a_server_that_is_killed_and_started_again_loses_nothing(tmp_path: Path) -> None:
    from tests.helpers.vllm_real import RealServer

    saving = {**METHODS, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "generation_kwargs": {"seed": 123}}
    whole = train(**{**saving, "save_strategy": "no"})
    model = save_tiny(tiny_model(seed=5), tiny_tokenizer(), tmp_path / "model")

    class Kills(EffiGRPOTrainer):
        def _generate(self, prompts: Any) -> Any:
            if self.state.global_step == 2 and self.model.training:
                server.kill()
            return super()._generate(prompts)

    with RealServer(model, tmp_path / "first.log") as server, trl_client_on_cpu():
        with pytest.raises(VLLMServerError, match="cannot be reached any more.*goes on from .*checkpoint-2"):
            train_on(server, Kills, folder=tmp_path / "run", **saving)
    with RealServer(model, tmp_path / "second.log") as server, trl_client_on_cpu():
        resumed = train_on(server, folder=tmp_path / "run", resume_from_checkpoint=True, **saving)
    assert_bitwise_equal(whole.model, resumed.model)


# --- colocate -------------------------------------------------------------------------------------------------------------


def colocated(model: str, cls: str, over: dict[str, Any], folder: str | None = None, resume: str | None = None) -> Any:
    """
    Train with vLLM in this process; `run_distributed` gives it one of its own.

    On a CPU vLLM packs the weights of linear layers for oneDNN and drops the parameter that TRL loads new ones into, so that
    this is turned off.
    """
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig

    from hf_effi import EffiGRPOConfig
    from tests.helpers import grpo_args, run_grpo

    stock = cls == "stock"
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1, **over}
    args = grpo_args(
        folder or tempfile.mkdtemp(),
        GRPOConfig if stock else EffiGRPOConfig,
        **{"vllm_max_model_length": 256, "generation_kwargs": {"seed": 123}, **settings},
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = run_grpo(GRPOTrainer if stock else EffiGRPOTrainer, args, model=policy, resume_from_checkpoint=resume)
    weights = weights_of(trainer.model)
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    stale = worst_difference(trainer.vllm_generation, trainer.model)
    trainer.vllm_generation.sync_weights()
    fresh = worst_difference(trainer.vllm_generation, trainer.model)
    return {
        "weights": weights,
        "differences": differences,
        "stale": stale,
        "fresh": fresh,
        "log": trainer.state.log_history,
    }


def in_process(*args: Any, **kwargs: Any) -> Any:
    from tests.helpers.vllm_real import ENVIRONMENT

    return run_distributed(colocated, 1, *args, timeout=400.0, env=ENVIRONMENT, **kwargs)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tiny_model(), tiny_tokenizer(), tmp_path_factory.mktemp("colocate") / "model")


def test_colocated_off_is_stock_to_the_bit_and_savings_keep_the_gradient(folder: str) -> None:
    over = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    stock = in_process(folder, "stock", over)
    off = in_process(folder, "effi", {**over, "exact_savings": "off"})
    on = in_process(folder, "effi", over)
    assert_bitwise_equal(stock["weights"], off["weights"])
    apart = max(float((stock["weights"][name] - on["weights"][name]).abs().max()) for name in stock["weights"])
    assert apart < 1e-5 and sum(entry.get("effi/tokens_saved", 0) for entry in on["log"]) > 0
    assert max(on["differences"]) < 1e-4 and on["fresh"] < 1e-4 < on["stale"]
    note(what="colocate", last_update_not_sent=on["stale"], sent=on["fresh"], savings_on_minus_stock=apart)


@pytest.mark.parametrize("mode", [None, "token_truncate"])
def test_colocated_methods_resume_inside_a_generation_block(tmp_path: Path, folder: str, mode: str | None) -> None:
    over = {**METHODS, "max_steps": 5, "vllm_importance_sampling_correction": mode is not None}
    over |= {"vllm_importance_sampling_mode": mode} if mode else {}
    saving = {**over, "save_strategy": "steps", "save_steps": 3}
    whole = in_process(folder, "effi", saving, folder=str(tmp_path))
    resumed = in_process(folder, "effi", over, resume=str(tmp_path / "checkpoint-3"))
    assert max(entry.get("effi/gen_rounds", 0) for entry in whole["log"]) > 1
    assert_bitwise_equal(whole["weights"], resumed["weights"])
