"""
What only a real vLLM can show, for CPUs: `make test-vllm`. Its log-probs, its weights, its death, and colocate mode.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.errors import VLLMServerError
from tests.engines._vllm_runs import METHODS, REAL_URL, logged, note, served, tiny_model, train, train_on
from tests.helpers import (
    assert_bitwise_equal,
    grpo_args,
    prompt_dataset,
    run_distributed,
    run_grpo,
    save_tiny,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.vllm_gloo import trl_client_on_cpu
from tests.helpers.vllm_real import ENVIRONMENT, RealServer

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


# --- colocate --------------------------------------------------------------------------------------------------------


def colocated(model: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Train with vLLM in this process, once for each of `runs`; `run_distributed` gives them a process of their own.

    On a CPU vLLM packs the weights of linear layers for oneDNN and drops the parameter that TRL loads new ones into,
    so that this is turned off. It is not compiled, since each run would be again, and computes in float32: TRL leaves
    the choice to vLLM, which takes bfloat16 for weights in float32, and log-probs 0.1 apart do not show whether
    weights are new.
    """
    import vllm._custom_ops
    from trl.generation import vllm_generation

    vllm._custom_ops._supports_onednn = False
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")
    return [_colocated(model, **run) for run in runs]


def _colocated(model: str, cls: str = "effi", folder: str = "", resume: str | None = None, **over: Any) -> Any:
    trainer_class, config = (GRPOTrainer, GRPOConfig) if cls == "stock" else (EffiGRPOTrainer, EffiGRPOConfig)
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1}
    settings |= {"vllm_max_model_length": 256, **over}  # no seed: each copy of a prompt is a request of its own here
    args = grpo_args(folder or tempfile.mkdtemp(), config, **settings)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = run_grpo(trainer_class, args, model=policy, resume_from_checkpoint=resume)
    found = {"weights": {name: value.clone() for name, value in weights_of(trainer.model).items()}}
    with torch.no_grad():  # the last update may have had no gradient: its completions are drawn without a seed
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    found["stale"] = worst_difference(trainer.vllm_generation, trainer.model)
    trainer.vllm_generation.sync_weights()
    found["sent"] = worst_difference(trainer.vllm_generation, trainer.model)
    for name in ("sampling/sampling_logp_difference/max", "grad_norm", "effi/tokens_saved", "effi/gen_rounds"):
        found[name] = logged(trainer, name)
    return found


def test_colocated_vllm_trains_as_stock_and_resumes_inside_a_generation_block(tmp_path: Path) -> None:
    model = save_tiny(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    plain = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    plain |= {"num_generations": 4, "per_device_train_batch_size": 8}
    runs = [{"cls": "stock", **plain}, {"exact_savings": "off", **plain}, plain]
    for mode in (None, "sequence_mask"):
        folder = str(tmp_path / f"{mode}")
        over = {**METHODS, "max_steps": 5, "vllm_importance_sampling_correction": mode is not None}
        over |= {"vllm_importance_sampling_mode": mode} if mode else {}
        runs.append({**over, "folder": folder, "save_strategy": "steps", "save_steps": 3})
        runs.append({**over, "resume": f"{folder}/checkpoint-3"})
    ((stock, off, on, *pairs),) = run_distributed(colocated, 1, model, runs, timeout=1500.0, env=ENVIRONMENT)
    assert max(stock["grad_norm"]) > 0
    assert_bitwise_equal(stock["weights"], off["weights"])
    apart = max(float((stock["weights"][name] - on["weights"][name]).abs().max()) for name in stock["weights"])
    assert apart < 1e-5 and sum(on["effi/tokens_saved"]) > 0
    assert max(on["sampling/sampling_logp_difference/max"]) < 1e-4 and on["sent"] < 1e-4 < 1e-2 < on["stale"]
    for whole, resumed in zip(pairs[::2], pairs[1::2], strict=True):
        assert max(whole["effi/gen_rounds"]) > 1
        assert_bitwise_equal(whole["weights"], resumed["weights"])
    note(what="colocate", changed_and_not_sent=on["stale"], sent=on["sent"], weights_with_savings_minus_stock=apart)
